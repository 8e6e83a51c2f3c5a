"""Eigenvalues of the kernel, and what they say: condition number, effective rank, largest stable learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sapwood.errors import ConfigError, DataError, ScoreError
from sapwood.isolation import isolated
from sapwood.ntk.gram import gram
from sapwood.ntk.products import Products

FULL_BELOW = 4096
LEADING = 100
TOLERANCE = 1e-5  # of Lanczos on products in float32, relative


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a kernel, descending.

    Attributes:
        values: Eigenvalues, float64, the largest first; negative ones are rounding.
        size: Number N of all eigenvalues.
        trace: Their sum; None where only the leading ones are known and no matrix is at hand.
    """

    values: Tensor
    size: int
    trace: float | None

    @property
    def full(self) -> bool:
        """Whether all eigenvalues are known."""
        return len(self.values) == self.size

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return float(self.values[0])

    @property
    def condition_number(self) -> float | None:
        """Largest over smallest eigenvalue; infinite where the smallest is zero up to rounding; None if unknown."""
        if not self.full:
            return None
        smallest = float(self.values[-1])
        rounding = self.size * torch.finfo(torch.float64).eps * self.largest
        return self.largest / smallest if smallest > rounding else float("inf")

    @property
    def effective_rank(self) -> float | None:
        """Exponential of the entropy of the normalised eigenvalues, 1 to N (Roy and Vetterli 2007); None if unknown."""
        if not self.full or not self.trace:
            return None
        share = self.values.clamp_min(0) / self.values.clamp_min(0).sum()
        return float(torch.special.entr(share).sum().exp())

    @property
    def largest_stable_lr(self) -> float:
        """2 / largest eigenvalue: gradient descent on 1/2 sum (f - y)^2 over all outputs diverges above it."""
        return 2 / self.largest if self.largest > 0 else float("inf")


def spectrum(kernel: Tensor | Products, *, leading: int | None = None, full_below: int = FULL_BELOW) -> Spectrum:
    """Eigenvalues of a kernel.

    Args:
        kernel: The matrix, or its product form.
        leading: How many of the largest; None takes all N of a kernel up to `full_below`, and 100 of a larger one.
        full_below: Largest N that is solved whole (`eigvalsh`, N^3 operations); Lanczos serves above it (scipy's
            `eigsh`), and wherever only leading ones of a product form are asked for.

    Raises:
        ConfigError: `leading` is not in 1 .. N.
        DataError: the matrix is not square and symmetric.
        ScoreError: it holds NaN or infinite values.

    Example:
        >>> import torch
        >>> spectrum(torch.diag(torch.tensor([1.0, 4.0]))).condition_number
        4.0
    """
    size = kernel.shape[0]
    if leading is not None and not 1 <= leading <= size:
        raise ConfigError(f"leading is {leading}; of {size} eigenvalues there are 1 to {size} leading ones.")
    if isinstance(kernel, Products):
        if size <= full_below and (leading is None or 2 * leading > size):
            with isolated(0, kernel.outputs.net.device):
                matrix = gram(kernel.outputs)
            return _of_matrix(matrix, leading, full_below)
        return Spectrum(_lanczos(kernel, leading or LEADING), size, None)
    _check(kernel)
    return _of_matrix(kernel, leading, full_below)


def _check(kernel: Tensor) -> None:
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1] or not len(kernel):
        raise DataError(f"A kernel is a square matrix; {tuple(kernel.shape)} came.")
    if not torch.isfinite(kernel).all():
        raise ScoreError("The kernel holds NaN or infinite values: check the model's outputs on these inputs.")
    if not torch.allclose(kernel, kernel.T, rtol=1e-4, atol=1e-6 * float(kernel.abs().max())):
        raise DataError("A kernel is symmetric; this matrix is not.")


def _of_matrix(kernel: Tensor, leading: int | None, full_below: int) -> Spectrum:
    size, trace = len(kernel), float(kernel.diagonal().double().sum())
    if size <= full_below or leading == size:
        values = torch.linalg.eigvalsh(kernel.double()).flip(0)
        return Spectrum(values[:leading], size, trace)
    return Spectrum(_lanczos(kernel, leading or min(LEADING, size - 1)), size, trace)


def _lanczos(kernel: Tensor | Products, count: int) -> Tensor:
    """The leading eigenvalues, from a start that depends on nothing but N."""
    from scipy.sparse.linalg import eigsh  # type: ignore[import-untyped]  # here, because scipy takes a while to import

    size = kernel.shape[0]
    matrix = kernel.linear_operator() if isinstance(kernel, Products) else kernel.double().cpu().numpy()
    tolerance = TOLERANCE if isinstance(kernel, Products) and kernel.outputs.dtype == torch.float32 else 0
    start = np.random.default_rng(0).standard_normal(size)
    found = eigsh(matrix, k=min(count, size - 1), which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
    return torch.from_numpy(np.sort(found)[::-1].copy())
