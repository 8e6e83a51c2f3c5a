"""How alike two kernels are: centred alignment (Cortes, Mohri and Rostamizadeh 2012) and relative distance."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.errors import DataError, ScoreError


def alignment(first: Tensor, second: Tensor, *, centred: bool = True) -> float:
    """Cosine between two kernels, -1 to 1; 1 where they are multiples of each other.

    Args:
        first: (N, N).
        second: (N, N), such as another network's kernel, or the outer product of the targets.
        centred: Whether the mean over the outputs is taken out of the features first.

    Raises:
        DataError: the shapes differ.
        ScoreError: a kernel is zero, or constant and centred.

    Example:
        >>> import torch
        >>> alignment(torch.eye(3), 7 * torch.eye(3))
        1.0
    """
    _check(first, second)
    a, b = (_centred(k.double()) if centred else k.double() for k in (first, second))
    norms = a.norm() * b.norm()
    if not norms > 0:
        raise ScoreError("A kernel that is zero (or constant, when it is centred) is aligned with nothing.")
    return round(float((a * b).sum() / norms), 12)


def distance(first: Tensor, second: Tensor) -> float:
    """Frobenius norm of the difference over that of the first kernel."""
    _check(first, second)
    return float((second.double() - first.double()).norm() / first.double().norm())


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def _check(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.dim() != 2:
        raise DataError(
            f"Kernels of the same outputs have one shape; {tuple(first.shape)} and {tuple(second.shape)} came."
        )
    for kernel in (first, second):
        if not torch.isfinite(kernel).all():
            raise ScoreError("A kernel holds NaN or infinite values.")
