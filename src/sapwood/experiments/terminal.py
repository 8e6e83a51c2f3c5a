"""What is shown in a terminal: layer tables, the table of a comparison, progress bars on standard error."""

from __future__ import annotations

import codecs
import csv
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sapwood.experiments.compare import Outcome
from sapwood.experiments.config import RunConfig
from sapwood.experiments.summary import Summary
from sapwood.masks import Masks
from sapwood.text import one_line, visible

SPELLED = {"\N{ALMOST EQUAL TO}": "~", "\N{PLUS-MINUS SIGN}": "+/-", "\N{EN DASH}": "-"}
"""What stands for a character where the terminal or the pipe has none for it."""
PIPE_WIDTH = 200  # in a pipe or a file there is no width to fit into, and a cut layer name is of no use


def show(table: Table | Group) -> None:
    """Prints on standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    with console.capture() as drawn:  # rich itself would end the program at a closed pipe
        console.print(table)
    print(drawn.get(), end="")


def layer_rows(masks: Masks) -> list[tuple[str, str, int, int, float]]:
    """Name, shape, kept and all weights, density of every layer."""
    return [
        (visible(name), "x".join(map(str, masks[name].shape)), count.kept, count.total, count.density)
        for name, count in masks.per_layer().items()
    ]


def mask_table(masks: Masks) -> Table:
    """The layers of masks, with a sum."""
    table = _table("layer", "shape", right=("kept", "weights", "density"))
    for name, shape, kept, total, density in layer_rows(masks):
        table.add_row(Text(name), shape, f"{kept:,}", f"{total:,}", f"{density:.2%}", style=None if kept else "red")
    table.add_section()
    table.add_row("all", "", f"{masks.kept:,}", f"{masks.total:,}", f"{masks.density:.2%}", style="bold")
    return table


def provenance_table(masks: Masks) -> Table:
    """How masks came about, one line a fact."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for key, value in masks.provenance.items():
        text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(Text(visible(key), style="dim"), Text(visible(text)))
    return table


def print_csv(masks: Masks) -> None:
    """The layers as comma-separated values on standard output."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("layer", "shape", "kept", "weights", "density"))
    writer.writerows(layer_rows(masks))


def weight_table(weights: Mapping[str, Tensor]) -> Table:
    """The prunable weights of a model, with a sum."""
    table = _table("layer", "shape", right=("weights",))
    for name, weight in weights.items():
        table.add_row(Text(visible(name)), "x".join(map(str, weight.shape)), f"{weight.numel():,}")
    table.add_section()
    table.add_row("all", "", f"{sum(weight.numel() for weight in weights.values()):,}", style="bold")
    return table


def comparison_table(summary: Summary) -> Group:
    """Method by sparsity: mean and standard deviation of the test accuracy; best and tied in bold."""
    table = _table("method", right=(*(f"{100 * s:g} %" for s in summary.sparsities), "n"))
    for method in summary.methods:
        cells = [summary.cells[method][s] for s in summary.sparsities]
        texts = [Text(f"{c} {'≈' if c.tied else ' '}", style="bold" if c.best or c.tied else "") for c in cells]
        table.add_row(Text(method), *texts, "-".join(map(str, dict.fromkeys(c.n for c in cells))))
    table.add_section()
    table.add_row("dense", f"{summary.dense}  ", *[""] * (len(summary.sparsities) - 1), str(summary.dense.n))
    return Group(
        Text("Test accuracy after the last epoch, % (mean ± std over n seeds)\n"),
        table,
        Text(
            "\nbold: best of its sparsity and, marked ≈, what is not told from it (95 %, paired by seed, "
            "error pooled over methods)",
            style="dim",
        ),
    )


@contextmanager
def progress(*columns: str, silent: bool = False) -> Iterator[Progress]:
    """A bar on standard error, and nothing where that is not a terminal; `columns` are field names to show after it."""
    console = Console(stderr=True, highlight=False)
    shown = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in columns]
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *shown,
        console=console,
        transient=True,
        disable=silent or not console.is_terminal,
    ) as bar:
        yield bar


def outcome_line(outcome: Outcome) -> str:
    """One finished run in one line."""
    if outcome.result is None:
        return f"{run_name(outcome.config)}  failed: {one_line(outcome.error)}"
    result = outcome.result
    seconds = f"{result.prune_seconds:.1f} s to prune, {result.train_seconds:.1f} s to train"
    return f"{run_name(outcome.config)}  {result.test_accuracy:6.2f} %  ({seconds})"


def run_name(config: RunConfig) -> str:
    """Method, sparsity and seed."""
    return f"{config.label:<10} {100 * (1 - config.density):5.4g} %  seed {config.seed}"


def complain(kind: str, message: object) -> None:
    """One line on standard error, as programs do."""
    with reader_may_leave():
        print(f"sapwood: {kind}: {one_line(message)}", file=sys.stderr)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Ends the block, and nothing else, where the reader of the output, such as `head`, has seen enough."""
    try:
        yield
    except BrokenPipeError:
        drop_unwritable()


def drop_unwritable() -> None:
    """Sends what is left of a stream that takes no more to nowhere, or Python would complain of it at its end."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


@contextmanager
def legible() -> Iterator[None]:
    """Spells characters that a stream's encoding lacks, rather than to fail on them."""
    codecs.register_error("spelled", _spell)
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    try:
        for stream in streams:
            stream.reconfigure(errors="spelled")
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with suppress(OSError, ValueError):  # closed meanwhile
                stream.reconfigure(errors=errors)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    escaped = (SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return "".join(escaped), error.end


def _table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
