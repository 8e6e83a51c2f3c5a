"""How far each method is from the first one, seed by seed: what a claim about a single pair of methods rests on."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from sapwood.experiments.summary import CONFIDENCE, Cell, Summary


@dataclass(frozen=True)
class Difference:
    """Test accuracy of a method minus that of the reference at one sparsity, paired by seed.

    Attributes:
        by_seed: Percentage points.
    """

    by_seed: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds, percentage points."""
        return statistics.mean(self.by_seed)

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % confidence interval of the paired t test, percentage points; None for a single seed."""
        from scipy.stats import t  # type: ignore[import-untyped]  # here, because scipy.stats takes a second to import

        n = len(self.by_seed)
        if n < 2:
            return None
        return float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(self.by_seed) / math.sqrt(n))

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def __str__(self) -> str:
        half = self.half_width
        return f"{self.mean:+.1f}" if half is None else f"{self.mean:+.1f} ± {half:.1f}"


def differences(summary: Summary) -> dict[str, dict[float, Difference | None]]:
    """Every other method against the first of the comparison, by method and sparsity; None without a common seed."""
    if len(summary.methods) < 2:
        return {}
    reference, *others = summary.methods
    return {
        method: {s: _difference(summary.cells[method][s], summary.cells[reference][s]) for s in summary.sparsities}
        for method in others
    }


def _difference(cell: Cell, reference: Cell) -> Difference | None:
    seeds = sorted(set(cell.by_seed) & set(reference.by_seed))
    return Difference(tuple(cell.by_seed[seed] - reference.by_seed[seed] for seed in seeds)) if seeds else None
