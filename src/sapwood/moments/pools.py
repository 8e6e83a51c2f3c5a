"""Average pooling and means over positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Moments, Side, plus

Pool = Callable[[Tensor], Tensor]
AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def averaged(x: Moments, pool: Pool, window: int, shape: torch.Size, channels: tuple[int, ...]) -> Moments:
    """The mean of `window` positions: 1 / window of what is at one position, the rest between two."""

    def mix(same: Tensor | None, other: Tensor | None) -> Tensor | None:
        if same is None:
            return None
        return plus(pool(same) / window, None if other is None else pool(other) * (1 - 1 / window))

    def side(s: Side) -> Side:
        raw = mix(s.raw, x.pair(s))
        assert raw is not None
        return Side(raw, pooled(pool, s.mean), pooled(pool, s.pair))

    clean = side(x.clean)
    noisy = side(x.noisy) if x.finite else clean
    return Moments(shape, channels, clean, noisy, pooled(pool, x.cross), mix(x.td, x.to), pooled(pool, x.to))


def pooled(pool: Pool, moment: Tensor | None) -> Tensor | None:
    """A pooled moment; None stays None."""
    return None if moment is None else pool(moment)


@rule(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.adaptive_avg_pool1d)
def adaptive_average_pool(call: Call, x: Moments, output_size: Any) -> Moments:
    """Adaptive average pooling to sizes that divide the map's."""
    window = divided(call, x)
    return averaged(x, _average(call, x, window, window, 0, False), math.prod(window), call.shape, x.channels)


@rule(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.avg_pool1d)
def average_pool(
    call: Call,
    x: Moments,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Moments:
    """Average pooling; windows that overlap are taken as if they did not."""
    dims = len(x.shape) - 2
    window = sizes(kernel_size, dims)
    padded = any(sizes(padding, dims))
    if divisor_override is not None or (padded and count_include_pad):
        raise call.refuse("average pooling that counts padding, or with a divisor of its own, has no moment rule")
    pool = _average(call, x, window, sizes(stride or kernel_size, dims), padding, ceil_mode)
    return averaged(x, pool, math.prod(window), call.shape, x.channels)


@rule(torch.Tensor.mean, torch.mean)
def mean(call: Call, x: Moments, dim: Any = None, keepdim: bool = False, **_: Any) -> Moments:
    """The mean over axes of positions."""
    axes = sorted(axis % len(x.shape) for axis in (range(len(x.shape)) if dim is None else sizes(dim, 1)))
    if set(x.channels) & set(axes):
        raise call.refuse("a mean over channels has no moment rule")
    window = math.prod(x.shape[axis] for axis in axes)
    left = [axis for axis in range(len(x.shape)) if keepdim or axis not in axes]
    channels = tuple(left.index(channel) for channel in x.channels)
    return averaged(x, lambda moment: moment.mean(axes, keepdim=keepdim), window, call.shape, channels)


def _average(call: Call, x: Moments, window: Any, stride: Any, padding: Any, ceil_mode: bool) -> Pool:
    if call.flat:
        return lambda moment: moment
    function = AVERAGE[len(x.shape) - 2]

    def pool(moment: Tensor) -> Tensor:
        return function(moment.expand(x.shape), window, stride, padding, ceil_mode, count_include_pad=False)

    return pool


def divided(call: Call, x: Moments) -> list[int]:
    """Windows of an adaptive pooling."""
    before, after = x.shape[2:], call.shape[2:]
    if x.channels != (1,) or any(b % a for b, a in zip(before, after, strict=True)):
        raise call.refuse(f"adaptive pooling of {tuple(before)} to {tuple(after)} has windows of different sizes")
    return [b // a for b, a in zip(before, after, strict=True)]


def sizes(value: Any, dims: int) -> tuple[int, ...]:
    """One number for every dimension."""
    if isinstance(value, tuple | list):
        return tuple(value) * (dims if len(value) == 1 else 1)
    return (value,) * dims
