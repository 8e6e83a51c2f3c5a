"""What the parts of a functional model are called."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.batches import Batch

Params = dict[str, Tensor]
Forward = Callable[[nn.Module, Batch], Any]
Loss = Callable[[Any, Any], Tensor]
BatchNorm = nn.modules.batchnorm._BatchNorm


class Noise(Enum):
    """Whether a second pass over the same inputs gives the same outputs."""

    NONE = "none"
    SEEDED = "the same from the same state of the global random generators"
    FREE = "another, whatever that state"


def precisions(tensors: Params) -> list[torch.dtype]:
    """Those of floating-point tensors, each once, in order."""
    return list(dict.fromkeys(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()))
