"""Normalisation: BatchNorm by frozen statistics; LayerNorm, GroupNorm, InstanceNorm and RMSNorm by expected ones.

BatchNorm's statistics are constants for the mask gradient, as the published procedure has them, and those of the clean
network for both. The others belong to one sample, so each network has its own and the mask gradient passes through
them. Over n entries a sample's variance differs from its expectation by a relative sqrt(2 / n) at most, so it is
replaced by the expectation; what is left out is of relative order 1 / n, except for the part of D that the
normalisation removes (the direction of the mean and of the sample itself), which is kept.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Moments, Side, times
from sapwood.moments.statistics import Group
from sapwood.moments.sums import scaled, shifted


@rule(F.batch_norm)
def batch_norm(  # noqa: PLR0913  # torch's own signature
    call: Call,
    x: Moments,
    running_mean: Any,
    running_var: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Moments:
    """BatchNorm on the statistics of its own fresh-weight batch, frozen, in both networks the clean one's.

    The variance of a channel is the average of E z^2 less the second moment between two samples, which is that of the
    channel's mean. As the mean is a constant, the gradient of E (z - mean)^2 is that of E z^2 less the pair moment.
    """
    if x.channels != (1,):
        raise call.refuse("BatchNorm over anything but (batch, channels, positions) has no moment rule")
    pair = x.pair(x.clean)
    square = None if pair is None else x.average(pair).detach()
    variance = x.average(x.clean.raw).detach()
    variance = (variance if square is None else variance - square).clamp_min(0) + eps

    def centred(raw: Tensor, with_mean: Tensor | None) -> Tensor:
        if with_mean is None or square is None:
            return raw / variance
        return (raw - with_mean + (square - with_mean).detach()).clamp_min(0) / variance

    clean = Side(centred(x.clean.raw, pair))
    noisy = Side(centred(x.noisy.raw, x.crossed())) if x.finite else clean
    out = x.replace(clean=clean, noisy=noisy, cross=None, td=times(x.td, 1 / variance), to=times(x.to, 1 / variance))
    return affine(out, weight, bias, 1)


@rule(F.layer_norm)
def layer_norm(
    call: Call, x: Moments, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Moments:
    """LayerNorm over the channels, or over channels and all positions."""
    return _trailing(Group(x, _over_positions(call, x, shape), 1).normalised(call.epsilon, eps), weight, bias)


@rule(F.rms_norm)
def rms_norm(call: Call, x: Moments, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Moments:
    """RMSNorm over the channels, or over channels and all positions: a scale, no mean."""
    group = Group(x, _over_positions(call, x, shape), 1, centred=False)
    return _trailing(group.normalised(call.epsilon, 1.2e-7 if eps is None else eps), weight, None)


@rule(F.group_norm)
def group_norm(
    call: Call, x: Moments, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Moments:
    """GroupNorm over the channels of a group and all positions."""
    if x.channels != (1,):
        raise call.refuse("GroupNorm over anything but (batch, channels, positions) has no moment rule")
    return affine(Group(x, True, groups).normalised(call.epsilon, eps), weight, bias, 1)


@rule(F.instance_norm)
def instance_norm(  # noqa: PLR0913  # torch's own signature
    call: Call,
    x: Moments,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Moments:
    """InstanceNorm, a GroupNorm with one channel a group; with running statistics it is refused."""
    if not use_input_stats:
        raise call.refuse("InstanceNorm with running statistics has no moment rule")
    return group_norm(call, x, x.shape[1], weight, bias, eps)


def _over_positions(call: Call, x: Moments, shape: Any) -> bool:
    """Whether a LayerNorm of `shape` takes all positions in, or the channels only."""
    axes = set(range(len(x.shape) - len(shape), len(x.shape)))
    if axes == set(x.channels):
        return False
    if set(x.channels) <= axes and all(n == 1 for axis, n in enumerate(x.shape) if axis not in axes):
        return True
    raise call.refuse("LayerNorm over part of the positions has no moment rule")


def _trailing(x: Moments, weight: Tensor | None, bias: Tensor | None) -> Moments:
    if weight is not None and not bool((weight == 1).all()):
        x = scaled(x, weight)
    return x if bias is None else shifted(x, bias)


def affine(x: Moments, weight: Tensor | None, bias: Tensor | None, axis: int) -> Moments:
    """The learnt scale and shift along an axis, where they are not one and zero."""
    trailing = [1] * (len(x.shape) - axis - 1)
    if weight is not None:
        weight = weight.reshape(-1, *trailing)
    return _trailing(x, weight, None if bias is None else bias.reshape(-1, *trailing))
