"""Convolutions: a linear layer at every position, whose taps may lie outside the map.

Moments of two places are kept as E[x(p) x'(p')] averaged over p'. Their profiles over the map are much alike in all
channels, so they are taken as level(channel) profile(p) profile(p') and summed tap by tap: a tap sees a shifted view of
the profile, of which p needs the map and p' the mean. That costs a convolution of one channel instead of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.gates import TINY
from sapwood.moments.layers import contracted
from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Moments, Weight
from sapwood.moments.sums import shifted

CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@rule(*CONVOLVE.values())
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
    function = CONVOLVE[dims]
    if call.flat:
        summed = weight.v.flatten(2).sum(2).reshape(*weight.v.shape[:2], *[1] * dims)

        def everywhere(moment: Tensor) -> Tensor:
            return function(moment, summed, groups=groups)

        out = contracted(x, weight, everywhere, (everywhere, everywhere), call, 1)
    else:
        taps = torch.eye(weight.v[0, 0].numel()).to(weight.v).reshape(-1, 1, *weight.v.shape[2:])

        def contract(moment: Tensor) -> Tensor:
            return function(moment, weight.v, None, stride, padding, dilation, groups)

        def between(moment: Tensor, *, same: bool = False) -> Tensor:
            level, profile = _factored(moment.expand(-1, *x.shape[1:]))
            seen = function(profile, taps, None, stride, padding, dilation).flatten(2)
            return _by_tap(weight.v, groups, level, seen, same=same).reshape(-1, *call.shape[1:])

        out = contracted(x, weight, contract, (between, lambda moment: between(moment, same=True)), call, 1)
    return out if bias is None else shifted(out, bias.reshape(-1, *[1] * dims))


def _factored(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Level of every channel, (batch, channels), and the common profile, (batch, 1, *positions), of mean one."""
    level = moment.flatten(2).mean(2)
    weights = level / level.square().sum(1, keepdim=True).clamp_min(TINY)  # least squares
    return level, (weights[:, None] @ moment.flatten(2)).reshape(len(moment), 1, *moment.shape[2:])


def _by_tap(v: Tensor, groups: int, level: Tensor, seen: Tensor, *, same: bool) -> Tensor:
    """Sums over channels and taps.

    Args:
        v: Variances, (outputs, inputs of a group, *taps).
        groups: Groups of channels.
        level: (batch, inputs).
        seen: What every tap sees of the profile: (batch, taps, positions).
        same: Whether both places are in one sample, so that they differ.
    """
    there, count = seen.mean(2), seen.shape[2]
    if same:
        there = ((there * count - 1) / max(count - 1, 1)).clamp_min(0)
    grouped = v.reshape(groups, -1, v.shape[1], math.prod(v.shape[2:]))
    summed = torch.einsum("goit,bgi->bgot", grouped, level.reshape(len(level), groups, -1)).flatten(1, 2)
    return (summed * there[:, None]) @ seen
