"""A checksum of nested values with tensors in them, such as a checkpoint's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def checksum(value: object) -> str:
    """The SHA-256 of a value's structure, plain values and tensors (dtype, shape, bytes), wherever they are kept."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: object) -> Iterator[bytes | memoryview]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"{key!r}:".encode()
            yield from _parts(inner)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} of".encode()
        for inner in value:
            yield from _parts(inner)
    else:
        yield repr(value).encode()
