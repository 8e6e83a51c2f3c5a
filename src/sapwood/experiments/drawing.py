"""From outcomes to the figures of a report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sapwood import files
from sapwood.experiments import figures, store
from sapwood.experiments.compare import Outcome, run_folder
from sapwood.experiments.config import DENSE
from sapwood.experiments.figures import Curve, Published
from sapwood.experiments.store import RunResult
from sapwood.experiments.summary import Summary, finished, select
from sapwood.text import visible


def draw(outcomes: Sequence[Outcome], summary: Summary, out: Path, published: Published) -> dict[str, Figure]:
    """Every figure that the outcomes give, by name; layers and training are those of the highest sparsity."""
    top = summary.sparsities[-1]
    at_top = {method: finished(select(outcomes, method, top)) for method in summary.methods}
    at_top = {method: found for method, found in at_top.items() if found}
    trained = {DENSE: finished(select(outcomes, DENSE)), **at_top}
    drawn = {"accuracy": figures.accuracy(summary, published)}
    if at_top:
        densities = {method: _layer_densities([result for _, result in found]) for method, found in at_top.items()}
        drawn["layers"] = figures.layers(densities, 1 - top, summary.methods)
    rows = {m: [files.read_rows(run_folder(out, o.config) / store.METRICS) for o, _ in f] for m, f in trained.items()}
    for name, key, label in (
        ("training-loss", "train_loss", "training loss"),
        ("training-accuracy", "test_accuracy", "test accuracy, %"),
    ):
        lines = {method: _mean_curve(found, key) for method, found in rows.items() if found}
        drawn[name] = figures.curves(lines, label, summary.methods, log=key == "train_loss")
    return drawn


def _layer_densities(results: Sequence[RunResult]) -> dict[str, float]:
    """Mean over the seeds."""
    return {
        visible(name): statistics.mean(result.layers[name][0] / result.layers[name][1] for result in results)
        for name in results[0].layers
    }


def _mean_curve(runs: Sequence[Sequence[dict[str, Any]]], key: str) -> Curve:
    """Mean over the seeds, up to the last epoch that all of them have."""
    return [(float(rows[0]["epoch"]), statistics.mean(row[key] for row in rows)) for rows in zip(*runs, strict=False)]
