"""Runs as jobs of Slurm, through submitit; the nodes share a file system with this machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import as_completed

from sapwood.errors import ConfigError
from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.engines.local import died
from sapwood.experiments.job import Job, Outcome, attempt

POLL = {"local": 0.2, "slurm": 10.0}  # seconds between two looks at the jobs
MINUTES = 24 * 60  # of a job, where nothing else is said: submitit's own 5 would end most runs


def outcomes(jobs: Sequence[Job], config: EngineConfig) -> Generator[Outcome]:
    """Submits all jobs as one array; those that Slurm lost are submitted again."""
    cluster = config.address or "slurm"
    executor = _executor(jobs[0].folder.resolve().parent.parent / "slurm", cluster, config)
    there = [_there(job, config.cpus_per_run or 1) for job in jobs]
    with executor.batch():
        handles = [executor.submit(attempt, job) for job in there]
    running = {handle: (job, 0) for handle, job in zip(handles, there, strict=True)}
    try:
        while running:
            for handle in as_completed(list(running), poll_frequency=POLL.get(cluster, 1.0)):
                job, deaths = running.pop(handle)
                if (error := handle.exception()) is None:
                    yield handle.result()
                elif deaths < config.retries:
                    running[executor.submit(attempt, job)] = (job, deaths + 1)
                else:
                    yield died(job, deaths + 1, f" ({type(error).__name__}, see {handle.paths.stderr})")
    finally:
        for handle in running:
            handle.cancel()


def _executor(logs: Path, cluster: str, config: EngineConfig) -> submitit.AutoExecutor:
    """An executor with the parameters of a job.

    Raises:
        ConfigError: this machine has no such cluster, or submitit knows no such parameter.
    """
    parameters: dict[str, Any] = {
        "name": "sapwood",
        "timeout_min": MINUTES,
        "cpus_per_task": config.cpus_per_run or 1,
        **({} if config.workers is None else {"slurm_array_parallelism": config.workers}),
        **dict(_parameter(entry) for entry in config.submit),
    }
    try:
        executor = submitit.AutoExecutor(logs, cluster=cluster)
        executor.update_parameters(**parameters)
    except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
        raise ConfigError(f"submitit refuses the cluster {cluster!r} or a parameter: {error}") from error
    return executor


def _parameter(entry: str) -> tuple[str, Any]:
    key, equals, text = entry.partition("=")
    if not equals:
        raise ConfigError(f"submit takes KEY=VALUE, such as timeout_min=600; {entry!r} came.")
    try:
        return key, json.loads(text)
    except json.JSONDecodeError:
        return key, text


def _there(job: Job, cpus: int) -> Job:
    return dataclasses.replace(job, folder=job.folder.resolve(), threads=cpus)
