"""Moments of a softmax over independent Gaussian logits, and of what it does to a perturbation.

With logits l_j ~ N(0, s2) over N keys, w_j = exp(l_j) and p_j = w_j / sum w, every moment is an integral over one
variable, since 1 / W^a = (integral of t^(a-1) exp(-t W)) / Gamma(a):

    E sum p^a = N / Gamma(a) integral t^(a-1) M_a(t) M_0(t)^(N-1) dt,      M_a(t) = E w^a exp(-t w).

No limit is taken: s2 = 0 gives uniform attention (E sum p^2 = 1 / N), large s2 one key (1).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    """What a softmax does, each of the shape of the variances that it was given.

    Attributes:
        focus: E sum_j p_j^2, between 1 / N and 1.
        response: E sum_j (dp_j)^2 over the variance of the logits' (independent) changes.
    """

    focus: Tensor
    response: Tensor


def softmax_moments(variance: Tensor, keys: int) -> Attention:
    """Over `keys` logits of some variances."""
    square = variance.double().flatten()
    if keys == 1:
        one = torch.ones_like(variance)
        return Attention(one, torch.zeros_like(variance))
    deviation = square.clamp_min(1e-12).sqrt()[:, None, None]
    y = torch.linspace(-7, 7, 113, dtype=torch.float64, device=variance.device)
    density = torch.exp(-0.5 * y.square())
    density = density / density.sum()
    w = torch.exp(deviation * y)  # (variances, 1, nodes)
    log_t = torch.linspace(-14.0, 14.0, 141, dtype=torch.float64, device=variance.device)
    reach = 1 + deviation[:, 0] / 3
    log_t = log_t * reach + (2 - math.log(keys) - square[:, None] / 2)  # around 1 / E W, wide enough for few keys
    t = log_t.exp()[..., None]
    step = (log_t[:, 1] - log_t[:, 0])[:, None]
    decay = torch.exp(-t * w) * density

    def moment(power: int) -> Tensor:
        return (decay * w**power).sum(2)  # M_power(t): (variances, t)

    t = t[..., 0]
    others = moment(0)
    rest = keys * t * step * others ** (keys - 1)
    second = (moment(2) * rest * t).sum(1)
    third = (moment(3) * rest * t.square()).sum(1) / 2
    pairs = keys * (keys - 1) * step * moment(2).square() * others ** (keys - 2) * t.pow(4) / 6
    fourth = (moment(4) * rest * t.pow(3)).sum(1) / 6
    response = second - 2 * third + fourth + pairs.sum(1)
    return Attention(*(part.reshape(variance.shape).to(variance.dtype) for part in (second, response.clamp_min(0))))
