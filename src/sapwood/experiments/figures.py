"""The figures of a report, and how they are put into a page and into files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from sapwood.experiments.config import DENSE, SAME_LAYERS
from sapwood.experiments.looks import GRID, INK, MUTED, SERIES, control_of, looks, subject_of
from sapwood.experiments.summary import Summary
from sapwood.files import write_in_one_step

FAINT: Any = {"linestyle": ":", "linewidth": 1.2, "alpha": 0.6, "marker": "_", "markersize": 8, "markeredgewidth": 1.6}
APART = 1.018  # factor between the points of methods at one sparsity

Curve = Sequence[tuple[float, float]]
Published = Mapping[tuple[str, float], float]

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be found
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
}


def accuracy(summary: Summary, published: Published) -> Figure:
    """Test accuracy against sparsity: mean and standard deviation of every method, the dense model as a band.

    Args:
        summary: The numbers.
        published: Others' test accuracies, percent, by method and sparsity; drawn faintly.
    """
    with axes_of((4.7, 3.4)) as (figure, axes):
        dense = summary.dense
        axes.set_xscale("log")
        axes.set_xlim(*_limits(summary))
        if dense.n:
            axes.axhspan(dense.mean - dense.std, dense.mean + dense.std, color=MUTED, alpha=0.15, linewidth=0)
            axes.axhline(dense.mean, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.4, label=DENSE)
        for i, (method, look) in enumerate(looks(summary.methods).items()):
            shift = APART ** ((len(summary.methods) - 1) / 2 - i)  # side by side, so that the bars can be told apart
            cells = [(s, cell) for s, cell in summary.cells[method].items() if cell.n]
            axes.errorbar(
                [(1 - s) * shift for s, _ in cells],
                [cell.mean for _, cell in cells],
                [cell.std for _, cell in cells],
                label=method,
                elinewidth=1.2,
                **look,
            )
            known = [(s, published[method, s]) for s in summary.sparsities if (method, s) in published]
            axes.plot([(1 - s) * shift for s, _ in known], [value for _, value in known], **{**look, **FAINT})
        if published:
            axes.plot([], [], color=MUTED, label="as published", **FAINT)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([1 - s for s in summary.sparsities], [f"{100 * s:g}" for s in summary.sparsities])
        axes.set_xlabel("sparsity: weights removed, %")
        axes.set_ylabel("test accuracy, %")
        legend(figure)
    return figure


def _limits(summary: Summary) -> tuple[float, float]:
    """Densities at the left and right edge, which have a distance also where all points are at one sparsity."""
    densest, sparsest = 1 - summary.sparsities[0], 1 - summary.sparsities[-1]
    margin = max(1.05 * APART ** (len(summary.methods) / 2), (densest / sparsest) ** 0.05)
    return densest * margin, sparsest / margin


def layers(densities: Mapping[str, Mapping[str, float]], overall: float, order: Sequence[str]) -> Figure:
    """Density of every layer under every method, in percent on a log scale; an empty layer is drawn at the bottom.

    Args:
        densities: By method and layer, 0 to 1; controls with the densities of their method are left out.
        overall: Density of the whole network.
        order: All methods of the report, which share out colours and markers.
    """
    names = list(next(iter(densities.values())))
    positive = [d for by_layer in densities.values() for d in by_layer.values() if d > 0]
    bottom = min(positive, default=overall) / 2
    with axes_of((4.7, 3.4)) as (figure, axes):
        axes.axhline(100 * overall, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.4, label="all layers")
        for method, by_layer in densities.items():
            if control_of(method) not in SAME_LAYERS or subject_of(method) not in densities:
                values = [100 * (by_layer[name] or bottom) for name in names]
                axes.plot(range(len(names)), values, label=method, **looks(order)[method])
        _log_scale(axes)
        if any(not d for by_layer in densities.values() for d in by_layer.values()):
            axes.text(0.005, 100 * bottom, "empty", transform=axes.get_yaxis_transform(), va="bottom", color=MUTED)
        step = max(1, len(names) // 14)
        labels = [name.removesuffix(".weight") for name in names]
        axes.set_xticks(range(0, len(names), step), labels[::step], fontsize=7.5)
        if len(names) > 4:
            axes.tick_params("x", rotation=40)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
        axes.set_ylabel("density, % (log scale)")
        legend(figure)
    return figure


def curves(by_method: Mapping[str, Curve], label: str, order: Sequence[str], *, log: bool = False) -> Figure:
    """One line a method over the epochs; "dense" is drawn in grey."""
    with axes_of((3.5, 3.0)) as (figure, axes):
        dense = {"color": MUTED, "linestyle": (0, (4, 3))}
        for method, points in by_method.items():
            look = dense if method == DENSE else looks(order)[method]
            every = max(1, len(points) // 8)
            axes.plot([x for x, _ in points], [y for _, y in points], label=method, markevery=every, **look)
        if log:
            _log_scale(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        legend(figure, size=7.5)
    return figure


def inline(figure: Figure, title: str) -> str:
    """The figure as SVG for an HTML page, whose style sheet gives the colours (`--series-0`, `--muted`, `--grid`)."""
    text = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure.savefig(text, format="svg", transparent=True, metadata=_no_metadata())
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", title)
    svg = re.sub(r'((?:id|href)="#?|url\(#)', rf"\g<1>{prefix}-", svg)  # ids are unique on the page
    for i, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--series-{i})")
    svg = svg.replace(INK, "currentColor").replace(MUTED, "var(--muted)").replace(GRID, "var(--grid)")
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg)  # the page decides
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def save(figure: Figure, stem: Path) -> None:
    """Writes STEM.png and STEM.svg, on white."""
    svg, png = io.BytesIO(), io.BytesIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": stem.name}):
        figure.savefig(svg, format="svg", facecolor="white", metadata=_no_metadata())
        figure.savefig(png, format="png", facecolor="white", dpi=200)
    write_in_one_step(stem.with_suffix(".svg"), svg.getvalue())
    write_in_one_step(stem.with_suffix(".png"), png.getvalue())


def _no_metadata() -> dict[str, None]:
    return dict.fromkeys(("Creator", "Date", "Format", "Type"))


@contextmanager
def axes_of(inches: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """A figure of a size with one pair of axes, in the style of all figures."""
    with mpl.rc_context(_STYLE):
        figure = Figure(inches, layout="constrained")
        yield figure, figure.add_subplot()


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 50 else (1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def legend(figure: Figure, size: float = 9) -> None:
    """Above the axes, in as many columns as fit; the figure grows by the rows beyond the first two."""
    labels = [text for axes in figure.axes for text in axes.get_legend_handles_labels()[1]]
    inches = size / 9 * (0.5 + 0.075 * max(map(len, labels), default=0))
    columns = max(1, min(4, int(figure.get_figwidth() / inches)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + size / 9 * 0.18 * max(0, rows - 2))
    figure.legend(
        loc="outside upper left",
        ncols=columns,
        fontsize=size,
        handlelength=1.8,
        columnspacing=1.4,
        borderaxespad=0,
    )
