"""ReLU and leaky ReLU of Gaussian pre-activations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Law, Moments, Side, times

TINY = 1e-30


@rule(F.relu, torch.relu, torch.Tensor.relu, torch.relu_, torch.Tensor.relu_)
def relu(call: Call, x: Moments, inplace: bool = False) -> Moments:
    """max(u, 0), for Gaussian u; a unit without inputs gives zero."""
    return rectified(call, x)


def rectified(call: Call, x: Moments) -> Moments:
    if x.clean.mean is None:
        out = _centred(call, x)
    else:
        out = _shifted(call, x)
    return out.replace(law=Law(x, 0.0))


def _centred(call: Call, x: Moments) -> Moments:
    """Of zero-mean Gaussians: half of everything passes."""
    clean = _half(x, x.clean)
    if x.finite:
        noisy = _half(x, x.noisy)
        td = None if x.td is None else Changed.apply(x.clean.raw, x.noisy.raw, call.epsilon * x.td) / call.epsilon
        cross = None if x.cross is None else _kernel(x, x.noisy.raw, x.clean.raw, x.cross)
    else:
        noisy, td, cross = clean, times(x.td, 0.5), None
    to = times(x.to, 0.25 if x.clean.pair is None else _both_open(x, x.clean))
    return x.replace(clean=clean, noisy=noisy, cross=cross, td=td, to=to)


def _half(x: Moments, s: Side) -> Side:
    mean = (s.raw.clamp_min(TINY) / (2 * math.pi)).sqrt()
    return Side(s.raw / 2, mean, None if s.pair is None else _kernel(x, s.raw, s.raw, s.pair))


def _kernel(x: Moments, raw: Tensor, other: Tensor, pair: Tensor) -> Tensor:
    """E[relu(u) relu(u')] for zero-mean Gaussians with covariance `pair`."""
    one, two, covariance = torch.broadcast_tensors(raw, x.average(other), pair)
    return Rectified.apply(one, two, covariance)


def _both_open(x: Moments, s: Side) -> Tensor:
    assert s.pair is not None
    return 0.25 + torch.asin((s.pair / (s.raw * x.average(s.raw)).clamp_min(TINY).sqrt()).clamp(-1, 1)) / (2 * math.pi)


def _shifted(call: Call, x: Moments) -> Moments:
    """Of Gaussians with a mean, as after a residual sum."""
    if x.clean.pair is not None:
        raise call.refuse("a ReLU of correlated pre-activations with a mean has no moment rule yet")
    clean, gate = _gated(x.clean)
    noisy = _gated(x.noisy)[0] if x.finite else clean
    return x.replace(clean=clean, noisy=noisy, td=times(x.td, gate), to=times(x.to, gate * x.average(gate)))


def _gated(s: Side) -> tuple[Side, Tensor]:
    assert s.mean is not None
    deviation = (s.raw - s.mean.square()).clamp_min(TINY).sqrt()
    ratio = s.mean / deviation
    gate = torch.special.ndtr(ratio)
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    mean = s.mean * gate + deviation * density
    return Side(s.raw * gate + s.mean * deviation * density, mean), gate


class Rectified(torch.autograd.Function):
    """E[relu(u) relu(u')] of zero-mean Gaussians with variances q, q' and covariance c (Cho & Saul 2009).

    (S + (pi - t) c) / 2 pi with S = sqrt(q q' - c^2) and t the angle of (c, S). Its derivatives are S / (4 pi q),
    S / (4 pi q') and (pi - t) / 2 pi, which stay finite where autograd's would not.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, other: Tensor, c: Tensor) -> Tensor:
        """Same-shaped tensors."""
        s = (q * other - c.square()).clamp_min(0).sqrt()
        open_angle = math.pi - torch.atan2(s, c)
        ctx.save_for_backward(q, other, s, open_angle)
        return (s + open_angle * c) / (2 * math.pi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The closed derivatives."""
        q, other, s, open_angle = ctx.saved_tensors
        half = grad * s / (4 * math.pi)
        return half / q.clamp_min(TINY), half / other.clamp_min(TINY), grad * open_angle / (2 * math.pi)


class Changed(torch.autograd.Function):
    """E(relu(b) - relu(a))^2 of zero-mean Gaussians with variances q, q2 and E(b - a)^2 = d.

    q/2 + q2/2 - 2 E[relu(a) relu(b)], written as d/2 - (S - t c) / pi, which does not cancel for small d.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, q2: Tensor, d: Tensor) -> Tensor:
        """Same-shaped tensors."""
        c = (q + q2 - d) / 2
        s = (2 * d * (q + q2) - (q - q2).square() - d.square()).clamp_min(0).sqrt() / 2
        t = torch.atan2(s, c)
        ctx.save_for_backward(q, q2, s, t)
        return d / 2 - (s - t * c) / math.pi

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The closed derivatives."""
        q, q2, s, t = ctx.saved_tensors
        grad = grad / (2 * math.pi)
        return grad * (t - s / q.clamp_min(TINY)), grad * (t - s / q2.clamp_min(TINY)), grad * (math.pi - t)
