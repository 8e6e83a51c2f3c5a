"""Runs of a comparison, side by side: one that fails does not stop the others, a finished one is not repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from sapwood.errors import SapwoodError
from sapwood.experiments import engines, levels, trackers
from sapwood.experiments.config import Place, RunConfig
from sapwood.experiments.engines import Engine, EngineConfig
from sapwood.experiments.job import Job, Outcome
from sapwood.experiments.material import create_model, load_data
from sapwood.experiments.run import finished

__all__ = ["Outcome", "compare", "run_folder"]


def compare(
    configs: Sequence[RunConfig],
    out: Path,
    place: Place,
    *,
    engine: EngineConfig | None = None,
    tracker: str | None = None,
    on_run: Callable[[Outcome, bool], None] = lambda outcome, fresh: None,
) -> list[Outcome]:
    """Does every run that is not finished in `out/runs` yet.

    Several calls may work on the same folder at a time: each run is done by one of them.

    Args:
        configs: The runs.
        out: The comparison's folder.
        place: Device and data.
        engine: Where runs are computed; None: in processes of this machine.
        tracker: Where metrics go besides the runs' folders: a name of `trackers`, or package.module:function.
        on_run: Called with every outcome, and whether it is fresh (False: finished by an earlier call).

    Returns:
        One outcome a config, in their order.

    Raises:
        SapwoodError: what would make every run fail: data, model, device, engine or tracker that are not there, or a
            full disk.
    """
    engine = engine or EngineConfig()
    perform = engines.find(engine)
    if tracker is not None:
        trackers.find(tracker)
    outcomes: dict[str, Outcome] = {}
    kept = levels.kept_weights(configs)
    for config in configs:
        if (result := finished(config, run_folder(out, config), kept.get(config.id, ()))) is not None:
            outcomes[config.id] = Outcome(config, result)
            on_run(outcomes[config.id], False)
    jobs = [
        Job(c, run_folder(out, c), place, tracker, keep=kept.get(c.id, ())) for c in configs if c.id not in outcomes
    ]
    if jobs:
        # Fails here and once, rather than in every run; a download happens once, too.
        first = jobs[0].config
        create_model(first.model, load_data(first.data, first.resolution, place), first.seed)

    def take(outcome: Outcome) -> None:
        outcomes[outcome.config.id] = outcome
        on_run(outcome, True)

    busy = _perform(perform, jobs, engine, out, take)
    patient = [dataclasses.replace(job, wait=True) for job in busy]  # another process's runs, at last
    _perform(perform, patient, engine, out, take)
    return [outcomes[config.id] for config in configs]


def run_folder(out: Path, config: RunConfig) -> Path:
    """Where a comparison keeps a run."""
    return out / "runs" / config.id


def _perform(
    perform: Engine, jobs: Sequence[Job], engine: EngineConfig, out: Path, take: Callable[[Outcome], None]
) -> list[Job]:
    """Does the jobs; returns those that another process is at."""
    busy: set[str] = set()
    if jobs:
        # Closed, so that its processes end before an error is reported.
        with closing(perform(jobs, engine)) as outcomes:
            for outcome in outcomes:
                if outcome.disk_full:
                    raise SapwoodError(
                        f"The disk is full ({outcome.error}): make room, and the same command goes on from here; "
                        "finished runs and checkpoints are kept."
                    )
                if outcome.busy:
                    busy.add(outcome.config.id)
                else:
                    take(outcome)
    return [job for job in jobs if job.config.id in busy]
