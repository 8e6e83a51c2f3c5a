"""Convolutions and linear layers: sums over independent zero-mean weights.

With w = m * theta, v = E w^2 and x the layer's input, a sum z = sum w x has (section numbers are not needed: each line
follows from E[w w'] = 0 for w != w')

    E z^2        = sum v E x^2
    E z(p)z'(p') = sum v E[x x']          over the taps that are inside the map at both places
    E D_z^2      = sum v (E D_x^2 + E x^2 / variance)        the second term is this layer's own perturbation

At another position of the same sample the third line has the pair moment in place of E x^2. A tap that is inside the
map at N of L positions is there at both of two places with probability N / L (any two samples) or (N - 1) / (L - 1)
(two positions of one sample).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Moments, Side, Weight, plus, times
from sapwood.moments.sums import shifted

Contraction = Callable[[Tensor, Tensor], Tensor]


def contracted(
    x: Moments, weight: Weight, contract: Contraction, kernels: tuple[Tensor, Tensor], call: Call, channel: int
) -> Moments:
    """Moments of `sum w x`.

    Args:
        x: The input.
        weight: The weight.
        contract: `contract(moment, kernel)` sums a moment with a kernel in the weight's place.
        kernels: `v` for pairs of samples and for pairs of positions, border effects included.
        call: The operation.
        channel: The output's channel axis.
    """
    samples, positions = kernels
    pairs = x.pair(x.clean), x.pair(x.noisy) if x.finite else None
    source = pairs[1] if x.finite else pairs[0]
    grown = 1 + weight.growth
    raw = [x.clean.raw, plus(x.td, x.noisy.raw * weight.per_variance if weight.per_variance else None)]
    raw.append(x.noisy.raw * grown if x.finite else None)
    clean, td, noisy = _together(contract, raw, weight.v)
    off = [pairs[0], None if call.normed else times(pairs[1], grown), x.crossed() if x.finite else None]
    pair, pair_noisy, cross = _together(contract, off, samples)
    (to,) = _together(contract, [plus(x.to, times(source, weight.per_variance))], positions)
    assert clean is not None
    side = Side(clean, None, pair)
    other = Side(noisy, None, pair_noisy) if noisy is not None else side
    return Moments(call.shape, (channel,), side, other, cross, td, to)


def _together(contract: Contraction, moments: list[Tensor | None], kernel: Tensor) -> list[Tensor | None]:
    """Contracts several moments with one kernel at once, along the batch axis."""
    present = [moment for moment in moments if moment is not None]
    if not present:
        return list(moments)
    sizes = torch.broadcast_shapes(*(moment.shape for moment in present))  # type: ignore[no-untyped-call]
    stacked = contract(torch.cat([moment.expand(sizes) for moment in present]), kernel)
    parts = iter(stacked.chunk(len(present)))
    return [None if moment is None else next(parts) for moment in moments]


@rule(F.linear)
def linear(call: Call, x: Moments, weight: Weight, bias: Tensor | None = None) -> Moments:
    """Channels are the last axis, all others are positions."""
    last = len(x.shape) - 1
    if x.channels != (last,) and (x.td is not None or x.clean.mean is not None or x.clean.pair is not None):
        raise call.refuse("a linear layer along positions (pixels, tokens) has no moment rule")
    matrix = weight.v.flatten(1)
    out = contracted(_flat_input(x, last), weight, F.linear, (matrix, matrix), call, len(call.shape) - 1)
    return out if bias is None else shifted(out, bias)


def _flat_input(x: Moments, channel: int) -> Moments:
    if x.channels == (channel,):
        return x
    size = [n if axis == channel else 1 for axis, n in enumerate(x.shape)]  # white: every entry is alike
    side = Side(x.clean.raw.mean().expand(size))
    return Moments(x.shape, (channel,), side, Side(side.raw) if x.finite else side)


CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@rule(*CONVOLUTIONS)
def convolution(
    call: Call,
    x: Moments,
    weight: Weight,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Moments:
    """Convolution in one to three dimensions, with groups, stride, dilation and zero padding."""
    dims = weight.v.dim() - 2
    if len(x.shape) != dims + 2 or x.channels != (1,):
        raise call.refuse("a convolution over anything but (batch, channels, positions) has no moment rule")
    stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
    padding = padding if isinstance(padding, str) else _tuple(padding, dims)
    if call.flat:
        summed = weight.v.flatten(2).sum(2).reshape(*weight.v.shape[:2], *[1] * dims)

        def contract(moment: Tensor, kernel: Tensor) -> Tensor:
            return CONVOLVE[dims](moment, kernel, groups=groups)

        out = contracted(x, _with(weight, summed), contract, (summed, summed), call, 1)
    else:
        inside = tap_counts(x.shape[2:], call.shape[2:], tuple(weight.v.shape[2:]), stride, padding, dilation)
        inside = inside.to(weight.v)
        positions = math.prod(call.shape[2:])

        def contract(moment: Tensor, kernel: Tensor) -> Tensor:
            return CONVOLVE[dims](moment, kernel, None, stride, padding, dilation, groups)

        kernels = weight.v * (inside / positions), weight.v * ((inside - 1) / max(positions - 1, 1)).clamp_min(0)
        out = contracted(x, weight, contract, kernels, call, 1)
    return out if bias is None else shifted(out, bias.reshape(-1, *[1] * dims))


def _with(weight: Weight, v: Tensor) -> Weight:
    return Weight(weight.name, v, weight.per_variance, weight.growth)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) * (dims if len(value) == 1 else 1) if isinstance(value, tuple | list) else (value,) * dims


def tap_counts(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
) -> Tensor:
    """At how many output positions every tap of a kernel lies inside the input; shape of the kernel."""
    counts = torch.ones(())
    for axis, size in enumerate(kernel):
        span = dilation[axis] * (size - 1)
        before = {"same": span // 2, "valid": 0}[padding] if isinstance(padding, str) else padding[axis]
        places = torch.arange(outputs[axis])[:, None] * stride[axis] + torch.arange(size) * dilation[axis] - before
        along = ((places >= 0) & (places < inputs[axis])).sum(0)
        counts = counts[..., None] * along
    return counts
