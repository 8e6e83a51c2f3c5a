"""The page of tangent kernels, which needs nothing else; its figures as files, its table as CSV, numbers as JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sapwood import files
from sapwood.experiments import figures, kernel_figures
from sapwood.experiments.kernels import RECORD, Network, Spectra
from sapwood.experiments.pages import templates
from sapwood.ntk import Dynamics

PAGE, TABLE, DYNAMICS = "ntk.html", "ntk.csv", "dynamics.json"
COLUMNS = (
    "label", "sparsity", "trace", "condition_number", "effective_rank", "largest_stable_lr", "alignment", "distance",
    "seconds",
)  # fmt: skip


def write_page(
    spectra: Spectra, out: Path, command: str, setup: Mapping[str, str], dynamics: Mapping[str, Dynamics] | None = None
) -> Path:
    """Writes ntk.html, ntk.csv, ntk.json and figures/ (and dynamics.json) into a folder; returns the page's path."""
    drawn = {"spectra": kernel_figures.spectra(spectra.networks)}
    if dynamics:
        drawn |= {"dynamics-loss": kernel_figures.training(dynamics), "dynamics-kernel": kernel_figures.drift(dynamics)}
        files.write_json(out / DYNAMICS, {label: dataclasses.asdict(found) for label, found in dynamics.items()})
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figures.save(figure, out / "figures" / name)
    spectra.save(out / RECORD)
    files.write_text(out / TABLE, _csv(spectra.networks))
    facts = {
        "spectra": spectra,
        "figures": {name: figures.inline(figure, name) for name, figure in drawn.items()},
        "dynamics": dynamics or {},
        "setup": setup,
        "command": command,
    }
    files.write_text(out / PAGE, templates().get_template(f"{PAGE}.jinja").render(facts))
    return out / PAGE


def section(spectra: Spectra, out: Path) -> dict[str, Any]:
    """What the report of a comparison shows of kernels: the figure, which is saved with the others, and the numbers."""
    figure = kernel_figures.spectra(spectra.networks)
    figures.save(figure, out / "figures" / "spectra")
    return {"settings": spectra.settings, "networks": spectra.networks, "figure": figures.inline(figure, "spectra")}


def table(networks: Sequence[Network]) -> Table:
    """For the terminal."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.add_column("network", overflow="fold")
    for name in ("sparsity", "trace", "largest", "smallest", "condition", "eff. rank", "alignment", "largest lr"):
        shown.add_column(name, justify="right", no_wrap=True)
    for n in networks:
        shown.add_row(
            Text(n.label),
            f"{100 * n.sparsity:.2f} %",
            f"{n.trace:.3g}",
            f"{n.eigenvalues[0]:.3g}",
            "" if n.smallest is None else f"{n.smallest:.3g}",
            _number(n.condition_number),
            _number(n.effective_rank),
            "" if n.alignment is None else f"{n.alignment:.3f}",
            f"{n.largest_stable_lr:.2e}",
        )
    return shown


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _csv(networks: Sequence[Network]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*COLUMNS, "largest", "smallest"))
    for n in networks:
        values = [getattr(n, name) for name in COLUMNS]
        short = [f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in values]
        smallest = "" if n.smallest is None else f"{n.smallest:.6g}"
        writer.writerow((*short, f"{n.eigenvalues[0]:.6g}", smallest))
    return text.getvalue()
