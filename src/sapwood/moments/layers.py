"""Linear layers, and what convolutions share with them: sums over independent zero-mean weights.

With w = m * theta, v = E w^2 and x the layer's input, a sum z = sum w x has (section numbers are not needed: each line
follows from E[w w'] = 0 for w != w')

    E z^2        = sum v E x^2
    E z(p)z'(p') = sum v E[x x']          over the taps that are inside the map at both places
    E D_z^2      = sum v (E D_x^2 + E x^2 / variance)        the second term is this layer's own perturbation

At another position of the same sample the third line has the pair moment in place of E x^2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Moments, Side, Weight, plus, times
from sapwood.moments.sums import shifted

Contraction = Callable[[Tensor], Tensor]


def contracted(
    x: Moments, weight: Weight, contract: Contraction, pairs: tuple[Contraction, Contraction], call: Call, channel: int
) -> Moments:
    """Moments of `sum w x`.

    Args:
        x: The input.
        weight: The weight.
        contract: Sums a moment with `v` in the weight's place.
        pairs: The same for moments of two samples, and of two positions of a sample.
        call: The operation.
        channel: The output's channel axis.
    """
    alike, noisy_alike = x.pair(x.clean), x.pair(x.noisy) if x.finite else None
    source = noisy_alike if x.finite else alike
    grown = 1 + weight.growth
    raw = [x.clean.raw, plus(x.td, x.noisy.raw * weight.per_variance if weight.per_variance else None)]
    raw.append(x.noisy.raw * grown if x.finite else None)
    clean, td, noisy = _together(contract, raw)
    off = [alike, None if call.normed else times(noisy_alike, grown), x.crossed() if x.finite else None]
    pair, pair_noisy, cross = _together(pairs[0], off)
    (to,) = _together(pairs[1], [plus(x.to, times(source, weight.per_variance))])
    assert clean is not None
    side = Side(clean, None, pair)
    other = Side(noisy, None, pair_noisy) if noisy is not None else side
    return Moments(call.shape, (channel,), side, other, cross, td, to)


def _together(contract: Contraction, moments: list[Tensor | None]) -> list[Tensor | None]:
    """Contracts several moments at once, along the batch axis."""
    present = [moment for moment in moments if moment is not None]
    if not present:
        return list(moments)
    stacked = contract(torch.cat(torch.broadcast_tensors(*present)))
    parts = iter(stacked.chunk(len(present)))
    return [None if moment is None else next(parts) for moment in moments]


@rule(F.linear)
def linear(call: Call, x: Moments, weight: Weight, bias: Tensor | None = None) -> Moments:
    """Channels are the last axis, all others are positions."""
    last = len(x.shape) - 1
    if x.channels != (last,) and (x.td is not None or x.clean.mean is not None or x.clean.pair is not None):
        raise call.refuse("a linear layer along positions (pixels, tokens) has no moment rule")
    matrix = weight.v.flatten(1)

    def contract(moment: Tensor) -> Tensor:
        return F.linear(moment, matrix)

    inputs = _typical_pairs(_flat_input(x, last))
    out = contracted(inputs, weight, contract, (contract, contract), call, len(call.shape) - 1)
    return out if bias is None else shifted(out, bias)


def _typical_pairs(x: Moments) -> Moments:
    """Moments of two positions averaged over both: positions do not mix here, and what mixes them takes averages."""

    def average(moment: Tensor | None) -> Tensor | None:
        return None if moment is None else x.average(moment)

    clean = Side(x.clean.raw, x.clean.mean, average(x.pair(x.clean)))
    noisy = Side(x.noisy.raw, x.noisy.mean, average(x.pair(x.noisy))) if x.finite else clean
    cross = average(x.crossed()) if x.finite else None
    return x.replace(clean=clean, noisy=noisy, cross=cross, to=average(x.to))


def _flat_input(x: Moments, channel: int) -> Moments:
    if x.channels == (channel,):
        return x
    size = [n if axis == channel else 1 for axis, n in enumerate(x.shape)]  # white: every entry is alike
    side = Side(x.clean.raw.mean().expand(size))
    return Moments(x.shape, (channel,), side, Side(side.raw) if x.finite else side)
