"""The one loop behind every method: score, exclude what is gone, allocate, repeat."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sapwood.allocation import Allocation, allocation, budget
from sapwood.batches import Data
from sapwood.errors import SapwoodWarning, ScoreError
from sapwood.functional import FunctionalModel
from sapwood.masks import Masks
from sapwood.schedules import densities

Scores = dict[str, Tensor]


class Criterion(Protocol):
    """What scores weights: a pure function, usually a frozen dataclass whose fields are the hyper-parameters."""

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> Scores:
        """One finite score for every entry of `masks`, by name; **higher = keep**."""
        ...


@dataclass(frozen=True)
class Method:
    """A criterion and how it is used.

    Attributes:
        criterion: What scores the weights.
        rounds: Number of times that scoring and pruning alternate (T in the papers).
        schedule: Densities after each round: "exponential", "linear" or "cubic".
        allocation: Which weights a budget keeps: "global", "uniform", "uniform+", "erk", masks, or densities by name.
        regrow: Whether a pruned weight may return in a later round (FORCE).
    """

    criterion: Criterion
    rounds: int = 1
    schedule: str = "exponential"
    allocation: str | Masks | Mapping[str, float] | Allocation = "global"
    regrow: bool = False


@dataclass(frozen=True)
class Round:
    """What one round did: its number (from 1), target density, weights kept, seconds, and layers left empty."""

    index: int
    density: float
    kept: int
    seconds: float
    collapsed: tuple[str, ...]


class Described(Protocol):
    """A diagnosis (`sapwood.diagnosis.Diagnosis`), of which a result only prints the table."""

    def table(self) -> str:
        """Plain text."""
        ...


@dataclass(frozen=True)
class Result:
    """Masks and how they came about; printing it prints the layer table.

    Attributes:
        masks: The masks of the last round, with provenance.
        history: One entry a round; empty where nothing was to be pruned (density 1).
        seconds: Wall time of the call.
        seed: The seed of every random draw.
        method: The method's name.
        diagnosis: What the masks leave of the network, if it was asked for.
    """

    masks: Masks
    history: tuple[Round, ...]
    seconds: float
    seed: int
    method: str = field(default="")
    diagnosis: Described | None = None

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Layers in which no weight is kept."""
        return self.masks.collapsed

    def report(self) -> str:
        """The per-layer table with a line on how it was made."""
        rounds = f"{len(self.history)} round{'' if len(self.history) == 1 else 's'}"
        head = (
            f"{self.method}: {self.masks.kept:,} of {self.masks.total:,} weights kept in {rounds}, {self.seconds:.1f} s"
        )
        empty = f"\ncollapsed layers: {', '.join(self.collapsed)}" if self.collapsed else ""
        left = "" if self.diagnosis is None else f"\n\n{self.diagnosis.table()}"
        return f"{head}, seed {self.seed}\n\n{self.masks.table()}{empty}{left}"

    def __str__(self) -> str:
        return self.report()


def iterate(
    net: FunctionalModel,
    method: Method,
    data: Data,
    density: float,
    generator: torch.Generator,
    *,
    min_per_layer: int = 0,
    on_round: Callable[[Round, Masks], Any] | None = None,
) -> tuple[Masks, tuple[Round, ...]]:
    """Runs a method to `density`.

    Args:
        net: The model.
        method: Criterion, rounds, schedule, allocation.
        data: What the criterion may look at.
        density: Share of the prunable weights to keep, (0, 1].
        generator: Source of every draw, on the model's device.
        min_per_layer: Weights that every layer keeps at least.
        on_round: Called after every round with its record and masks.

    Returns:
        Masks that keep exactly round(density x total) weights, and the history.

    Raises:
        BudgetError: the budget cannot be met.
        ScoreError: a score is NaN or infinite.
    """
    allocate = allocation(method.allocation, min_per_layer)
    dense = masks = Masks.dense(net.weights)
    history: list[Round] = []
    budgets = [(d, budget(d, dense.total)) for d in densities(method.schedule, density, method.rounds)]
    if budgets[-1][1] == dense.total:
        return dense, ()
    for index, (target, keep) in enumerate(budgets, start=1):
        begin = time.perf_counter()
        scores = method.criterion(net, masks, data, generator)
        _check_scores(scores, net, method)
        masks = allocate(scores, dense if method.regrow else masks, keep)
        history.append(Round(index, target, keep, time.perf_counter() - begin, masks.collapsed))
        if on_round:
            on_round(history[-1], masks)
    if masks.collapsed:
        warnings.warn(
            f"{len(masks.collapsed)} of {len(masks)} layers keep no weight ({', '.join(masks.collapsed[:5])}): the "
            "network may be cut in two there. min_per_layer=1, more rounds or a higher density avoid it.",
            SapwoodWarning,
            stacklevel=3,
        )
    return masks, tuple(history)


def _check_scores(scores: Scores, net: FunctionalModel, method: Method) -> None:
    name_of = type(method.criterion).__name__
    for name, weight in net.weights.items():
        if name not in scores or scores[name].shape != weight.shape:
            came = tuple(scores[name].shape) if name in scores else "none"
            raise ScoreError(f"{name_of} must score {name!r} of shape {tuple(weight.shape)}; its scores have {came}.")
        if not torch.isfinite(scores[name]).all():
            raise ScoreError(
                f"{name_of} gave NaN or infinite scores in {name!r}: check the model's outputs and loss on this input "
                "(exploding activations without normalisation?)."
            )
