"""A sweep while it goes on, on standard error: a bar over all runs, and a line for each that runs now.

The lines are read from the runs' folders, so that every engine shows them, wherever its processes are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from sapwood import files
from sapwood.experiments import store
from sapwood.experiments.compare import Outcome, run_folder
from sapwood.experiments.config import DENSE, RunConfig
from sapwood.experiments.terminal import outcome_line, run_name


@dataclass(frozen=True)
class Status:
    """Where a run is.

    Attributes:
        config: The run.
        epoch: Epochs trained; None while it prunes.
        accuracy: On the test set after the last epoch, percent; None before the first.
        images_per_second: Of training in the last epoch; None before the first.
        seconds_left: Of training, at the mean pace so far; None before the first epoch.
    """

    config: RunConfig
    epoch: int | None
    accuracy: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None


def status(config: RunConfig, folder: Path, since: float) -> Status | None:
    """Reads where a run is; None if it is finished, or nobody began or resumed it after `since` (Unix seconds)."""
    try:
        if (folder / store.CONFIG).stat().st_mtime < since or (folder / store.RESULT).exists():
            return None
        rows = files.read_rows(folder / store.METRICS)
        last = rows[-1]
        left = (config.train.epochs - last["epoch"]) * statistics.mean(row["seconds"] for row in rows)
        return Status(config, last["epoch"], last["test_accuracy"], last["images_per_second"], left)
    except (OSError, ValueError, LookupError, TypeError):  # nothing there yet, or damaged
        prunes = config.method != DENSE and not (folder / store.MASKS).exists()
        return Status(config, None if prunes else 0) if (folder / store.CONFIG).exists() else None


class TimeLeft(ProgressColumn):
    """Of a sweep, at the pace of the runs that were finished in it.

    Rich's own column measures from the first of them to the last: nothing at first, and next to nothing for two runs
    that began side by side.
    """

    def render(self, task: Task) -> Text:
        """Draws it."""
        fresh, elapsed = task.fields["fresh"], task.elapsed
        if not fresh or elapsed is None:
            return Text("-:--:-- left", style="progress.remaining")
        return Text(
            f"{timedelta(seconds=round((task.remaining or 0) * elapsed / fresh))} left", style="progress.remaining"
        )


class SweepProgress(Progress):
    """The bar and the lines; silent where standard error is no terminal."""

    def __init__(self, configs: Sequence[RunConfig], out: Path, title: str, console: Console | None = None) -> None:
        # Before the base class draws for the first time.
        self._unfinished = {config.id: (config, run_folder(out, config)) for config in configs}
        self._since = time.time() - 1  # file systems round
        console = console or Console(stderr=True, highlight=False)
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeLeft(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=1,
        )
        self._all = self.add_task(title, total=len(configs), fresh=0)

    def take(self, outcome: Outcome, fresh: bool) -> None:
        """Counts a run, and prints it if it is fresh."""
        self._unfinished.pop(outcome.config.id, None)
        self.update(self._all, advance=1, fresh=self.tasks[0].fields["fresh"] + fresh)
        if fresh and not self.disable:
            self.console.print(outcome_line(outcome), markup=False)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws, once a second."""
        yield from super().get_renderables()
        found = (status(config, folder, self._since) for config, folder in list(self._unfinished.values()))
        yield run_table([each for each in found if each is not None])


def run_table(running: Sequence[Status]) -> Table:
    """One line a run: method, sparsity and seed; epoch, accuracy, images per second, time left."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for each in running:
        table.add_row(Text(run_name(each.config), style="dim"), *_cells(each))
    return table


def _cells(each: Status) -> list[str]:
    if each.epoch is None:
        return ["pruning"]
    epoch = f"epoch {each.epoch}/{each.config.train.epochs}"
    if each.accuracy is None or each.images_per_second is None or each.seconds_left is None:
        return [epoch]
    left = timedelta(seconds=round(each.seconds_left))
    return [epoch, f"{each.accuracy:.2f} %", f"{each.images_per_second:,.0f} images/s", f"{left} left"]
