"""What makes a comparison fair, as hashes: methods of one seed share their initial weights and their data order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sapwood.experiments.material import Split


def weights_hash(model: nn.Module) -> str:
    """Of every parameter and buffer."""
    return _digest(model.state_dict().values())


def order_hash(split: Split, seed: int) -> str:
    """Of the first batch, as shuffled and augmented, that training with this seed sees."""
    return _digest(next(iter(split.train_batches(torch.Generator().manual_seed(seed)))))


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
