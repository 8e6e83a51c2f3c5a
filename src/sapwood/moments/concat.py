"""Concatenation along channels (DenseNet, Inception) or along positions (a class token)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Law, Moments, Side, times


@rule(torch.cat, torch.concat, torch.concatenate)
def concatenate(call: Call, tensors: Any, dim: int = 0) -> Moments:
    """Tensors side by side; constants (a class token) among them.

    Along positions, the average over other positions is one over all parts; parts are independent of each other.
    """
    first = next(x for x in tensors if isinstance(x, Moments))
    parts = [x if isinstance(x, Moments) else constant(x, first) for x in tensors]
    if any(x.channels != first.channels or len(x.shape) != len(first.shape) for x in parts):
        raise call.refuse("a concatenation of different layouts has no moment rule")
    axis = dim % len(first.shape)
    if axis in first.channels:
        return _along_channels(call, parts, axis)
    if call.flat:
        raise call.refuse("a concatenation along positions is not flat (positions='full' has a rule)")
    return _along_positions(call, parts, axis)


def constant(value: Tensor, like: Moments) -> Moments:
    """A tensor that depends on no weight and no input."""
    value = value.detach().to(like.clean.raw)
    side = Side(value.square(), value)
    return Moments(value.shape, like.channels, side, Side(side.raw, value) if like.finite else side)


def _along_channels(call: Call, parts: list[Moments], axis: int) -> Moments:
    paired = any(x.clean.pair is not None for x in parts)

    def side(sides: list[Side]) -> Side:
        raw = joined(parts, [s.raw for s in sides], axis)
        assert raw is not None
        pairs = [x.pair(s) if paired else None for x, s in zip(parts, sides, strict=True)]
        return Side(raw, joined(parts, [s.mean for s in sides], axis), joined(parts, pairs, axis))

    clean = side([x.clean for x in parts])
    noisy = side([x.noisy for x in parts]) if parts[0].finite else clean
    cross = joined(parts, [x.crossed() for x in parts], axis) if parts[0].finite and paired else None
    td, to = (joined(parts, moments, axis) for moments in ([x.td for x in parts], [x.to for x in parts]))
    return Moments(call.shape, parts[0].channels, clean, noisy, cross, td, to, _common_law(call, parts, axis))


def _common_law(call: Call, parts: list[Moments], axis: int) -> Law | None:
    laws = [x.law for x in parts if x.law is not None]
    if len(laws) < len(parts) or any(law.activation != laws[0].activation for law in laws):
        return None
    return Law(_along_channels(call, [law.gaussian for law in laws], axis), laws[0].activation)


def _along_positions(call: Call, parts: list[Moments], axis: int) -> Moments:
    total = sum(x.positions for x in parts)

    def side(sides: list[Side]) -> Side:
        raw, mean = joined(parts, [s.raw for s in sides], axis), joined(parts, [s.mean for s in sides], axis)
        assert raw is not None
        if all(s.pair is None for s in sides):
            return Side(raw, mean)
        whole = Moments(call.shape, parts[0].channels, Side(raw, mean), Side(raw, mean))
        product = whole.product(mean, mean)
        excess = [_excess(x, s, x.positions / total) for x, s in zip(parts, sides, strict=True)]
        pair = joined(parts, excess, axis)
        assert pair is not None
        return Side(raw, mean, pair if product is None else pair + product)

    clean = side([x.clean for x in parts])
    noisy = side([x.noisy for x in parts]) if parts[0].finite else clean
    cross = clean.pair if parts[0].finite else None
    shares = [(x.positions - 1) / max(total - 1, 1) for x in parts]
    to = joined(parts, [times(x.to, share) for x, share in zip(parts, shares, strict=True)], axis)
    return Moments(call.shape, parts[0].channels, clean, noisy, cross, joined(parts, [x.td for x in parts], axis), to)


def _excess(x: Moments, side: Side, share: float) -> Tensor | None:
    """What the pair moment has beyond the product of the means, as a part of the whole."""
    if side.pair is None:
        return None
    product = x.product(side.mean, side.mean)
    return times(side.pair if product is None else side.pair - product, share)


def joined(parts: list[Moments], moments: list[Tensor | None], axis: int) -> Tensor | None:
    """Moments side by side, zeros in place of None; None where all are."""
    if all(moment is None for moment in moments):
        return None
    zero = parts[0].clean.raw.new_zeros(())
    shapes = [x.clean.raw.shape for x in parts]
    common = [max(sizes) for sizes in zip(*shapes, strict=True)]
    full = []
    for x, moment in zip(parts, moments, strict=True):
        size = [x.shape[axis] if a == axis else n for a, n in enumerate(common)]
        full.append((zero if moment is None else moment).expand(size))
    return torch.cat(full, axis)
