"""What is known of one tensor of the network: its moments over fresh weights and Gaussian inputs.

**Shapes.** A tensor of the traced network, for a batch of one, has a *channel* axis (several where the network splits
it, as into heads); all its other axes are *positions* (pixels, tokens, the batch axis of size one). Every moment below
has that tensor's shape, or one that broadcasts to it: the position axes have size one in flat mode, and in moments of
two positions behind a linear layer. `Moments.shape` is always the network's own.

**Two networks.** At a finite epsilon the perturbed network has moments of its own (`noisy`); in the limit of
epsilon to 0 `noisy is clean`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Side:
    """Moments of one network's value a at channel c and position p.

    Attributes:
        raw: E a(p)^2.
        mean: E a(p); None where it is zero.
        pair: E[a(p) a'(p')] of one channel at another sample (or position), averaged over p'; None where it is the
            product of the means, E a(p) times the average of E a over positions.
    """

    raw: Tensor
    mean: Tensor | None = None
    pair: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of one tensor in both networks, and of what the weight perturbation does to it.

    With a the clean and b the perturbed value, D = (b - a) / sqrt(epsilon), in the limit the directional derivative.

    Attributes:
        shape: Shape of the network's tensor for one sample, batch axis included.
        channels: The channel axes, in order.
        clean: The network's own moments.
        noisy: The perturbed network's.
        cross: E[a(p) b'(p')] as `Side.pair`; None where it is the product of the means.
        td: E D(p)^2; None where no weight has been met yet.
        to: E[D(p) D(p')] at another position of the same sample, averaged over p' ("tangent, off-diagonal").
        law: What the tensor is of a Gaussian one, where a rule knows (`sapwood.moments.pools` uses it).
    """

    shape: torch.Size
    channels: tuple[int, ...]
    clean: Side
    noisy: Side
    cross: Tensor | None = None
    td: Tensor | None = None
    to: Tensor | None = None
    law: Law | None = None

    @property
    def finite(self) -> bool:
        """Whether the perturbed network is followed on its own."""
        return self.noisy is not self.clean

    @property
    def positions(self) -> int:
        """Number of positions."""
        return math.prod(n for axis, n in enumerate(self.shape) if axis not in self.channels)

    def average(self, moment: Tensor) -> Tensor:
        """Mean over the positions, which keep size one."""
        axes = [axis for axis in range(moment.dim()) if axis not in self.channels and moment.shape[axis] > 1]
        return moment.mean(axes, keepdim=True) if axes else moment

    def pair(self, side: Side) -> Tensor | None:
        """`side.pair` written out; None where it is zero."""
        return side.pair if side.pair is not None else self.product(side.mean, side.mean)

    def crossed(self) -> Tensor | None:
        """`cross` written out; None where it is zero."""
        return self.cross if self.cross is not None else self.product(self.noisy.mean, self.clean.mean)

    def product(self, one: Tensor | None, other: Tensor | None) -> Tensor | None:
        """A mean times the average over positions of another; None (zero) where either is."""
        return None if one is None or other is None else one * self.average(other)

    def replace(self, **changes: Any) -> Moments:
        """A copy with other fields; `law` is dropped, since the tensor is another one, unless given."""
        return dataclasses.replace(self, **{"law": None, **changes})

    def map(self, function: Callable[[Tensor], Tensor], shape: torch.Size, channels: tuple[int, ...]) -> Moments:
        """Applies a function that only moves or selects entries to every moment."""

        def each(moment: Tensor | None) -> Tensor | None:
            return None if moment is None else function(moment)

        def side(s: Side) -> Side:
            return Side(function(s.raw), each(s.mean), each(s.pair))

        clean = side(self.clean)
        noisy = side(self.noisy) if self.finite else clean
        return Moments(shape, channels, clean, noisy, each(self.cross), each(self.td), each(self.to))


@dataclass(frozen=True, eq=False)
class Law:
    """A tensor as a monotone function of a Gaussian one.

    Attributes:
        gaussian: The Gaussian tensor.
        activation: The function (`sapwood.moments.gates.Activation`).
    """

    gaussian: Moments
    activation: Any


@dataclass(frozen=True, eq=False)
class Weight:
    """A layer weight under fresh draws, w = m * theta with theta ~ N(0, variance).

    Attributes:
        name: The parameter's name.
        v: Variance of the effective weight, variance * m^2, in the weight's shape; differentiable in m.
        per_variance: 1 / variance for a weight that is perturbed, 0 for one that is not (excluded from pruning).
        growth: epsilon / variance for a perturbed weight at finite epsilon, else 0: E(w + dw)^2 = v (1 + growth).
    """

    name: str
    v: Tensor
    per_variance: float
    growth: float


def plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Sum of two moments, where None is zero."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def times(moment: Tensor | None, factor: Tensor | float) -> Tensor | None:
    """A moment times a factor, where None is zero."""
    return None if moment is None else moment * factor
