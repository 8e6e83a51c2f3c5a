"""What pools stand for where paths are counted: all of their inputs, averaged or summed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _average(pool: Callable[..., Tensor], average: Callable[..., Tensor]) -> Callable[..., Any]:
    """Max pooling passes one input of every window, by an accident of values; its average passes all of them."""

    def pooled(
        input: Tensor,
        size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        **_: Any,
    ) -> Tensor:
        if dilation not in (1, (1,), (1, 1), (1, 1, 1)):  # for which there is no average
            return pool(input, size, stride, padding, dilation, ceil_mode)
        return average(input, size, stride, padding, ceil_mode)

    return pooled


AVERAGES: dict[Any, Callable[..., Any]] = {
    F.max_pool1d: _average(F.max_pool1d, F.avg_pool1d),
    F.max_pool2d: _average(F.max_pool2d, F.avg_pool2d),
    F.max_pool3d: _average(F.max_pool3d, F.avg_pool3d),
    F.adaptive_max_pool1d: lambda input, size, *_, **__: F.adaptive_avg_pool1d(input, size),
    F.adaptive_max_pool2d: lambda input, size, *_, **__: F.adaptive_avg_pool2d(input, size),
    F.adaptive_max_pool3d: lambda input, size, *_, **__: F.adaptive_avg_pool3d(input, size),
    torch.amax: torch.mean,
    Tensor.amax: Tensor.mean,
}
"""Pools that pass an average of all inputs."""


def _pool(average: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    def summed(
        input: Tensor, size: Any, stride: Any = None, padding: Any = 0, *args: Any, ceil_mode: bool = False, **_: Any
    ) -> Tensor:
        window = math.prod([size] * dims if isinstance(size, int) else size)
        pooled: Tensor = average(input, size, stride or size, padding, ceil_mode, True)
        return pooled * window

    return summed


def _adaptive(average: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    def summed(input: Tensor, size: Any, *_: Any, **__: Any) -> Tensor:
        pooled: Tensor = average(input, size)
        return pooled * (math.prod(input.shape[-dims:]) / math.prod(pooled.shape[-dims:]))

    return summed


def _sum(input: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return input.sum() if dim is None else input.sum(dim, keepdim=keepdim)


SUMS: dict[Any, Callable[..., Any]] = {
    F.avg_pool1d: _pool(F.avg_pool1d, 1), F.max_pool1d: _pool(F.avg_pool1d, 1),
    F.avg_pool2d: _pool(F.avg_pool2d, 2), F.max_pool2d: _pool(F.avg_pool2d, 2),
    F.avg_pool3d: _pool(F.avg_pool3d, 3), F.max_pool3d: _pool(F.avg_pool3d, 3),
    F.adaptive_avg_pool1d: _adaptive(F.adaptive_avg_pool1d, 1),
    F.adaptive_max_pool1d: _adaptive(F.adaptive_avg_pool1d, 1),
    F.adaptive_avg_pool2d: _adaptive(F.adaptive_avg_pool2d, 2),
    F.adaptive_max_pool2d: _adaptive(F.adaptive_avg_pool2d, 2),
    F.adaptive_avg_pool3d: _adaptive(F.adaptive_avg_pool3d, 3),
    F.adaptive_max_pool3d: _adaptive(F.adaptive_avg_pool3d, 3),
    **dict.fromkeys((torch.mean, Tensor.mean, torch.amax, Tensor.amax), _sum),
}  # fmt: skip
"""Pools that pass the sum of all inputs, so that every path through them is counted."""
