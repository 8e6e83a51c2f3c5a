"""Smooth non-linearities (GELU, SiLU, tanh and their kin), by Gauss-Hermite quadrature.

E f, E f^2, E f' and E f'^2 of a Gaussian are each a sum over 24 nodes, exact to some 1e-6 for pre-activations of unit
variance. At finite epsilon the change is gated by the average of both networks' E f'^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sapwood.moments.gates import TINY, Passed, hermite, passed, root, variance
from sapwood.moments.registry import RULES, Call
from sapwood.moments.state import Moments, Side, plus

NODES = 24
TERMS = 6
GROUP = 500_000


@dataclass(frozen=True)
class Smooth:
    """Any smooth pointwise function that torch differentiates twice."""

    function: Callable[[Tensor], Tensor]

    def moments(self, mean: Tensor | None, deviation: Tensor) -> Passed:
        """By quadrature, one node after another, so that memory does not grow with their number."""
        first: Passed = _checkpointed(self._moments, mean, deviation)
        return first

    def _moments(self, mean: Tensor | None, deviation: Tensor) -> Passed:
        values, slopes, raw, square = self._projected(mean, deviation, 1)
        return Passed(values[0], raw, slopes[0], square)

    def _projected(self, mean: Tensor | None, deviation: Tensor, terms: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hermite coefficients of f and f' (terms first), E f^2 and E f'^2; nodes in groups that fit the cache."""
        nodes, weights = (torch.tensor(t, dtype=torch.float64).to(deviation) for t in hermite(NODES))
        basis = torch.tensor([polynomials(node)[:terms] for node in hermite(NODES)[0]], dtype=torch.float64)
        basis = basis.to(deviation) * weights[:, None]
        group = max(1, min(NODES, GROUP // max(deviation.numel(), 1)))
        total: list[Tensor | None] = [None] * 4
        for some, weight, columns in zip(*(torch.split(t, group) for t in (nodes, weights, basis)), strict=True):
            u = deviation * some.reshape(-1, *[1] * deviation.dim())
            value, slope = self._both(u if mean is None else u + mean)
            found = (
                torch.tensordot(columns.mT, value, 1),
                torch.tensordot(columns.mT, slope, 1),
                torch.tensordot(weight, value.square(), 1),
                torch.tensordot(weight, slope.square(), 1),
            )
            total = [plus(sum_, part) for sum_, part in zip(total, found, strict=True)]
        values, slopes, raw, square = (part for part in total if part is not None)
        return values, slopes, raw, square

    def series(self, x: Moments, side: Side, shared: Tensor) -> tuple[Passed, Tensor, Tensor]:
        """Correlated pre-activations: E[f(u) f(u')] = sum over n of correlation^n a_n a_n' with Hermite coefficients.

        a_n = E[f(mean + deviation y) He_n(y)] / sqrt(n!) for normal y, and likewise for f'. Coefficients of smooth
        functions fall quickly: six terms leave a relative 1e-3 for GELU at correlation one.
        """
        spread = variance(side)
        deviation = root(spread)
        correlation = (shared / spread.clamp_min(TINY)).clamp(0, 1)
        found: tuple[Passed, Tensor, Tensor] = _checkpointed(self._series, side.mean, deviation, correlation, x)
        return found

    def _series(
        self, mean: Tensor | None, deviation: Tensor, correlation: Tensor, x: Moments
    ) -> tuple[Passed, Tensor, Tensor]:  # fmt: skip
        values, slopes, raw, square = self._projected(mean, deviation, TERMS)
        pair, both = _sum(values, correlation, x), _sum(slopes, correlation, x)
        return Passed(values[0], raw, slopes[0], square), pair, both

    def value(self, u: Tensor) -> Tensor:
        """See `Activation`."""
        return self.function(u)

    def slope(self, u: Tensor) -> Tensor:
        """See `Activation`."""
        return self._both(u)[1]

    def _both(self, u: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = torch.func.jvp(self.function, (u,), (torch.ones_like(u),))  # type: ignore[assignment]
        return both


def _sum(coefficients: Tensor, correlation: Tensor, x: Moments) -> Tensor:
    total, power = torch.zeros_like(correlation), torch.ones_like(correlation)
    for coefficient in coefficients:
        total, power = total + power * coefficient * x.average(coefficient), power * correlation
    return total


@lru_cache
def polynomials(node: float) -> tuple[float, ...]:
    """He_n(node) / sqrt(n!) for n below `TERMS`."""
    found = [1.0, node]
    for n in range(1, TERMS - 1):
        found.append((node * found[n] - math.sqrt(n) * found[n - 1]) / math.sqrt(n + 1))
    return tuple(found)


def _checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """Recomputes in the backward pass, or else every node of the quadrature would keep its maps."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _register(operation: Callable[..., Any], function: Callable[..., Any]) -> None:
    def apply(call: Call, x: Moments, *args: Any, **kwargs: Any) -> Moments:
        kwargs.pop("inplace", None)
        return passed(call, x, Smooth(lambda u: function(u, *args, **kwargs)))

    RULES[operation] = apply


for _operation in (
    F.gelu, F.silu, F.mish, F.elu, F.celu, F.selu, F.softplus, F.tanh, F.sigmoid, F.logsigmoid,
    torch.tanh, torch.sigmoid, torch.celu, torch.selu, torch.Tensor.tanh, torch.Tensor.sigmoid,
):  # fmt: skip
    _register(_operation, _operation)
