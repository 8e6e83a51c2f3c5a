"""What is known of a tensor while a network is run as a positive flow: the flow itself, and how it grows with it.

A `Value` goes with every tensor that depends on the input. Its `probe` answers, by running the network's own
operations, what the tensor would be if the flow that it comes from were t everywhere; how it behaves from t to 2t tells
what it is without any list of names:

* it grows like t: a flow (rectifiers on the positive side, sums, views);
* it does not grow: a gate, which opens (sigmoid, erf), or a normaliser, which falls (1/std, rsqrt, 1/norm);
* it grows like t^2, t^3: a product of flows;
* it comes and goes (sin), or falls, or vanishes: no part of a positive flow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Probe = Callable[[float], Tensor]

LARGE = (2.0**40, 100.0)  # the second where the first leaves float64, as exp does
STEPS = (1.0, 1.25, 1.5, 2.0, 2.5)
DOUBLE = STEPS.index(2.0)
SMALL = 2.0**-30
NEAR = 0.01


@dataclass(frozen=True, eq=False)
class Value:
    """What a tensor is.

    Attributes:
        flow: The non-negative flow that stands for it where it goes on to other layers.
        sheet: Which flow it comes from without a weight in between; values of one sheet may scale each other.
        probe: What it would be if that flow were t everywhere.
        linear: It is a flow of its own; its probe grows like t whatever constants have scaled it.
        settled: `flow` is what it stands for; else this is found out where it goes on (see `Flow.settled`).
        base: The last flow that it was computed from, entry by entry; None where entries were brought together.
        root: The same before numbers have scaled or shifted it; None if none have.
        reduced: It has fewer entries than its sheet, as means and norms have.
    """

    flow: Tensor
    sheet: Hashable
    probe: Probe
    linear: bool = True
    settled: bool = True
    base: Tensor | None = None
    root: Tensor | None = None
    reduced: bool = False


class Uniform:
    """The probe of a flow: t everywhere."""

    def __init__(self, like: Tensor) -> None:
        self.shape, self.device = like.shape, like.device

    def __call__(self, t: float) -> Tensor:
        """A tensor of t's, which takes no memory."""
        return torch.full((), t, dtype=torch.float64, device=self.device).expand(self.shape)


def uniform(like: Tensor) -> Probe:
    """The probe of a flow: t everywhere."""
    return Uniform(like)


def one(tensor: Tensor) -> Tensor:
    """One entry of a tensor that is the same everywhere, in all of its dimensions; else the tensor."""
    if any(tensor.stride()):
        return tensor
    return tensor[(slice(0, 1),) * tensor.dim()]


@dataclass(frozen=True)
class Growth:
    """A value where its flow is large, and how it came there.

    Attributes:
        at: The size of the flow.
        high: The value there.
        low: The value where the flow is as large and negative.
        below: The value where the flow is -1.
        slope: How much it grows there with the flow.
        order: Exponent of t; infinite for exponentials, -inf for what vanishes, NaN for what comes and goes.
        rises: Whether it never falls from there on, and is higher than at the negative end.
        logical: Whether it is a truth value.
    """

    at: float
    high: Tensor
    low: Tensor
    below: Tensor
    slope: Tensor
    order: float
    rises: bool
    logical: bool = False

    @classmethod
    def of(cls, probe: Probe) -> Growth:
        """Looks at a value's probe."""
        for large in LARGE:
            shown = [probe(large * step) for step in STEPS]
            points = [one(point).double() for point in shown]
            if not any(bool((p.isnan() | (p == math.inf)).any()) for p in points):
                break

        low = one(probe(-large)).double().nan_to_num(nan=-math.inf, neginf=-math.inf)  # logarithms have none
        high, slope = points[0], (points[DOUBLE] - points[0]) / large
        ends = [_peak(point) for point in points]
        steady = all(bool((b >= a - 1e-9 * a.abs()).all()) for a, b in itertools.pairwise(points))
        order = _agreed(*[_order(ends[i], ends[DOUBLE + i]) for i in (0, 1)])
        below = one(probe(-1.0)).double()
        logical = shown[0].dtype == torch.bool
        rises = steady and bool((high > low).any())
        found = cls(large, high, low, below, slope, order, rises, logical)
        return found.expanded(shown[0].shape, high.device)

    def expanded(self, shape: torch.Size, device: torch.device) -> Growth:
        """The same of a value that is alike everywhere."""
        parts = {name: getattr(self, name).to(device).expand(shape) for name in ("high", "low", "below", "slope")}
        return replace(self, **parts)

    def negative(self, t: float) -> Tensor:
        """The value on the negative side, at -1 or far from zero."""
        return self.below if t == -1 else self.low * (-t / self.at)

    @property
    def flowing(self) -> bool:
        """Whether it grows like the flow itself."""
        return abs(self.order - 1) < NEAR

    @property
    def positive(self) -> bool:
        """Whether it is not negative where the flow is large."""
        return bool((one(self.high) >= 0).all())

    @property
    def bounded(self) -> bool:
        """Whether it does not grow."""
        return self.order < NEAR

    @property
    def coefficient(self) -> Tensor:
        """The factor of t^order."""
        if self.flowing:
            return self.slope  # without what constants add
        return self.high if math.isinf(self.order) else self.high / self.at**self.order

    @property
    def rectifies(self) -> bool:
        """Whether it is small where the flow is negative; bounded rectifiers (relu6) are zero there from the start."""
        if self.bounded:
            shut = not bool(one(self.low).any()) and not bool(one(self.below).any())
            return shut and bool(one(self.high).any())
        return _peak(self.low) <= 0.5 * _peak(self.high)


def _peak(tensor: Tensor) -> float:
    tensor = one(tensor)
    finite = tensor[tensor.isfinite()].abs()
    if not finite.numel():
        return math.inf
    return float(finite.max())


def _order(first: float, second: float) -> float:
    if first == 0 or second == 0:
        return -math.inf
    if math.isinf(first) or math.isinf(second):
        return math.inf
    return round(math.log2(second / first), 6)


def _agreed(first: float, second: float) -> float:
    """The order of a power; exponentials have ever larger ones."""
    if first == second or abs(first - second) < 0.05:
        return first
    return math.inf if min(first, second) > 1 else math.nan
