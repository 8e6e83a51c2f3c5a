"""How a Gaussian tensor passes a pointwise non-linearity, whatever that is.

With u ~ N(mean, deviation^2) an activation f gives four numbers: E f, E f^2, E f' and E f'^2. Then E D^2 is multiplied
by E f'^2, and E[D D'] by E[f'(u) f'(u')]; the gates are taken as independent of the signals that pass them.

Two places whose pre-activations are correlated (without BatchNorm they share the channel's random weights) have a
Gaussian part in common: u = mean + sqrt(c) x + sqrt(deviation^2 - c) y, with c the covariance and x in common. Given x
they are independent, and x is integrated out by Gauss-Hermite quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sapwood.moments.registry import Call
from sapwood.moments.state import Law, Moments, Side, plus, times

TINY = 1e-30
COMMON = 12
"""Nodes for the common part. The kink of ReLU is smoothed by the part that is not common."""


class Passed(NamedTuple):
    """E f, E f^2, E f', E f'^2."""

    mean: Tensor
    raw: Tensor
    slope: Tensor
    square_slope: Tensor


class Activation(Protocol):
    """A pointwise function of a Gaussian; one with an `at(x, side)` of its own has a better way than `ByQuadrature`."""

    def moments(self, mean: Tensor | None, deviation: Tensor) -> Passed:
        """The four numbers for N(mean, deviation^2); mean None is zero."""
        ...

    def value(self, u: Tensor) -> Tensor:
        """f(u)."""
        ...

    def slope(self, u: Tensor) -> Tensor:
        """f'(u)."""
        ...


class At(Protocol):
    """An activation of one network's Gaussians."""

    passed: Passed

    def between(self, other: Any, shared: Tensor) -> tuple[Tensor, Tensor]:
        """E[f(u) f(u')] and E[f'(u) f'(u')] averaged over the place of u', which is `other`'s.

        Args:
            other: The same activation of this or the other network's Gaussians.
            shared: The covariance of u and u'.
        """
        ...


class ByQuadrature:
    """Places that share a part: independent given that part, which is integrated out."""

    def __init__(self, x: Moments, side: Side, activation: Activation) -> None:
        self.x, self.side, self.activation = x, side, activation
        self.passed = activation.moments(side.mean, root(variance(side)))

    def between(self, other: ByQuadrature, shared: Tensor) -> tuple[Tensor, Tensor]:
        """See `At`."""
        pair: Tensor | None = None
        both: Tensor | None = None
        for node, weight in zip(*hermite(COMMON), strict=True):
            here = self._given(shared, node)
            there = here if other is self else other._given(shared, node)
            pair = plus(pair, weight * here.mean * self.x.average(there.mean))
            both = plus(both, weight * here.slope * self.x.average(there.slope))
        assert pair is not None and both is not None
        return pair, both

    def _given(self, shared: Tensor, node: float) -> Passed:
        spread = variance(self.side)
        shared = torch.minimum(shared, spread)
        return self.activation.moments(plus(self.side.mean, root(shared) * node), root(spread - shared))


def passed(call: Call, x: Moments, activation: Activation) -> Moments:
    """The moments after an activation, for Gaussian `x`."""
    of: Callable[[Moments, Side], At] = getattr(activation, "at", partial(ByQuadrature, activation=activation))
    at = of(x, x.clean)
    clean, both = _side(x, x.clean, at)
    gate = at.passed.square_slope
    if not x.finite:
        out = x.replace(clean=clean, noisy=clean, td=times(x.td, gate), to=times(x.to, both))
    else:
        other, cross = of(x, x.noisy), None
        noisy, _ = _side(x, x.noisy, other)
        if x.cross is not None:
            cross = other.between(at, covariance(x, x.cross, x.noisy.mean, x.clean.mean))[0]
        td, to = times(x.td, (gate + other.passed.square_slope) / 2), drifted(call, x, both, clean, noisy)
        out = x.replace(clean=clean, noisy=noisy, cross=cross, td=td, to=to)
    return out.replace(law=Law(x, activation))


def drifted(call: Call, x: Moments, both: Tensor, clean: Side, noisy: Side) -> Tensor | None:
    """E[D D'] after an activation, at finite epsilon.

    The perturbed network's variances are larger, and so the means after an activation are others, everywhere alike:
    that part of E[D D'] is the product of the drifts. The rest is gated.
    """
    if x.to is None:
        return None
    before, after = _drift(x.clean, x.noisy), _drift(clean, noisy)
    rest = x.to if before is None else x.to - before * x.average(before) / call.epsilon
    gated = rest * both
    return gated if after is None else gated + after * x.average(after) / call.epsilon


def _drift(clean: Side, noisy: Side) -> Tensor | None:
    return plus(noisy.mean, times(clean.mean, -1.0))


def variance(side: Side) -> Tensor:
    """Variance, never negative."""
    return side.raw if side.mean is None else (side.raw - side.mean.square()).clamp_min(0)


def root(square: Tensor) -> Tensor:
    """Square root with gradient zero, not infinite, at zero (units without inputs)."""
    return square.clamp_min(TINY).sqrt()


def _side(x: Moments, side: Side, at: At) -> tuple[Side, Tensor]:
    """The side after the activation, and E[f'(u) f'(u')]."""
    there = at.passed
    if side.pair is None:
        return Side(there.raw, there.mean), there.slope * x.average(there.slope)
    pair, both = at.between(at, covariance(x, side.pair, side.mean, side.mean))
    return Side(there.raw, there.mean, pair), both


def covariance(x: Moments, pair: Tensor, one: Tensor | None, other: Tensor | None) -> Tensor:
    """The part of a pair moment that is not due to the means."""
    product = x.product(one, other)
    if product is not None and product.numel() > pair.numel():
        product = x.average(product)  # `pair` is the average of all positions
    return (pair if product is None else pair - product).clamp_min(0)


@lru_cache
def hermite(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes and weights of the mean over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return tuple(map(float, nodes)), tuple(float(w) / math.sqrt(2 * math.pi) for w in weights)
