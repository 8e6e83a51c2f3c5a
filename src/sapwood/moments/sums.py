"""Sums, constants, scales and concatenation.

The summands are taken as independent given what they have in common in the mean: true where one of them ends in a
layer with fresh zero-mean weights, as a residual branch does.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Moments, Side, plus, times


def shifted(x: Moments, constant: Tensor | float) -> Moments:
    """A tensor plus a constant that is no random weight (a bias, a positional embedding): the mean moves."""
    value = torch.as_tensor(constant, dtype=x.clean.raw.dtype, device=x.clean.raw.device).detach()
    if not bool(value.any()):
        return x
    value = value.reshape([1] * (len(x.shape) - value.dim()) + list(value.shape))
    typical = x.average(value)

    def side(s: Side) -> Side:
        if s.mean is None:
            pair = None if s.pair is None else s.pair + value * typical
            return Side(s.raw + value.square(), value.expand_as(s.raw + value), pair)
        pair = None
        if s.pair is not None:
            pair = s.pair + s.mean * typical + value * x.average(s.mean) + value * typical
        return Side(s.raw + 2 * s.mean * value + value.square(), s.mean + value, pair)

    clean = side(x.clean)
    cross = None
    if x.cross is not None:
        cross = plus(times(x.noisy.mean, typical), times(_average(x, x.clean.mean), value))
        cross = plus(x.cross + value * typical, cross)
    return x.replace(clean=clean, noisy=side(x.noisy) if x.finite else clean, cross=cross)


def _average(x: Moments, moment: Tensor | None) -> Tensor | None:
    return None if moment is None else x.average(moment)


def scaled(x: Moments, factor: Tensor | float) -> Moments:
    """A tensor times a constant that broadcasts to it."""
    if isinstance(factor, Tensor):
        factor = factor.to(x.clean.raw)
        factor = factor.reshape([1] * (len(x.shape) - factor.dim()) + list(factor.shape))
        typical: Any = x.average(factor) * factor
    else:
        typical = factor * factor

    def side(s: Side) -> Side:
        return Side(s.raw * (factor * factor), times(s.mean, factor), times(s.pair, typical))

    clean = side(x.clean)
    noisy = side(x.noisy) if x.finite else clean
    td, to = times(x.td, factor * factor), times(x.to, typical)
    return x.replace(clean=clean, noisy=noisy, cross=times(x.cross, typical), td=td, to=to)


@rule(torch.add, torch.Tensor.add, torch.Tensor.add_, operator.add, operator.iadd)
def add(call: Call, x: Any, y: Any, *, alpha: float = 1) -> Moments:
    """A residual sum, or a sum with a constant."""
    if alpha != 1:
        y = scaled(y, alpha) if isinstance(y, Moments) else y * alpha
    if not isinstance(x, Moments):
        x, y = y, x
    if not isinstance(y, Moments):
        return shifted(x, y)
    if x is y:
        return scaled(x, 2.0)
    if x.shape != y.shape or x.channels != y.channels:
        raise call.refuse(f"a sum of shapes {tuple(x.shape)} and {tuple(y.shape)} has no moment rule")
    clean = _sum(x, y, x.clean, y.clean)
    noisy = _sum(x, y, x.noisy, y.noisy) if x.finite else clean
    cross = None
    if x.cross is not None or y.cross is not None:
        mixed = plus(x.product(x.noisy.mean, y.clean.mean), x.product(y.noisy.mean, x.clean.mean))
        cross = plus(plus(x.crossed(), y.crossed()), mixed)
    out: Moments = x.replace(clean=clean, noisy=noisy, cross=cross, td=plus(x.td, y.td), to=plus(x.to, y.to))
    return out


def _sum(x: Moments, y: Moments, a: Side, b: Side) -> Side:
    raw = a.raw + b.raw
    if a.mean is not None and b.mean is not None:
        raw = raw + 2 * a.mean * b.mean
    pair = None
    if a.pair is not None or b.pair is not None:
        pair = plus(plus(x.pair(a), y.pair(b)), plus(x.product(a.mean, b.mean), x.product(b.mean, a.mean)))
    return Side(raw, plus(a.mean, b.mean), pair)


@rule(torch.sub, torch.Tensor.sub, torch.Tensor.sub_, operator.sub, torch.Tensor.__rsub__, torch.rsub)
def subtract(call: Call, x: Any, y: Any, *, alpha: float = 1) -> Moments:
    """A difference of independent tensors, or with a constant."""
    reverse = call.name.rpartition(".")[2] in ("__rsub__", "rsub")
    x, y = (y, x) if reverse else (x, y)
    return add(call, x, scaled(y, -1.0) if isinstance(y, Moments) else -y, alpha=alpha)


@rule(torch.neg, torch.Tensor.neg, torch.Tensor.__neg__, operator.neg)
def negative(call: Call, x: Moments) -> Moments:
    """The negative."""
    return scaled(x, -1.0)


@rule(torch.mul, torch.Tensor.mul, torch.Tensor.mul_, operator.mul)
def multiply(call: Call, x: Any, y: Any) -> Moments:
    """A product with a constant."""
    if not isinstance(x, Moments):
        x, y = y, x
    if isinstance(y, Moments):
        raise call.refuse("a product of two tensors that both depend on the input has no moment rule")
    return scaled(x, y)


@rule(torch.div, torch.Tensor.div, torch.Tensor.div_, operator.truediv, torch.true_divide)
def divide(call: Call, x: Any, y: Any) -> Moments:
    """A quotient by a constant."""
    if isinstance(y, Moments) or not isinstance(x, Moments):
        raise call.refuse("a quotient by a tensor that depends on the input has no moment rule")
    return scaled(x, 1 / y)
