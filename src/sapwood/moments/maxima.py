"""Maximum pooling of independent Gaussians, before or after a non-linearity.

The positions of a window are taken as independent Gaussians u of one mean and variance (their averages over the
window), so the maximum of k of them is mean + deviation * xi with xi the maximum of k standard normals; a monotone
activation commutes with it. With a ReLU and zero means this gives E max+ = c1 deviation and E max+^2 = c2 variance.
The derivative is that of the winner: E D^2 is multiplied by the gate of the winner over the gate of any. Two windows
that overlap may have one winner, which is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.gates import Activation, Passed, passed
from sapwood.moments.pools import AVERAGE, Pool, divided, pooled, sizes
from sapwood.moments.rectifiers import Leaky
from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Moments, Side, plus, times

IDENTITY = Leaky(1.0)


@rule(F.max_pool1d, F.max_pool2d, F.max_pool3d)
def max_pool(  # torch's own signature
    call: Call,
    x: Moments,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Moments:
    """Maximum pooling with padding and overlap."""
    dims = len(x.shape) - 2
    window, step = sizes(kernel_size, dims), sizes(stride or kernel_size, dims)
    if return_indices or set(sizes(dilation, dims)) != {1}:
        raise call.refuse("max-pooling with indices or dilation has no moment rule")
    return _maximum(call, x, window, step, sizes(padding, dims), ceil_mode)


@rule(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
def adaptive_max_pool(call: Call, x: Moments, output_size: Any, return_indices: bool = False) -> Moments:
    """Adaptive maximum pooling to sizes that divide the map's."""
    if return_indices:
        raise call.refuse("max-pooling with indices has no moment rule")
    window = tuple(divided(call, x))
    return _maximum(call, x, window, window, (0,) * len(window), False)


def _maximum(
    call: Call, x: Moments, window: tuple[int, ...], stride: Any, padding: Any, ceil_mode: bool
) -> Moments:  # fmt: skip
    gaussian, activation = (x, IDENTITY) if x.law is None else (x.law.gaussian, x.law.activation)
    function = AVERAGE[len(window)]

    def pool(moment: Tensor) -> Tensor:
        if call.flat:
            return moment
        return function(moment.expand(x.shape), window, stride, padding, ceil_mode, count_include_pad=False)

    counts = _counts(call, x, window, stride, padding)
    typical = _typical(gaussian, pool, call.shape)
    maximum = Maximum(activation, counts.to(device=typical.clean.raw.device))
    ones = torch.ones_like(typical.clean.raw)
    gates = typical.replace(noisy=typical.clean, cross=None, td=ones, to=ones)  # passed on, it shows the gates
    best, one = passed(call, gates, maximum), passed(call, gates, activation)
    assert best.td is not None and best.to is not None and one.td is not None and one.to is not None
    td, to = times(pooled(pool, x.td), best.td / one.td), times(pooled(pool, x.to), best.to / one.to)
    return passed(call, typical, maximum).replace(td=td, to=to)


def _typical(x: Moments, pool: Pool, shape: torch.Size) -> Moments:
    """One Gaussian for every window."""

    def side(s: Side) -> Side:
        return Side(pool(s.raw), pooled(pool, s.mean), pooled(pool, s.pair))

    clean = side(x.clean)
    return Moments(shape, x.channels, clean, side(x.noisy) if x.finite else clean, pooled(pool, x.cross))


def _counts(call: Call, x: Moments, window: Any, stride: Any, padding: Any) -> Tensor:
    """How many positions of every window are inside the map: (1, 1, output positions...)."""
    if call.flat:
        return torch.full([1] * len(x.shape), math.prod(window))
    counts = torch.ones((), dtype=torch.long)
    for axis, size in enumerate(window):
        places = torch.arange(call.shape[2 + axis])[:, None] * stride[axis] + torch.arange(size) - padding[axis]
        counts = counts[..., None] * ((places >= 0) & (places < x.shape[2 + axis])).sum(1)
    return counts[None, None]


class Maximum:
    """A monotone activation of the maximum of some independent normals, itself an activation.

    Args:
        activation: The activation.
        counts: Over how many normals the maximum is taken, at every position.
    """

    def __init__(self, activation: Activation, counts: Tensor) -> None:
        self.activation = activation
        self.counts = counts

    def moments(self, mean: Tensor | None, deviation: Tensor) -> Passed:
        """See `Activation`."""
        activation = self.activation
        if mean is None and isinstance(activation, Leaky):  # f(deviation * xi) = deviation * f(xi)
            first, second, slope, square = self._spread(lambda n: of_standard_normals(n, activation)).to(deviation)
            ones = torch.ones_like(deviation)
            return Passed(deviation * first, deviation.square() * second, ones * slope, ones * square)
        total: list[Tensor | None] = [None] * 4
        for node, weight in zip(GRID, self._spread(density).to(deviation), strict=True):
            u = deviation * node if mean is None else mean + deviation * node
            value, slope = activation.value(u), activation.slope(u)
            terms = (value, value.square(), slope, slope.square())
            total = [plus(sum_, weight * term) for sum_, term in zip(total, terms, strict=True)]
        return Passed(*(term for term in total if term is not None))

    def value(self, u: Tensor) -> Tensor:
        """See `Activation`."""
        return self.activation.value(u)

    def slope(self, u: Tensor) -> Tensor:
        """See `Activation`."""
        return self.activation.slope(u)

    def _spread(self, of: Callable[[int], list[float]]) -> Tensor:
        """Numbers that depend on the count, laid out over the positions: (numbers, *counts)."""
        distinct, where = self.counts.unique(return_inverse=True)
        table = torch.tensor([of(int(n)) for n in distinct], dtype=torch.float64, device=self.counts.device)
        return table.mT[:, where]


GRID = [float(node) for node in np.linspace(-5.0, 7.0, 49)]


@lru_cache
def density(count: int) -> list[float]:
    """Weights of the nodes of `GRID` for the maximum of `count` standard normals."""
    nodes = torch.tensor(GRID, dtype=torch.float64)
    weights = torch.special.ndtr(nodes) ** (count - 1) * torch.exp(-0.5 * nodes.square())
    return (weights / weights.sum()).tolist()  # type: ignore[no-any-return]


@lru_cache
def of_standard_normals(count: int, activation: Leaky) -> list[float]:
    """E f, E f^2, E f' and E f'^2 of the maximum of `count` standard normals, by a fine trapezoidal rule."""
    nodes = torch.arange(-9, 9, 1e-4, dtype=torch.float64) + 0.5e-4
    weights = torch.special.ndtr(nodes) ** (count - 1) * torch.exp(-0.5 * nodes.square())
    weights /= weights.sum()
    value, slope = activation.value(nodes), activation.slope(nodes)
    return [float((weights * term).sum()) for term in (value, value.square(), slope, slope.square())]
