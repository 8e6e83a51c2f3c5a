"""`sapwood compare`: methods, sparsities and seeds, each trained, and a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sapwood.checks import Processes
from sapwood.cli.flags import OptionalFolder, Training
from sapwood.errors import ConfigError
from sapwood.experiments import kernel_run, terminal
from sapwood.experiments.compare import compare
from sapwood.experiments.config import DENSE, Place, RunConfig
from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.environment import device_of
from sapwood.experiments.grid import Grid
from sapwood.experiments.kernels import KernelConfig
from sapwood.experiments.live import SweepProgress
from sapwood.experiments.recipes import digits
from sapwood.experiments.summary import summarise

FAILED = 1  # exit code


@dataclass(frozen=True)
class Compare:
    """Compare pruning methods: prune and train with each, then write a report. Alone, it runs a demo in two minutes.

    Finished runs in DIR are not run again, so that a comparison may be interrupted, repeated and extended.

    Attributes:
        grid: What is compared; the dense model always is.
        training: How the networks are trained; the defaults are made for the demo, the digits.
        place: Where it is computed.
        out: Folder for report.html, results.csv, figures and runs; the default is runs/DATA, such as runs/digits.
        workers: Processes that run side by side; the default is one a CPU core, or one on a GPU.
        ntk: Also compute the tangent kernels of the first seed's networks at this sparsity, and show their spectra.
    """

    grid: Grid = field(default_factory=lambda: digits().grid)
    training: Training = field(default_factory=lambda: Training(**dataclasses.asdict(digits().train)))
    place: Place = field(default_factory=Place)
    out: OptionalFolder = None
    workers: Processes | None = None
    ntk: float | None = None

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code, which is not 0 if a run failed."""
        configs, out = self.grid.runs(self.training), self.out or Path("runs") / self.grid.data
        return compare_and_report(configs, out, self.place, EngineConfig(workers=self.workers), typed, ntk=self.ntk)


def compare_and_report(  # the runs, where, how, and what is told of them
    configs: Sequence[RunConfig],
    out: Path,
    place: Place,
    engine: EngineConfig,
    typed: str,
    *,
    tracker: str | None = None,
    expected: Mapping[tuple[str, float], float] | None = None,
    ntk: float | None = None,
) -> int:
    """Does the runs and shows how far they are, then shows the table and writes the report; returns the exit code."""
    _check_sparsity(ntk, configs)
    if engine.engine == "local":  # those of a cluster have other devices
        device_of(place.device)
    with SweepProgress(configs, out, f"{configs[0].model} on {configs[0].data}, runs") as progress:
        outcomes = compare(configs, out, place, engine=engine, tracker=tracker, on_run=progress.take)
    failed = [outcome for outcome in outcomes if outcome.result is None]
    for outcome in failed:
        terminal.complain("error", f"{terminal.run_name(outcome.config)}: {outcome.error}")
    if len(failed) < len(outcomes):
        from sapwood.experiments.report import write_report  # here, because matplotlib takes a second to import

        spectra = None if ntk is None else kernel_run.of_comparison(outcomes, out, ntk, KernelConfig(), place)
        # Before anything is shown: whoever reads it may have gone.
        report = write_report(outcomes, out, typed, expected=expected, spectra=spectra)
        with terminal.reader_may_leave():
            terminal.show(terminal.comparison_table(summarise(outcomes)))
            print(report, flush=True)
    return FAILED if failed else 0


def _check_sparsity(ntk: float | None, configs: Sequence[RunConfig]) -> None:
    there = sorted({round(1 - config.density, 12) for config in configs if config.method != DENSE})
    if ntk is not None and not any(abs(ntk - sparsity) < 1e-9 for sparsity in there):
        known = ", ".join(f"{sparsity:g}" for sparsity in there)
        raise ConfigError(f"--ntk {ntk:g} is none of the comparison's sparsities: {known}.")
