"""The report of a comparison: one HTML page that needs nothing else, the same in Markdown, figures, all runs as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sapwood import files
from sapwood.errors import listed
from sapwood.experiments import figures, kernel_report, looks, tables
from sapwood.experiments.compare import Outcome
from sapwood.experiments.config import CONTROLS, DENSE, SAME_LAYERS
from sapwood.experiments.drawing import draw
from sapwood.experiments.figures import Published
from sapwood.experiments.kernels import Spectra
from sapwood.experiments.pages import templates
from sapwood.experiments.pairs import differences
from sapwood.experiments.summary import Summary, finished, frame, summarise

REPORT, MARKDOWN, TABLE = "report.html", "report.md", "results.csv"
NEAR = 5e-4  # published sparsities are rounded


def write_report(
    outcomes: Sequence[Outcome],
    out: Path,
    command: str,
    *,
    expected: Mapping[tuple[str, float], float] | None = None,
    spectra: Spectra | None = None,
) -> Path:
    """Writes report.html, report.md, results.csv and figures/ into the comparison's folder.

    Args:
        outcomes: All runs, failed ones included; at least one has a result.
        out: The comparison's folder, whose `runs` hold the training curves.
        command: What was typed, for the record.
        expected: Published test accuracies, percent, by method label and sparsity, to show beside the measured ones;
            the dense model's is at sparsity 0.
        spectra: Of the tangent kernels of the comparison's networks, to show as well.

    Returns:
        The path of the page.
    """
    summary = summarise(outcomes)
    retrained = any(outcome.config.retrain for outcome in outcomes)
    published = _published(expected or {}, summary)
    drawn = draw(outcomes, summary, out, published)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figures.save(figure, out / "figures" / name)
    files.write_text(out / TABLE, frame(outcomes).to_csv(index=False, lineterminator="\n"))
    facts = {
        "outcome": outcomes[0],
        "summary": summary,
        "published": published,
        "sentence": sentence(summary, "" if retrained else " before training"),
        "figures": {name: figures.inline(figure, name) for name, figure in drawn.items()},
        "differences": differences(summary),
        "left": tables.left(outcomes, summary),
        "costs": tables.costs(outcomes, summary),
        "problems": tables.problems(outcomes),
        "setup": tables.setup(outcomes, summary),
        "on_gpu": any(result.environment.get("device") != "cpu" for _, result in finished(outcomes)),
        "controls": {name: about for name, about in CONTROLS.items() if name in map(looks.control_of, summary.methods)},
        "same_layers": [method for method in summary.methods if looks.control_of(method) in SAME_LAYERS],
        "retrained": retrained,
        "command": command,
        "kernels": None if spectra is None else kernel_report.section(spectra, out),
    }
    environment = templates()
    for file in (MARKDOWN, REPORT):
        files.write_text(out / file, environment.get_template(f"{file}.jinja").render(facts))
    return out / REPORT


def sentence(summary: Summary, when: str = " before training") -> str:
    """The result in one sentence: the best method at the highest sparsity, its equals, and the dense model."""
    top = summary.sparsities[-1]
    best = summary.best(top)
    if best is None:
        return f"No run at {100 * top:g} % sparsity gave a result."
    cell = summary.cells[best][top]
    tied = [method for method in summary.methods if summary.cells[method][top].tied]
    text = f"With {100 * top:g} % of the weights removed{when}, {best} reaches {cell} % test accuracy"
    if summary.dense.n:
        text += f" (the dense model: {summary.dense} %)"
    others = len(summary.methods) - 1
    if not others:
        return f"{text}."
    if len(tied) == others:
        return f"{text}; {cell.n} seeds tell no other method from it."
    rest = f", and {listed(tied)} cannot be told from it with {cell.n} seeds" if tied else ""
    return f"{text}, the best of {others + 1} methods{rest}."


def _published(expected: Mapping[tuple[str, float], float], summary: Summary) -> Published:
    """What was published for the cells of this comparison, under their own sparsities."""
    cells = [(DENSE, 0.0), *((method, s) for method in summary.methods for s in summary.sparsities)]
    return {
        (method, s): value
        for method, s in cells
        for (label, at), value in expected.items()
        if label == method and abs(at - s) <= NEAR
    }
