"""`sapwood compare`: methods, sparsities and seeds, each trained, and a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sapwood.cli.flags import OptionalFolder, Recipe
from sapwood.experiments import terminal
from sapwood.experiments.compare import Outcome, compare
from sapwood.experiments.config import Place
from sapwood.experiments.grid import Grid
from sapwood.experiments.summary import summarise

FAILED = 1  # exit code


@dataclass(frozen=True)
class Compare:
    """Compare pruning methods: prune and train with each, then write a report. Alone, it runs a demo in two minutes.

    Finished runs in DIR are not run again, so that a comparison may be interrupted, repeated and extended.

    Attributes:
        grid: What is compared; the dense model always is.
        recipe: How the networks are trained; the defaults are made for the demo, the digits.
        place: Where it is computed.
        out: Folder for report.html, results.csv, figures and runs; the default is runs/DATA, such as runs/digits.
        workers: Processes that run side by side; the default is one a CPU core, or one on a GPU.
    """

    grid: Grid = field(default_factory=Grid)
    recipe: Recipe = field(
        default_factory=lambda: Recipe(epochs=5, batch_size=64, lr=0.1, schedule="one-cycle", milestones=())
    )
    place: Place = field(default_factory=Place)
    out: OptionalFolder = None
    workers: int | None = None

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code, which is not 0 if a run failed."""
        configs, out = self.grid.runs(self.recipe), self.out or Path("runs") / self.grid.data
        with terminal.progress() as bar:
            task = bar.add_task(f"{self.grid.model} on {self.grid.data}, runs", total=len(configs))

            def show(outcome: Outcome, fresh: bool) -> None:
                bar.advance(task)
                if fresh and not bar.disable:
                    bar.console.print(terminal.outcome_line(outcome))

            outcomes = compare(configs, out, self.place, workers=self.workers, on_run=show)
        failed = [outcome for outcome in outcomes if outcome.result is None]
        for outcome in failed:
            terminal.complain("error", f"{terminal.run_name(outcome.config)}: {outcome.error}")
        if len(failed) < len(outcomes):
            from sapwood.experiments.report import write_report  # here, because matplotlib takes a second to import

            terminal.show(terminal.comparison_table(summarise(outcomes)))
            print(write_report(outcomes, out, typed))
        return FAILED if failed else 0
