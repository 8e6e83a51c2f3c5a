"""`sapwood sweep`: a comparison on one machine or many."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from sapwood.cli.compare import compare_and_report
from sapwood.cli.flags import OptionalFolder, Tracker, Training
from sapwood.experiments.config import Place
from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.grid import Grid
from sapwood.experiments.recipes import digits


@dataclass(frozen=True)
class Sweep:
    """Compare pruning methods as `sapwood compare` does, in local processes, on a Ray cluster or with Slurm.

    The nodes of a cluster must see DIR and the data at the same paths. Finished runs in DIR are not run again, those
    that were interrupted go on where they were, and several sweeps may share DIR: no run is done twice.

    Attributes:
        grid: What is compared; the dense model always is.
        training: How the networks are trained; the defaults are made for the demo, the digits.
        place: Where it is computed.
        engine: What computes it.
        out: Folder for report.html, results.csv, figures and runs; the default is runs/DATA, such as runs/digits.
        tracker: Where metrics go besides DIR: tensorboard, wandb, mlflow, trackio, or package.module:function.
    """

    grid: Grid = field(default_factory=lambda: digits().grid)
    training: Training = field(default_factory=lambda: Training(**dataclasses.asdict(digits().train)))
    place: Place = field(default_factory=Place)
    engine: EngineConfig = field(default_factory=EngineConfig)
    out: OptionalFolder = None
    tracker: Tracker | None = None

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code, which is not 0 if a run failed."""
        configs, out = self.grid.runs(self.training), self.out or Path("runs") / self.grid.data
        return compare_and_report(configs, out, self.place, self.engine, typed, tracker=self.tracker)
