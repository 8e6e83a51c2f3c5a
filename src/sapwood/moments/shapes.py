"""Operations that only move, select or rename entries, and those that do nothing in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.registry import RULES, Call, rule
from sapwood.moments.state import Moments


def moved(call: Call, x: Moments, function: Any) -> Moments:
    """Applies a function that moves entries to all moments, and finds where the channel axis has gone."""
    channel = _channel_after(call, x, function)

    def full(moment: Tensor) -> Tensor:
        return function(moment.expand(x.shape))

    return x.map(full, call.shape, channel)


def _channel_after(call: Call, x: Moments, function: Any) -> int:
    """The axis along which the channel's number varies after the operation."""
    size = x.shape[x.channel]
    marks = torch.arange(size).reshape([size if axis == x.channel else 1 for axis in range(len(x.shape))])
    after = function(marks.expand(x.shape))
    axes = [a for a in range(after.dim()) if after.shape[a] > 1 and bool((after.diff(dim=a) != 0).any())]
    if len(axes) > 1:
        raise call.refuse("it splits the channels over several axes, which no moment rule covers")
    return axes[0] if axes else min(x.channel, after.dim() - 1)


def _moving(method: Any) -> None:
    def apply(call: Call, x: Moments, *args: Any, **kwargs: Any) -> Moments:
        return moved(call, x, lambda tensor: method(tensor, *args, **kwargs))

    RULES[method] = apply


for _method in (
    torch.flatten, torch.Tensor.flatten, torch.Tensor.view, torch.Tensor.reshape, torch.reshape,
    torch.Tensor.transpose, torch.transpose, torch.Tensor.permute, torch.permute,
    torch.Tensor.squeeze, torch.squeeze, torch.Tensor.unsqueeze, torch.unsqueeze,
):  # fmt: skip
    _moving(_method)


@rule(F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.Tensor.contiguous,
      torch.Tensor.clone, torch.clone, torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as)  # fmt: skip
def unchanged(call: Call, x: Moments, *args: Any, **kwargs: Any) -> Moments:
    """Dropout in eval mode, and copies."""
    return x
