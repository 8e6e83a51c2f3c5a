"""How a Gaussian tensor passes a pointwise non-linearity, whatever that is.

With u ~ N(mean, deviation^2) an activation f gives four numbers: E f, E f^2, E f' and E f'^2. Then E D^2 is multiplied
by E f'^2, and E[D D'] by E[f'(u) f'(u')]; the gates are taken as independent of the signals that pass them.

Two places whose pre-activations are correlated (without BatchNorm they share the channel's random weights) have a
Gaussian part in common: u = mean + sqrt(c) x + sqrt(deviation^2 - c) y, with c the covariance and x in common. Given x
they are independent, and x is integrated out by Gauss-Hermite quadrature.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, Protocol

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
    """A pointwise function of a Gaussian."""

    def moments(self, mean: Tensor | None, deviation: Tensor) -> Passed:
        """The four numbers for N(mean, deviation^2); mean None is zero."""
        ...

    def value(self, u: Tensor) -> Tensor:
        """f(u)."""
        ...

    def slope(self, u: Tensor) -> Tensor:
        """f'(u)."""
        ...


def passed(call: Call, x: Moments, activation: Activation) -> Moments:
    """The moments after an activation, for Gaussian `x`."""
    clean, gate, both = _side(x, x.clean, activation)
    if not x.finite:
        out = x.replace(clean=clean, noisy=clean, td=times(x.td, gate), to=times(x.to, both))
    else:
        noisy, other, _ = _side(x, x.noisy, activation)
        td, to = times(x.td, (gate + other) / 2), drifted(call, x, both, clean, noisy)
        out = x.replace(clean=clean, noisy=noisy, cross=_cross(x, activation), td=td, to=to)
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


def _side(x: Moments, side: Side, activation: Activation) -> tuple[Side, Tensor, Tensor]:
    """The side after the activation, E f'^2, and E[f'(u) f'(u')]."""
    if side.pair is None:
        there = activation.moments(side.mean, root(variance(side)))
        return Side(there.raw, there.mean), there.square_slope, there.slope * x.average(there.slope)
    shared = covariance(side.pair, x.product(side.mean, side.mean))
    series = getattr(activation, "series", None)
    there, pair, both = (series or _by_quadrature)(x, side, shared, *(() if series else (activation,)))
    return Side(there.raw, there.mean, pair), there.square_slope, both


def _by_quadrature(
    x: Moments, side: Side, shared: Tensor, activation: Activation
) -> tuple[Passed, Tensor, Tensor]:  # fmt: skip
    total: list[Tensor | None] = [None] * 6
    for weight, given in conditioned(side, shared, activation):
        terms = (*given, given.mean * x.average(given.mean), given.slope * x.average(given.slope))
        total = [plus(sum_, weight * term) for sum_, term in zip(total, terms, strict=True)]
    mean, raw, slope, square, pair, both = (term for term in total if term is not None)
    return Passed(mean, raw, slope, square), pair, both


def _cross(x: Moments, activation: Activation) -> Tensor | None:
    if x.cross is None:
        return None
    shared = covariance(x.cross, x.product(x.noisy.mean, x.clean.mean))
    total: Tensor | None = None
    one, other = conditioned(x.noisy, shared, activation), conditioned(x.clean, shared, activation)
    for (weight, noisy), (_, clean) in zip(one, other, strict=True):
        total = plus(total, weight * noisy.mean * x.average(clean.mean))
    return total


def covariance(pair: Tensor, product: Tensor | None) -> Tensor:
    """The part of a pair moment that is not due to the means."""
    return (pair if product is None else pair - product).clamp_min(0)


def conditioned(side: Side, shared: Tensor, activation: Activation) -> list[tuple[float, Passed]]:
    """The activation given the common part, at every node of the quadrature, with the node's weight."""
    spread = variance(side)
    shared = torch.minimum(shared, spread)
    own, common = root(spread - shared), root(shared)
    given = []
    for node, weight in zip(*hermite(COMMON), strict=True):
        given.append((weight, activation.moments(plus(side.mean, common * node), own)))
    return given


@lru_cache
def hermite(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes and weights of the mean over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return tuple(map(float, nodes)), tuple(float(w) / math.sqrt(2 * math.pi) for w in weights)
