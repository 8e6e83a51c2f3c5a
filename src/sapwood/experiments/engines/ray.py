"""Runs as tasks of a Ray cluster, whose nodes share a file system with this machine. Ray schedules and retries."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from sapwood.errors import ConfigError
from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.engines.local import died
from sapwood.experiments.job import Job, Outcome, attempt


def outcomes(jobs: Sequence[Job], config: EngineConfig) -> Generator[Outcome]:
    """Does the jobs where Ray has room; a run whose worker was killed begins again where it was."""
    with _cluster(config.address or "local"):
        gpus = _gpus(jobs[0].place.device, config)
        cpus = config.cpus_per_run or 1
        # Ray types remote functions by what they return, which is an Outcome either way.
        task: Any = ray.remote(attempt)
        task = task.options(num_cpus=cpus, num_gpus=gpus, max_retries=config.retries, name="sapwood")
        remaining, running = iter(jobs), dict[Any, Job]()
        while True:
            for job in itertools.islice(remaining, (config.workers or len(jobs)) - len(running)):
                running[task.remote(_there(job, cpus, gpus))] = job
            if not running:
                return
            done, _ = ray.wait(list(running))
            for reference in done:
                yield _outcome(reference, running.pop(reference), config.retries)


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    """Connects to a cluster, or starts one; the one that the caller's process is connected to is left as it is."""
    connected = ray.is_initialized()
    if not connected:
        own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except Exception as error:  # which is all that Ray calls it where a node is slow to start
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"There is no Ray cluster at address {address!r} ({reason}); start one with `ray start --head`, or "
                "take --address local."
            ) from error
    try:
        yield
    finally:
        if not connected:
            ray.shutdown()


def _gpus(device: str, config: EngineConfig) -> float:
    """The share of a GPU that a run asks for."""
    there = ray.cluster_resources().get("GPU", 0) > 0
    if device.startswith("cuda") and not there:
        raise ConfigError(f"The device is {device!r}, but the Ray cluster has no GPU; take --device cpu.")
    return 1 / config.runs_per_gpu if there and device != "cpu" else 0


def _there(job: Job, cpus: int, gpus: float) -> Job:
    """A job in the terms of the node that takes it, to which Ray shows the GPU it chose and no other."""
    place = dataclasses.replace(job.place, device="cuda" if gpus else "cpu")
    return dataclasses.replace(job, folder=job.folder.resolve(), place=place, threads=cpus)


def _outcome(reference: Any, job: Job, retries: int) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
        return outcome
    except RayTaskError as error:  # the node could not even begin: no Sapwood there, or another version
        return Outcome(job.config, None, str(error).strip().splitlines()[-1])
    except RayError as error:
        return died(job, retries + 1, f" ({type(error).__name__})")
