"""Average pooling and means over positions; maximum pooling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Moments, Side, plus, times


def averaged(x: Moments, pool: Callable[[Tensor], Tensor], window: int, shape: torch.Size, channel: int) -> Moments:
    """The mean of `window` positions: 1 / window of what is at one position, the rest between two."""

    def mix(same: Tensor | None, other: Tensor | None) -> Tensor | None:
        if same is None:
            return None
        here = times(pool(same), 1 / window)
        return plus(here, None if other is None else pool(other) * (1 - 1 / window))

    def side(s: Side) -> Side:
        raw = mix(s.raw, x.pair(s))
        assert raw is not None
        return Side(raw, _pooled(pool, s.mean), _pooled(pool, s.pair))

    clean = side(x.clean)
    noisy = side(x.noisy) if x.finite else clean
    return Moments(shape, channel, clean, noisy, _pooled(pool, x.cross), mix(x.td, x.to), _pooled(pool, x.to))


def _pooled(pool: Callable[[Tensor], Tensor], moment: Tensor | None) -> Tensor | None:
    return None if moment is None else pool(moment)


@rule(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.adaptive_avg_pool1d)
def adaptive_average_pool(call: Call, x: Moments, output_size: Any) -> Moments:
    """Adaptive average pooling to sizes that divide the map's."""
    before, after = x.shape[2:], call.shape[2:]
    if any(b % a for b, a in zip(before, after, strict=True)):
        raise call.refuse(f"average pooling of {tuple(before)} to {tuple(after)} has windows of different sizes")
    window = [b // a for b, a in zip(before, after, strict=True)]
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(window)]

    def pool(moment: Tensor) -> Tensor:
        return moment if call.flat else function(moment.expand(*moment.shape[:2], *before), window, window)

    return averaged(x, pool, math.prod(window), call.shape, 1)
