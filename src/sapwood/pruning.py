"""The one loop behind every method: score, exclude what is gone, allocate, repeat."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sapwood import schedules
from sapwood.allocation import Allocation, allocation, budget, check_rounding
from sapwood.batches import Data
from sapwood.coverage import Coverage
from sapwood.errors import MaskError, SapwoodWarning, ScoreError
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks
from sapwood.names import Names
from sapwood.schedules import densities

Scores = dict[str, Tensor]


class Criterion(Protocol):
    """What scores weights: a pure function, usually a frozen dataclass whose fields are the hyper-parameters.

    One that looks at no batches has an attribute `needs_data = False`, so that commands do without a data set; whoever
    says nothing is given batches.
    """

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
        invert: Keep the lowest scores instead of the highest, in every round: a sanity check (Frankle et al. 2021).
        rounding: How the density after a round becomes a number of weights: "nearest", "up" or "down"; the latter two
            are for bit-equal reproductions of authors' code (see `allocation.ROUNDINGS`).
    """

    criterion: Criterion
    rounds: int = 1
    schedule: str = "exponential"
    allocation: str | Masks | Mapping[str, float] | Allocation = "global"
    regrow: bool = False
    invert: bool = False
    rounding: str = "nearest"

    @property
    def needs_data(self) -> bool:
        """Whether the criterion may look at batches: it does unless it says otherwise."""
        return bool(getattr(self.criterion, "needs_data", True))

    def __post_init__(self) -> None:
        """Refuses what no search could begin with.

        Raises:
            ConfigError: an unknown schedule, allocation or rounding, or a number of rounds out of range.
        """
        schedules.check(self.schedule, self.rounds)
        allocation(self.allocation)
        check_rounding(self.rounding)

    def run(
        self,
        net: FunctionalModel,
        data: Data,
        density: float,
        generator: torch.Generator,
        *,
        min_per_layer: int = 0,
        on_round: OnRound | None = None,
        within: Masks | None = None,
    ) -> Found:
        """Alternates scoring and pruning: see `iterate`."""
        options: dict[str, Any] = {"min_per_layer": min_per_layer, "on_round": on_round, "within": within}
        return Found(*iterate(net, self, data, density, generator, **options))


@dataclass(frozen=True)
class Round:
    """What one round did: its number (from 1), target density, weights kept, seconds, and layers left empty."""

    index: int
    density: float
    kept: int
    seconds: float
    collapsed: tuple[str, ...]


MANY = 0.1
"""Share of the kept weights without a score above which it is said."""

OnRound = Callable[[Round, Masks], Any]


class Found(NamedTuple):
    """What a method found: masks, one record a round, and new weights by name if it changes any."""

    masks: Masks
    history: tuple[Round, ...]
    params: Params | None = None


@runtime_checkable
class Procedure(Protocol):
    """Whatever `prune` can run: a `Method`, or a frozen dataclass with a loop of its own, which may return weights.

    Its fields are its hyper-parameters, settable like a method's. `needs_data = False` as in `Criterion`.
    """

    def run(
        self,
        net: FunctionalModel,
        data: Data,
        density: float,
        generator: torch.Generator,
        *,
        min_per_layer: int = 0,
        on_round: OnRound | None = None,
        within: Masks | None = None,
    ) -> Found:
        """Masks that keep exactly `budget(density, prunable weights)`, all of them among those of `within`."""
        ...


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
        params: New values of parameters and buffers, by name, pruned weights zero; None: the model's own stay.
        diagnosis: What the masks leave of the network, if it was asked for.
        coverage: What of the model the masks cover, and what is left dense; None where no model was looked at.
    """

    masks: Masks
    history: tuple[Round, ...]
    seconds: float
    seed: int
    method: str = field(default="")
    params: Params | None = field(default=None, repr=False)
    diagnosis: Described | None = None
    coverage: Coverage | None = None

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Writes the result into a model: the new weights, if there are any, and zeros where weights are pruned.

        Raises:
            MaskError: the model lacks one of the names, or has it with another shape; nothing was changed.
        """
        names = Names.of(model)
        masks, params = names.fit(self.masks, strict=False), self.params or {}
        targets = {name: names.tensors[target] for name, target in names.translated(params).items()}
        for name, value in params.items():
            if targets[name].shape != value.shape:
                raise MaskError(f"The result belongs to another model, which has {name!r} of {tuple(value.shape)}.")
        for name, value in params.items():
            targets[name].copy_(value)
        for name, mask in masks.items():
            names.tensors[name].masked_fill_(~mask.to(names.tensors[name].device), 0)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Layers in which no weight is kept."""
        return self.masks.collapsed

    def report(self) -> str:
        """The per-layer table with a line on how it was made, and what is left dense of the model."""
        rounds = f"{len(self.history)} round{'' if len(self.history) == 1 else 's'}"
        head = (
            f"{self.method}: {self.masks.kept:,} of {self.masks.total:,} weights kept in {rounds}, {self.seconds:.1f} s"
        )
        empty = f"\ncollapsed layers: {', '.join(self.collapsed)}" if self.collapsed else ""
        left = "" if self.diagnosis is None else f"\n\n{self.diagnosis.table()}"
        whole = "" if self.coverage is None else f"\n{self.coverage}"
        return f"{head}, seed {self.seed}{whole}\n\n{self.masks.table()}{empty}{left}"

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
    on_round: OnRound | None = None,
    within: Masks | None = None,
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
        within: Masks to begin from: what they prune stays pruned, and the schedule starts at their density.

    Returns:
        Masks that keep exactly density x total weights, rounded as the method says, and the history.

    Raises:
        BudgetError: the budget cannot be met.
        ScoreError: a score is NaN or infinite.
    """
    allocate = allocation(method.allocation, min_per_layer)
    first = masks = starting_masks(net, within)
    history: list[Round] = []
    budgets = stages(method.schedule, density, method.rounds, first, method.rounding)
    if budgets[-1][1] == first.kept:
        return first, ()
    for index, (target, keep) in enumerate(budgets, start=1):
        begin = time.perf_counter()
        scores = method.criterion(net, masks, data, generator)
        _check_scores(scores, masks, net, method)
        if method.invert:
            scores = {name: -score for name, score in scores.items()}
        candidates = first if method.regrow else masks
        masks = allocate(scores, candidates, keep)
        history.append(Round(index, target, keep, time.perf_counter() - begin, masks.collapsed))
        if on_round:
            on_round(history[-1], masks)
    warn_of_collapse(masks)
    _warn_of_ties(masks, candidates, scores)
    return masks, tuple(history)


