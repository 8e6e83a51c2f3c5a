"""The expected mean and variance of one sample's entries, and what is left when they are normalised away."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sapwood.moments.state import Moments, Side, times


class Group:
    """Entries that are normalised together: channels of a group, at one position or over all.

    Args:
        x: The tensor.
        everywhere: Over all positions (GroupNorm), or each position for itself (LayerNorm).
        groups: Number of groups of channels, along the first channel axis.
        centred: Whether the mean is taken off.
    """

    def __init__(self, x: Moments, everywhere: bool, groups: int, centred: bool = True) -> None:
        self.x, self.everywhere, self.groups, self.centred = x, everywhere, groups, centred
        self.width = math.prod(x.shape[axis] for axis in x.channels) // groups
        self.places = x.positions if everywhere else 1
        self.entries = self.width * self.places

    def normalised(self, epsilon: float, eps: float) -> Moments:
        """Centred and divided by the expected deviation, each network by its own."""
        x = self.x
        clean, scale = self._side(x.clean, eps)
        noisy, other = self._side(x.noisy, eps) if x.finite else (clean, scale)
        td, to, cross = x.td, x.to, x.cross
        if td is not None:
            td, to = self._change(td, torch.zeros_like(td) if to is None else to)
            shrink = clean.raw / self.entries
            td = (td - 2 * shrink * td + shrink * self._mean(td)) / (scale * other)
            to = to / (scale * other)
        if x.finite:
            crossed = x.crossed()
            if crossed is not None:
                mean, twin = x.clean.mean, x.noisy.mean
                typical = None if mean is None or twin is None else (mean + twin) / 2
                cross = self._centre(crossed, crossed, typical)[1] / (scale * other)
            if td is not None:
                td = td + (1 / scale - 1 / other) * (clean.raw * scale - noisy.raw * other) / epsilon
        return x.replace(clean=clean, noisy=noisy, cross=cross, td=td, to=to)

    def _side(self, side: Side, eps: float) -> tuple[Side, Tensor]:
        pair = self.x.pair(side)
        raw, between, mean = side.raw, pair, side.mean
        if self.centred:
            raw, between = self._centre(side.raw, torch.zeros_like(side.raw) if pair is None else pair, side.mean)
            mean = None if mean is None else mean - self._mean(mean)
        scale = (self._mean(raw) + eps).sqrt()
        written = between is not None and (side.pair is not None or self.centred)
        pair = between / scale.square() if written and between is not None else None
        return Side(raw / scale.square(), times(mean, 1 / scale), pair), scale

    def _change(self, td: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
        return self._centre(td, to, None) if self.centred else (td, to)

    def _centre(self, raw: Tensor, pair: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """E (z - m)^2 and E (z - m)(z' - m') with m the mean of z's group.

        Entries of different channels are independent but for their means; those of one channel at different positions
        have `pair`.
        """
        share = 1 / self.places
        whole = pair * (1 - share) + raw * share if self.everywhere else raw  # E z(p) and its channel's own mean
        typical = self._places(torch.zeros_like(raw) if mean is None else mean)
        total = self._mean(typical)

        def parts(own: Tensor) -> tuple[Tensor, Tensor]:
            """E z m, and E m^2, where E z z' of one channel is `own`."""
            here = torch.zeros_like(raw) if mean is None else mean
            with_mean = own / self.width + here * (total - typical / self.width)
            square = total.square() + self._mean(self._places(own) - typical.square()) / self.width
            return with_mean, square

        z_m, m_m = parts(whole)
        other_z, other_m = (z_m, m_m) if self.everywhere else parts(pair)
        return (raw - 2 * z_m + m_m).clamp_min(0), pair - 2 * other_z + other_m

    def _places(self, moment: Tensor) -> Tensor:
        return self.x.average(moment) if self.everywhere else moment

    def _mean(self, moment: Tensor) -> Tensor:
        """The mean over the group's channels (and positions), spread over them."""
        moment = self._places(moment)
        axes, first = self.x.channels, self.x.channels[0]
        if self.groups == 1:
            return moment.mean(axes, keepdim=True)
        shape = moment.shape
        split = moment.reshape(*shape[:first], self.groups, -1, *shape[first + 1 :])
        return split.mean(first + 1, keepdim=True).expand_as(split).reshape(shape)
