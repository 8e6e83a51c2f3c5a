"""ReLU, leaky ReLU and clipped ReLUs, in closed form.

A leaky ReLU with slope s is s u + (1 - s) relu(u); of zero-mean Gaussians every pair quantity of it is therefore
s times that of u plus (1 - s)^2 times that of relu(u).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.gates import TINY, Passed, drifted, passed, root
from sapwood.moments.registry import Call, rule
from sapwood.moments.state import Law, Moments, Side, times


@dataclass(frozen=True)
class Leaky:
    """u where u > 0, else `negative` times u; 0 is ReLU, whose slope at 0 is 0 as PyTorch's."""

    negative: float = 0.0

    def moments(self, mean: Tensor | None, deviation: Tensor) -> Passed:
        """See `Activation`."""
        s, part, raw = self.negative, rectified(mean, deviation), deviation.square()
        if mean is not None:
            raw = raw + mean.square()
        first = (1 - s) * part.mean
        return Passed(
            first if mean is None else first + s * mean,
            s * s * raw + (1 - s * s) * part.raw,
            s + (1 - s) * part.slope,
            s * s + (1 - s * s) * part.slope,
        )

    def value(self, u: Tensor) -> Tensor:
        """See `Activation`."""
        return F.leaky_relu(u, self.negative)

    def slope(self, u: Tensor) -> Tensor:
        """See `Activation`."""
        return torch.where(u > 0, 1.0, self.negative).to(u.dtype)


@dataclass(frozen=True)
class Clipped:
    """u held between two limits, as ReLU6 and Hardtanh do it."""

    low: float
    high: float

    def moments(self, mean: Tensor | None, deviation: Tensor) -> Passed:
        """As low + relu(u - low) - relu(u - high); above `high` the square is (high - low)^2."""
        mean = torch.zeros_like(deviation) if mean is None else mean
        above, over = rectified(mean - self.low, deviation), rectified(mean - self.high, deviation)
        gate, first = above.slope - over.slope, above.mean - over.mean
        square = above.raw - over.raw - 2 * (self.high - self.low) * over.mean
        raw = self.low * self.low + 2 * self.low * first + square
        return Passed(self.low + first, raw, gate, gate)

    def value(self, u: Tensor) -> Tensor:
        """See `Activation`."""
        return u.clamp(self.low, self.high)

    def slope(self, u: Tensor) -> Tensor:
        """See `Activation`."""
        return ((u > self.low) & (u < self.high)).to(u.dtype)


def rectified(mean: Tensor | None, deviation: Tensor) -> Passed:
    """The four numbers of ReLU."""
    if mean is None:
        half = torch.full_like(deviation, 0.5)
        return Passed(deviation / math.sqrt(2 * math.pi), deviation.square() / 2, half, half)
    ratio = mean / deviation
    gate = torch.special.ndtr(ratio)
    density = deviation * torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    first = mean * gate + density
    return Passed(first, (mean.square() + deviation.square()) * gate + mean * density, gate, gate)


@rule(F.relu, torch.relu, torch.Tensor.relu, torch.relu_, torch.Tensor.relu_)
def relu(call: Call, x: Moments, inplace: bool = False) -> Moments:
    """max(u, 0)."""
    return _leaky(call, x, Leaky())


@rule(F.leaky_relu, F.leaky_relu_)
def leaky(call: Call, x: Moments, negative_slope: float = 0.01, inplace: bool = False) -> Moments:
    """Leaky ReLU; of zero-mean Gaussians without quadrature, and exact at finite epsilon."""
    return _leaky(call, x, Leaky(negative_slope))


def _leaky(call: Call, x: Moments, activation: Leaky) -> Moments:
    return passed(call, x, activation) if x.clean.mean is not None else _centred(call, x, activation)


@rule(F.prelu, torch.prelu)
def prelu(call: Call, x: Moments, weight: Tensor) -> Moments:
    """Leaky ReLU with a learnt slope, which keeps its value; one for all channels."""
    if weight.numel() > 1 and bool((weight != weight.flatten()[0]).any()):
        raise call.refuse("PReLU with different slopes has no moment rule")
    return _leaky(call, x, Leaky(float(weight.flatten()[0])))


@rule(F.relu6)
def relu6(call: Call, x: Moments, inplace: bool = False) -> Moments:
    """Holds u between 0 and 6."""
    return passed(call, x, Clipped(0.0, 6.0))


@rule(F.hardtanh, F.hardtanh_, torch.clamp, torch.Tensor.clamp)
def hardtanh(
    call: Call, x: Moments, min: float = -1.0, max: float = 1.0, inplace: bool = False, **limits: float
) -> Moments:
    """Holds u between two limits."""
    low, high = limits.get("min_val", min), limits.get("max_val", max)
    return passed(call, x, Clipped(-math.inf if low is None else low, math.inf if high is None else high))


def _centred(call: Call, x: Moments, activation: Leaky) -> Moments:
    s = activation.negative

    def mixed(of_u: Tensor, of_relu: Tensor) -> Tensor:
        return s * of_u + (1 - s) ** 2 * of_relu if s else of_relu

    def side(one: Side) -> Side:
        there = activation.moments(None, root(one.raw))
        pair = None if one.pair is None else mixed(one.pair, _kernel(x, one.raw, one.raw, one.pair))
        return Side(there.raw, there.mean, pair)

    clean = side(x.clean)
    both = mixed(torch.ones_like(x.clean.raw), _both_open(x, x.clean))
    law = Law(x, activation)
    if not x.finite:
        td = times(x.td, (1 + s * s) / 2)
        return x.replace(clean=clean, noisy=clean, td=td, to=times(x.to, both), law=law)
    td, cross, noisy = x.td, x.cross, side(x.noisy)
    if td is not None:
        one, other, change = torch.broadcast_tensors(x.clean.raw, x.noisy.raw, call.epsilon * td)
        td = mixed(td, Changed.apply(one, other, change) / call.epsilon)
    if cross is not None:
        cross = mixed(cross, _kernel(x, x.noisy.raw, x.clean.raw, cross))
    to = drifted(call, x, both, clean, noisy)
    return x.replace(clean=clean, noisy=noisy, cross=cross, td=td, to=to, law=law)


def _kernel(x: Moments, raw: Tensor, other: Tensor, pair: Tensor) -> Tensor:
    """E[relu(u) relu(u')] for zero-mean Gaussians with covariance `pair`."""
    one, two, covariance = torch.broadcast_tensors(raw, x.average(other), pair)
    kernel: Tensor = Rectified.apply(one, two, covariance)
    return kernel


def _both_open(x: Moments, side: Side) -> Tensor:
    """P(u > 0 and u' > 0) of zero-mean Gaussians."""
    if side.pair is None:
        return torch.full_like(side.raw, 0.25)
    correlation = side.pair / root(side.raw * x.average(side.raw))
    return 0.25 + torch.asin(correlation.clamp(-1 + 1e-6, 1 - 1e-6)) / (2 * math.pi)


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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """The closed derivatives."""
        q, q2, s, t = ctx.saved_tensors
        grad = grad / (2 * math.pi)
        return grad * (t - s / q.clamp_min(TINY)), grad * (t - s / q2.clamp_min(TINY)), grad * (math.pi - t)
