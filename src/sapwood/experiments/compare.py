"""Runs of a comparison, side by side: one that fails does not stop the others, a finished one is not repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from sapwood.errors import SapwoodError
from sapwood.experiments import engines, identity, levels, recorded, trackers
from sapwood.experiments.config import Place, RunConfig
from sapwood.experiments.engines import Engine, EngineConfig
from sapwood.experiments.job import Job, Outcome
from sapwood.experiments.material import load_data
from sapwood.experiments.recorded import run_folder
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
    kept = levels.kept_weights(configs)
    results = {c.id: finished(c, run_folder(out, c), kept.get(c.id, ())) for c in configs}
    recorded.check(configs, results, out, place)
    outcomes: dict[str, Outcome] = {}
    jobs: list[Job] = []
    for config in configs:
        if (result := results[config.id]) is not None:
            outcomes[config.id] = Outcome(config, result)
            on_run(outcomes[config.id], False)
        else:
            jobs.append(_job(config, out, place, tracker, kept.get(config.id, ())))

    def take(outcome: Outcome) -> None:
        outcomes[outcome.config.id] = outcome
        on_run(outcome, True)

    busy = _perform(perform, jobs, engine, out, take)
    patient = [dataclasses.replace(job, wait=True) for job in busy]  # another process's runs, at last
    _perform(perform, patient, engine, out, take)
    return [outcomes[config.id] for config in configs]


def _job(config: RunConfig, out: Path, place: Place, tracker: str | None, keep: tuple[int, ...]) -> Job:
    dataset = load_data(config.data, config.resolution, place)
    inputs = identity.inputs(config, dataset)
    return Job(config, run_folder(out, config), place, tracker, keep=keep, inputs=inputs)


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
