"""Normalisation with statistics that are constants for the mask gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Moments, Side, times
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


def affine(x: Moments, weight: Tensor | None, bias: Tensor | None, axis: int) -> Moments:
    """The learnt scale and shift along an axis, where they are not one and zero."""
    trailing = [1] * (len(x.shape) - axis - 1)
    if weight is not None and not bool((weight == 1).all()):
        x = scaled(x, weight.reshape(-1, *trailing))
    return x if bias is None else shifted(x, bias.reshape(-1, *trailing))
