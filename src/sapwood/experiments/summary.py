"""From outcomes to numbers: a row for each run, a cell for each method and sparsity, and who is as good as the best."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sapwood.experiments.compare import Outcome
from sapwood.experiments.config import DENSE
from sapwood.experiments.store import RunResult

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cell:
    """Test accuracy of one method at one sparsity, over its seeds.

    Attributes:
        by_seed: Percent, after the last epoch.
        best: Whether its mean is the highest at this sparsity.
        tied: Whether it cannot be told from the best: see `summarise`.
        failed: Runs without a result.
    """

    by_seed: dict[int, float]
    best: bool = False
    tied: bool = False
    failed: int = 0

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """Mean over the seeds, percent; NaN without any."""
        return statistics.mean(self.by_seed.values()) if self.by_seed else float("nan")

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds, in percentage points; 0 for a single one."""
        return statistics.stdev(self.by_seed.values()) if self.n > 1 else 0.0

    def __str__(self) -> str:
        if not self.n:
            return "failed" if self.failed else "-"
        return f"{self.mean:.1f} ± {self.std:.1f}" if self.n > 1 else f"{self.mean:.1f}"


@dataclass(frozen=True)
class Summary:
    """A comparison in numbers: `cells[method][sparsity]`, and the dense model's cell."""

    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    dense: Cell
    cells: dict[str, dict[float, Cell]]

    def best(self, sparsity: float) -> str | None:
        """The method with the highest mean accuracy at a sparsity."""
        return next((method for method in self.methods if self.cells[method][sparsity].best), None)


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    """Groups the outcomes by method and sparsity.

    A method is tied with the best if their means differ by no more than the least significant difference (95 %, no
    correction for many comparisons) of a design in which every seed is a block: seeds are paired, and the error is
    pooled over all methods at the sparsity, since a few seeds give no variance worth using for each pair alone. With
    two methods this is the paired t test. With one seed nothing is said. Where a run is missing, the difference is that
    of the least-squares fit by method + seed, which compares like with like.
    """
    methods = tuple(dict.fromkeys(o.config.label for o in outcomes if o.config.method != DENSE))
    sparsities = tuple(sorted({sparsity(o) for o in outcomes if o.config.method != DENSE}))
    raw = {m: {s: _cell(select(outcomes, m, s)) for s in sparsities} for m in methods}
    return Summary(methods, sparsities, _cell(select(outcomes, DENSE)), _marked(raw, sparsities))


def select(outcomes: Sequence[Outcome], method: str, at: float | None = None) -> list[Outcome]:
    """The outcomes of a method, at one sparsity or at all."""
    return [o for o in outcomes if o.config.label == method and at in (None, sparsity(o))]


def finished(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, RunResult]]:
    """The outcomes that have a result, with it."""
    return [(outcome, outcome.result) for outcome in outcomes if outcome.result is not None]


def sparsity(outcome: Outcome) -> float:
    """Share of the weights removed, as it was asked for."""
    return round(1 - outcome.config.density, 12)


def frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row a run: what was run, what came out."""
    import pandas as pd  # here, because it takes half a second to import

    return pd.DataFrame([_row(outcome) for outcome in outcomes])


def _row(outcome: Outcome) -> dict[str, object]:
    config, result = outcome.config, outcome.result
    row: dict[str, object] = {
        "run": config.id,
        "data": config.data,
        "model": config.model,
        "method": config.label,
        "sparsity": sparsity(outcome),
        "seed": config.seed,
    }
    if result is None:
        return {**row, "error": outcome.error}
    return {
        **row,
        "test_accuracy": result.test_accuracy,
        "validation_accuracy": result.validation_accuracy,
        "kept": result.kept,
        "effective": result.effective,
        "weights": result.weights,
        "collapsed": " ".join(result.collapsed),
        "diverged": result.diverged,
        "epochs": result.epochs,
        "prior_epochs": result.prior_epochs,
        "prior_seconds": result.prior_seconds,
        "prune_seconds": result.prune_seconds,
        "train_seconds": result.train_seconds,
        "prune_memory": result.prune_memory,
        "train_memory": result.train_memory,
        "flops_kept": result.flops and result.flops[0],
        "flops": result.flops and result.flops[1],
        "init_hash": result.init_hash,
        "order_hash": result.order_hash,
        "error": "",
    }


def _cell(outcomes: Sequence[Outcome]) -> Cell:
    by_seed = {o.config.seed: o.result.test_accuracy for o in outcomes if o.result is not None}
    return Cell(by_seed, failed=len(outcomes) - len(by_seed))


def _marked(raw: dict[str, dict[float, Cell]], sparsities: Sequence[float]) -> dict[str, dict[float, Cell]]:
    marked: dict[str, dict[float, Cell]] = {method: {} for method in raw}
    for s in sparsities:
        column = {method: cells[s] for method, cells in raw.items() if cells[s].n}
        best = max(column, key=lambda method: column[method].mean, default=None)
        near = set() if best is None else _near(best, column)
        for method, cells in raw.items():
            marked[method][s] = Cell(cells[s].by_seed, method == best, method in near, cells[s].failed)
    return marked


def _near(best: str, column: Mapping[str, Cell]) -> set[str]:
    """The other methods that are no further below the best than the least significant difference.

    Accuracies are fitted by method + seed, also where a run is missing; a difference that the runs that are there do
    not determine, as between methods without a common seed, is not judged.
    """
    from scipy.stats import t  # type: ignore[import-untyped]  # here, because scipy.stats takes a second to import

    methods, seeds = list(column), sorted({seed for cell in column.values() for seed in cell.by_seed})
    runs = [(method, seed, value) for method in methods for seed, value in column[method].by_seed.items()]
    values = np.array([value for *_, value in runs])
    design = np.array(
        [[*(m == other for other in methods), *(s == other for other in seeds)] for m, s, _ in runs], float
    )
    inverse = np.linalg.pinv(design)
    effects, freedom = inverse @ values, len(runs) - int(np.linalg.matrix_rank(design))
    if freedom < 1:
        return set()
    variance = np.square(values - design @ effects).sum() / freedom
    near = set()
    for method in set(methods) - {best}:
        contrast = np.array([(m == best) - (m == method) for m in methods] + [0] * len(seeds), float)
        determined = np.allclose(contrast @ inverse @ design, contrast)
        error = np.sqrt(variance * np.square(contrast @ inverse).sum())  # var(c'b) = s2 c'(X'X)+c = s2 |c'X+|2
        if determined and contrast @ effects <= t.ppf((1 + CONFIDENCE) / 2, freedom) * error:
            near.add(method)
    return near
