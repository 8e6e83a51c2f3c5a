"""Smooth non-linearities (GELU, SiLU, tanh and their kin), by Gauss-Hermite quadrature and Hermite series.

E f^2 and E f'^2 of N(mean, deviation^2) and the Hermite coefficients a_n = E[f(mean + deviation y) He_n(y)] / sqrt(n!)
of f and f' are sums over 48 nodes, exact to 1e-4 for GELU up to a deviation of 2. Two Gaussians of correlation c
give E[f(u) f(u')] = sum over n of c^n a_n a_n'; six terms leave a relative 3e-3 of GELU at correlation one and unit
deviation.

All of these change smoothly with the mean and the deviation. So they are summed at a few points of every channel,
spread over what its positions have, and interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.gates import TINY, Passed, hermite, passed, root, variance
from sapwood.moments.registry import RULES, Call
from sapwood.moments.state import Moments, Side

NODES = 48
TERMS = 6
POINTS = tuple(math.cos(math.pi * odd / 8) for odd in (7, 5, 3, 1))
"""Where a channel is evaluated, in half ranges around its middle: Chebyshev's, for cubics."""
NARROWEST = 0.01
"""Half range at least, relative to the deviation: positions that are alike still need a slope."""


@dataclass(frozen=True)
class Smooth:
    """Any smooth pointwise function that torch differentiates."""

    function: Callable[[Tensor], Tensor]

    def moments(self, mean: Tensor | None, deviation: Tensor) -> Passed:
        """See `sapwood.moments.gates.Activation`."""
        raw, square, mean, slope = self.expansion(mean, deviation, 1)
        return Passed(mean, raw, slope, square)

    def at(self, x: Moments, side: Side) -> Expanded:
        """See `sapwood.moments.gates.At`."""
        return Expanded(self, x, side)

    def expansion(self, mean: Tensor | None, deviation: Tensor, terms: int) -> Tensor:
        """E f^2, E f'^2, and `terms` Hermite coefficients of f and of f': (2 + 2 terms, ...)."""
        nodes, weights = (torch.tensor(t, dtype=torch.float64).to(deviation) for t in hermite(NODES))
        basis = torch.tensor([polynomials(float(node))[:terms] for node in nodes], dtype=torch.float64).to(deviation)
        u = deviation * nodes.reshape(-1, *[1] * deviation.dim())
        value, slope = self._both(u if mean is None else u + mean)
        squares = [torch.tensordot(weights, part.square(), 1)[None] for part in (value, slope)]
        return torch.cat([*squares, *(torch.tensordot((basis * weights[:, None]).mT, p, 1) for p in (value, slope))])

    def value(self, u: Tensor) -> Tensor:
        """f(u)."""
        return self.function(u)

    def slope(self, u: Tensor) -> Tensor:
        """f'(u)."""
        return self._both(u)[1]

    def _both(self, u: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = torch.func.jvp(self.function, (u,), (torch.ones_like(u),))  # type: ignore[assignment]
        return both


class Expanded:
    """A smooth activation of one network's Gaussians, as `sapwood.moments.gates.At` asks for it."""

    def __init__(self, activation: Smooth, x: Moments, side: Side) -> None:
        self.activation, self.x, self.mean, self.deviation = activation, x, side.mean, root(variance(side))
        raw, square, mean, slope = interpolated(x, side.mean, self.deviation, activation, 1)
        self.passed = Passed(mean, raw, slope, square)

    def between(self, other: Expanded, shared: Tensor) -> tuple[Tensor, Tensor]:
        """See `sapwood.moments.gates.At`."""
        average = self.x.average
        if shared.numel() == average(self.deviation).numel():
            one, two = self.typical, other.typical
        else:
            one, two = self.everywhere, [average(coefficient) for coefficient in other.everywhere]
        correlation = (shared / (one[0] * two[0]).clamp_min(TINY)).clamp(0, 1)

        def series(terms: slice) -> Tensor:
            total = torch.zeros_like(correlation)
            for a, b in zip(reversed(one[terms]), reversed(two[terms]), strict=True):
                total = total * correlation + a * b
            return total

        return series(slice(1, 1 + TERMS)), series(slice(1 + TERMS, None))

    @cached_property
    def typical(self) -> list[Tensor]:
        """Deviation and Hermite coefficients of f and f' at an average position."""
        mean, deviation = None if self.mean is None else self.x.average(self.mean), self.x.average(self.deviation)
        return [deviation, *self.activation.expansion(mean, deviation, TERMS)[2:]]

    @cached_property
    def everywhere(self) -> list[Tensor]:
        """The same at every position."""
        return [self.deviation, *interpolated(self.x, self.mean, self.deviation, self.activation, TERMS)[2:]]


def interpolated(x: Moments, mean: Tensor | None, deviation: Tensor, activation: Smooth, terms: int) -> list[Tensor]:
    """`activation.expansion` at every position of `x`, by interpolation between points of every channel."""
    axes = [axis for axis in range(len(x.shape)) if axis not in x.channels]
    points, weights = _points(deviation, deviation, axes)
    places = mean
    if mean is not None and not _is_fixed(mean, axes):
        places, others = _points(mean.expand_as(deviation), deviation, axes)
        places, points = places.repeat_interleave(len(POINTS), 0), points.repeat(len(POINTS), *[1] * deviation.dim())
        weights = (others[:, None] * weights).flatten(0, 1)
    elif mean is not None:
        places = mean.amax(axes, keepdim=True)
    with torch.no_grad():
        places = None if places is None else places.double()
        table = activation.expansion(places, points.double().clamp_min(0), terms)  # its differences are derivatives
    return [(numbers * weights).sum(0) for numbers in table.to(weights)]


def _is_fixed(mean: Tensor, axes: list[int]) -> bool:
    """Whether it depends on no weight and is one for all positions of a channel, as a bias is."""
    return not mean.requires_grad and bool((mean.amax(axes) == mean.amin(axes)).all())


def _points(values: Tensor, scale: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Where to evaluate, (points, ...) with positions of size one, and Lagrange's weights at every position."""
    with torch.no_grad():
        low, high = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
        middle = (low + high) / 2
        half = torch.maximum((high - low) / 2, NARROWEST * scale.amax(axes, keepdim=True)).clamp_min(TINY)
        points = torch.stack([middle + half * point for point in POINTS])
    t = (values - middle) / half
    weights = []
    for point in POINTS:
        others = [other for other in POINTS if other != point]
        weights.append(math.prod(((t - other) / (point - other) for other in others), start=torch.ones_like(t)))
    return points, torch.stack(weights)


@lru_cache
def polynomials(node: float) -> tuple[float, ...]:
    """He_n(node) / sqrt(n!) for n below `TERMS`."""
    found = [1.0, node]
    for n in range(1, TERMS - 1):
        found.append((node * found[n] - math.sqrt(n) * found[n - 1]) / math.sqrt(n + 1))
    return tuple(found)


def _register(operation: Callable[..., Any], function: Callable[..., Any]) -> None:
    def apply(call: Call, x: Moments, *args: Any, **kwargs: Any) -> Moments:
        kwargs.pop("inplace", None)
        return passed(call, x, Smooth(lambda u: function(u, *args, **kwargs)))

    RULES[operation] = apply


for _operation in (
    F.gelu, F.silu, F.mish, F.elu, F.celu, F.selu, F.softplus, F.tanh, F.sigmoid, F.logsigmoid,
    torch.tanh, torch.sigmoid, torch.celu, torch.selu, torch.Tensor.tanh, torch.Tensor.sigmoid,
):  # fmt: skip
    _register(_operation, _operation)