def starting_masks(net: FunctionalModel, within: Masks | None) -> Masks:
    """`within` in the order and on the device of the model's prunable weights; all ones where it is None.

    Raises:
        MaskError: `within` is another model's, or lacks a prunable weight.
    """
    if within is None:
        return Masks.dense(net.weights)
    within.check(net.weights, strict=False)
    if missing := [name for name in net.prunable if name not in within]:
        raise MaskError(f"The masks of within= have no entry for {missing[0]!r}, which is to be pruned.")
    return Masks({name: within[name].to(weight.device) for name, weight in net.weights.items()})


def stages(
    schedule: str, density: float, rounds: int, first: Masks, rounding: str = "nearest"
) -> list[tuple[float, int]]:
    """Density and weights kept after each round, from those of `first` down to `density`."""
    begin = first.density
    parts = densities(schedule, min(1.0, density / begin), rounds)
    targets = [*(begin * part for part in parts[:-1]), density]
    return [(target, budget(target, first.total, rounding)) for target in targets]


def warn_of_collapse(masks: Masks) -> None:
    """Says so where a layer keeps nothing."""
    if masks.collapsed:
        warnings.warn(
            f"{len(masks.collapsed)} of {len(masks)} layers keep no weight ({', '.join(masks.collapsed[:5])}): the "
            "network may be cut in two there. min_per_layer=1, more rounds or a higher density avoid it.",
            SapwoodWarning,
            stacklevel=5,
        )


def _warn_of_ties(masks: Masks, candidates: Masks, scores: Scores) -> None:
    """Says so where the budget ends among scores of zero, so that many weights are kept for where they stand."""
    zero = {name: candidates[name] & (score == 0) for name, score in scores.items()}
    kept = sum(int((zero[name] & mask).sum()) for name, mask in masks.items())
    if kept > MANY * masks.kept and kept < sum(int(entries.sum()) for entries in zero.values()):
        warnings.warn(
            f"{kept:,} of the {masks.kept:,} weights that are kept have the score 0 and are kept for their position "
            "only: fewer weights than the budget matter to this score (dead units? a loss that few layers reach?).",
            SapwoodWarning,
            stacklevel=5,
        )


def _check_scores(scores: Scores, masks: Masks, net: FunctionalModel, method: Method) -> None:
    name_of = getattr(method.criterion, "__name__", type(method.criterion).__name__)
    for name, weight in net.weights.items():
        if name not in scores or scores[name].shape != weight.shape:
            came = tuple(scores[name].shape) if name in scores else "none"
            raise ScoreError(f"{name_of} must score {name!r} of shape {tuple(weight.shape)}; its scores have {came}.")
        if scores[name].numel() and not torch.stack(scores[name].aminmax()).isfinite().all():  # NaN wins in both
            raise ScoreError(
                f"{name_of} gave NaN or infinite scores in {name!r}: check the model's outputs and loss on this input "
                "(exploding activations without normalisation?)."
            )
    if unreached := net.derivatives.missing(net.prunable):
        raise ScoreError(
            f"{name_of} has nothing to score {unreached[0]!r} by ({len(unreached)} such weights): what it "
            "differentiates does not depend on them. Is the layer used in training mode only, behind a detach or "
            f"no_grad, or not at all? Leave it out with exclude={unreached!r}, or give inputs that reach it."
        )
    if not any(bool((score[masks[name]] != 0).any()) for name, score in scores.items()):
        raise ScoreError(
            f"{name_of} gave every weight that is left the score 0, which ranks nothing: a saturated or constant loss "
            "(cross-entropy of one logit), weights that are all zero, activations that are all dead, or a network that "
            "earlier rounds have cut in two. Look at the loss and the outputs on this input, or prune less."
        )
