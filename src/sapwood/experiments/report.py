"""The report of a comparison: one HTML page that needs nothing else, its figures as files, and all runs as CSV."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from sapwood.experiments import figures, store
from sapwood.experiments.compare import Outcome, run_folder
from sapwood.experiments.config import DENSE
from sapwood.experiments.figures import Curve
from sapwood.experiments.store import RunResult
from sapwood.experiments.summary import Summary, frame, select, sparsity, summarise

REPORT, TABLE = "report.html", "results.csv"


def write_report(outcomes: Sequence[Outcome], out: Path, command: str) -> Path:
    """Writes report.html, results.csv and figures/ into the comparison's folder.

    Args:
        outcomes: All runs, failed ones included; at least one has a result.
        out: The comparison's folder, whose `runs` hold the training curves.
        command: What was typed, for the record.

    Returns:
        The path of the page.
    """
    summary = summarise(outcomes)
    drawn = _figures(outcomes, summary, out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figures.save(figure, out / "figures" / name)
    store.write_text(out / TABLE, frame(outcomes).to_csv(index=False, lineterminator="\n"))
    page = _template().render(
        outcome=outcomes[0],
        summary=summary,
        sentence=sentence(summary),
        figures={name: figures.inline(figure, name) for name, figure in drawn.items()},
        costs=_costs(outcomes, summary),
        collapsed=[o for o in outcomes if o.result is not None and o.result.collapsed],
        failed=[o for o in outcomes if o.result is None],
        diverged=[o for o in outcomes if o.result is not None and o.result.diverged],
        setup=_setup(outcomes, summary),
        command=command,
        series=len(figures.SERIES),
    )
    store.write_text(out / REPORT, page)
    return out / REPORT


def sentence(summary: Summary) -> str:
    """The result in one sentence: the best method at the highest sparsity, its equals, and the dense model."""
    top = summary.sparsities[-1]
    best = summary.best(top)
    if best is None:
        return f"No run at {100 * top:g} % sparsity gave a result."
    cell = summary.cells[best][top]
    tied = [method for method in summary.methods if summary.cells[method][top].tied]
    text = f"With {100 * top:g} % of the weights removed before training, {best} reaches {cell} % test accuracy"
    if summary.dense.n:
        text += f" (the dense model: {summary.dense} %)"
    others = len(summary.methods) - 1
    if not others:
        return f"{text}."
    if len(tied) == others:
        return f"{text}; {cell.n} seeds tell no other method from it."
    rest = f", and {listed(tied)} cannot be told from it with {cell.n} seeds" if tied else ""
    return f"{text}, the best of {others + 1} methods{rest}."


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _figures(outcomes: Sequence[Outcome], summary: Summary, out: Path) -> dict[str, Figure]:
    top = summary.sparsities[-1]
    at_top = {method: _finished(select(outcomes, method, top)) for method in summary.methods}
    at_top = {method: found for method, found in at_top.items() if found}
    trained = {DENSE: _finished(select(outcomes, DENSE)), **at_top}
    drawn = {"accuracy": figures.accuracy(summary)}
    if at_top:
        densities = {method: _layer_densities([result for _, result in found]) for method, found in at_top.items()}
        drawn["layers"] = figures.layers(densities, 1 - top)
    rows = {m: [store.read_rows(run_folder(out, o.config) / store.METRICS) for o, _ in f] for m, f in trained.items()}
    for name, key, label in (
        ("training-loss", "train_loss", "training loss"),
        ("training-accuracy", "test_accuracy", "test accuracy, %"),
    ):
        lines = {method: _mean_curve(found, key) for method, found in rows.items() if found}
        drawn[name] = figures.curves(lines, label, log=key == "train_loss")
    return drawn


def _finished(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, RunResult]]:
    return [(outcome, outcome.result) for outcome in outcomes if outcome.result is not None]


def _layer_densities(results: Sequence[RunResult]) -> dict[str, float]:
    """Mean over the seeds."""
    return {
        name: statistics.mean(result.layers[name][0] / result.layers[name][1] for result in results)
        for name in results[0].layers
    }


def _mean_curve(runs: Sequence[Sequence[dict[str, Any]]], key: str) -> Curve:
    """Mean over the seeds, up to the last epoch that all of them have."""
    return [(float(rows[0]["epoch"]), statistics.mean(row[key] for row in rows)) for rows in zip(*runs, strict=False)]


def _costs(outcomes: Sequence[Outcome], summary: Summary) -> list[dict[str, Any]]:
    rows = []
    for method in (DENSE, *summary.methods):
        results = [result for _, result in _finished(select(outcomes, method))]
        if results:
            rows.append(
                {
                    "method": method,
                    "n": len(results),
                    "prune": statistics.mean(result.prune_seconds for result in results),
                    "train": statistics.mean(result.train_seconds for result in results),
                }
            )
    return rows


def _setup(outcomes: Sequence[Outcome], summary: Summary) -> dict[str, str]:
    config = outcomes[0].config
    train = {key: value for key, value in dataclasses.asdict(config.train).items() if key != "seed"}
    if train["schedule"] != "step":
        train = {key: value for key, value in train.items() if key not in ("milestones", "gamma")}
    seeds = sorted({outcome.config.seed for outcome in outcomes})
    fields = {o.config.method: o.config.fields for o in outcomes if o.config.fields}
    setup = {
        "data": config.data + (f" at {config.resolution} pixels" if config.resolution else ""),
        "model": config.model,
        "methods": ", ".join(summary.methods),
        "method fields": "; ".join(f"{m}: {_pairs(f)}" for m, f in fields.items()) or "as in the method table",
        "scoring sample": f"{config.per_class} training images a class, for methods that score on labels",
        "least weights a layer": str(outcomes[-1].config.min_per_layer),
        "training": _pairs(train),
        "seeds": ", ".join(map(str, seeds)),
    }
    environment = [result.environment for _, result in _finished(outcomes)]
    for key in environment[0] if environment else ():
        setup[key] = " / ".join(dict.fromkeys(found.get(key, "unknown") for found in environment))
    return setup


def _pairs(values: Any) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in dict(values).items())


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sapwood", "experiments"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:g} %"
    environment.globals["sparsity"] = sparsity
    return environment.get_template("report.html.jinja")
