"""From outcomes to the other tables of a report: what is left of the network, what it cost, how it was made."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sapwood.experiments.compare import Outcome
from sapwood.experiments.config import DENSE, INIT_SEED, ORDER_SEED
from sapwood.experiments.store import RunResult
from sapwood.experiments.summary import Summary, finished, select, sparsity

Results = Sequence[RunResult]


@dataclass(frozen=True)
class Left:
    """What is left of the network: means over the seeds, shares from 0 to 1.

    Attributes:
        sparsity: Weights that are removed or on no path from an input to an output.
        flops: FLOPs of a forward pass that kept weights take part in; None where unknown.
    """

    sparsity: float
    flops: float | None


def left(outcomes: Sequence[Outcome], summary: Summary) -> dict[str, dict[float, Left | None]]:
    """What is left, by method and sparsity; empty where no run says so."""
    rows = {
        method: {s: _left(_results(select(outcomes, method, s))) for s in summary.sparsities}
        for method in summary.methods
    }
    return rows if any(cell for row in rows.values() for cell in row.values()) else {}


@dataclass(frozen=True)
class Cost:
    """What the runs of a method cost on average; seconds, bytes, None where unknown.

    `epochs` are all that were trained up to the network, those of the dense one and of earlier levels included;
    `prior_seconds` is the time before the last pruning.
    """

    n: int
    prune_seconds: float | None
    prune_memory: float | None
    epochs: float | None
    prior_seconds: float | None
    train_seconds: float | None
    train_memory: float | None


def costs(outcomes: Sequence[Outcome], summary: Summary) -> dict[str, Cost]:
    """By method, and of the dense model."""
    by_method = {method: _results(select(outcomes, method)) for method in (DENSE, *summary.methods)}
    return {
        method: Cost(
            len(results),
            None if method == DENSE else _mean(results, lambda r: r.prune_seconds),
            _mean(results, lambda r: r.prune_memory),
            _mean(results, lambda r: r.epochs + r.prior_epochs),
            _mean(results, lambda r: r.prior_seconds or None),
            _mean(results, lambda r: r.train_seconds),
            _mean(results, lambda r: r.train_memory),
        )
        for method, results in by_method.items()
        if results
    }


def unequal(outcomes: Sequence[Outcome]) -> list[int]:
    """Seeds whose runs began from unlike weights or saw unlike data; runs from before hashes were kept pass."""
    starts: dict[tuple[int, bool], set[tuple[str, str]]] = {}
    for outcome, result in finished(outcomes):
        if result.init_hash:
            alike = (outcome.config.seed, outcome.config.control == "reinit")  # which begins elsewhere, by intention
            starts.setdefault(alike, set()).add((result.init_hash, result.order_hash))
    return sorted({seed for (seed, _), found in starts.items() if len(found) > 1})


def problems(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """What a reader should know before trusting a number: which run, and what is the matter with it."""
    found = [(_name(o, ", failed"), f"{o.error}") for o in outcomes if o.result is None]
    runs = finished(outcomes)
    found += [(_name(o, ", diverged"), f"after {r.epochs} epochs.") for o, r in runs if r.diverged]
    found += [(_name(o), f"no weight is kept in {', '.join(r.collapsed)}.") for o, r in runs if r.collapsed]
    unfair = "the runs did not begin from the same weights, or did not see the same data in the same order."
    return found + [(f"seed {seed}", unfair) for seed in unequal(outcomes)]


def _name(outcome: Outcome, what: str = "") -> str:
    return f"{outcome.config.label} at {100 * sparsity(outcome):g} %, seed {outcome.config.seed}{what}"


def setup(outcomes: Sequence[Outcome], summary: Summary) -> dict[str, str]:
    """The configuration, the seeds, the versions and the hardware, as text by name."""
    config, results = outcomes[0].config, _results(outcomes)
    train = {
        key: value for key, value in dataclasses.asdict(config.train).items() if key not in ("seed", "start_epoch")
    }
    if train["schedule"] != "step":
        train = {key: value for key, value in train.items() if key not in ("milestones", "gamma")}
    seeds = sorted({outcome.config.seed for outcome in outcomes})
    settings = _settings(outcomes, summary)
    others = ", ".join(method for method in summary.methods if method not in settings)
    facts = {
        "data": config.data + (f" at {config.resolution} pixels" if config.resolution else ""),
        "model": config.model,
        **settings,
        **({"methods": f"{others} (with the settings of the method table, where not said)"} if others else {}),
        "scoring sample": f"{outcomes[-1].config.per_class} training images a class, for methods that score on labels",
        "least weights a layer": str(outcomes[-1].config.min_per_layer),
        "training": _pairs(train),
        "seeds": f"{', '.join(map(str, seeds))} of the masks; + {INIT_SEED} of the initial weights, + {ORDER_SEED} of "
        f"data order, augmentation and dropout",
    }
    if all(result.init_hash for result in results) and not unequal(outcomes):
        facts["fairness"] = "for each seed all methods have the same initial weights and data order (checked by hash)"
    for key in results[0].environment if results else ():
        facts[key] = " / ".join(dict.fromkeys(result.environment.get(key, "unknown") for result in results))
    return facts


def _settings(outcomes: Sequence[Outcome], summary: Summary) -> dict[str, str]:
    """The fields of every method, as its runs noted them."""
    by_method = {method: _results(select(outcomes, method)) for method in summary.methods}
    return {
        method: _pairs(results[0].settings) for method, results in by_method.items() if results and results[0].settings
    }


def _results(outcomes: Sequence[Outcome]) -> list[RunResult]:
    return [result for _, result in finished(outcomes)]


def _left(results: Results) -> Left | None:
    sparsity = _mean(results, lambda r: None if r.effective is None else 1 - r.effective / r.weights)
    return None if sparsity is None else Left(sparsity, _mean(results, lambda r: r.flops and r.flops[0] / r.flops[1]))


def _mean(results: Results, value: Callable[[RunResult], float | None]) -> float | None:
    known = [found for found in map(value, results) if found is not None]
    return statistics.mean(known) if known else None


def _pairs(values: Any) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in dict(values).items())
