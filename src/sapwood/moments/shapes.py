"""Operations that only move, select or rename entries, and those that do nothing in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.registry import RULES, Call, rule
from sapwood.moments.state import Moments


def moved(call: Call, x: Moments, function: Any, number: int = 0) -> Moments:
    """Applies a function that moves entries to all moments, and finds where the channel axis has gone."""

    def full(moment: Tensor) -> Tensor:
        out: Tensor = function(moment.expand(x.shape))
        return out

    return x.map(full, call.shapes[number], channels_after(x, function))


def channels_after(x: Moments, function: Any) -> tuple[int, ...]:
    """The axes along which the channel's number varies after the operation."""
    axes = set()
    for channel in x.channels:
        size = [n if axis == channel else 1 for axis, n in enumerate(x.shape)]
        after = function(torch.arange(x.shape[channel]).reshape(size).expand(x.shape))
        axes |= {a for a in range(after.dim()) if after.shape[a] > 1 and bool((after.diff(dim=a) != 0).any())}
    return tuple(sorted(axes)) or (min(x.channels[0], after.dim() - 1),)


def _moving(method: Any) -> None:
    def apply(call: Call, x: Moments, *args: Any, **kwargs: Any) -> Any:
        if len(call.shapes) == 1:
            return moved(call, x, lambda tensor: method(tensor, *args, **kwargs))
        parts = range(len(call.shapes))
        return tuple(moved(call, x, lambda tensor, n=n: method(tensor, *args, **kwargs)[n], n) for n in parts)

    RULES[method] = apply


for _method in (
    torch.flatten, torch.Tensor.flatten, torch.Tensor.view, torch.Tensor.reshape, torch.reshape,
    torch.Tensor.transpose, torch.transpose, torch.Tensor.permute, torch.permute, torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
    torch.Tensor.swapaxes, torch.movedim, torch.Tensor.movedim, torch.Tensor.unflatten, torch.unflatten,
    torch.Tensor.squeeze, torch.squeeze, torch.Tensor.unsqueeze, torch.unsqueeze, torch.Tensor.expand,
    torch.Tensor.__getitem__, torch.Tensor.narrow, torch.narrow, torch.Tensor.select, torch.select,
    torch.chunk, torch.Tensor.chunk, torch.split, torch.Tensor.split, torch.unbind, torch.Tensor.unbind,
):  # fmt: skip
    _moving(_method)


@rule(
    F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.Tensor.contiguous, torch.Tensor.clone, torch.clone, torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as,
)  # fmt: skip
def unchanged(call: Call, x: Moments, *args: Any, **kwargs: Any) -> Moments:
    """Dropout in eval mode, copies and casts."""
    return x
