"""Where the runs of a sweep are computed: processes of this machine, a Ray cluster, or Slurm. None of them is ours.

An engine is a function `(jobs, config) -> outcomes`, which come in any order. It does every job, retries those whose
process died, and ends its processes when the iterator is closed.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, cast

from sapwood.checks import Count, Natural, OneOf, Processes, Range, check
from sapwood.errors import ConfigError
from sapwood.experiments.job import Job, Outcome

MOST_THREADS = 4096
NEEDS = {"local": None, "ray": "ray", "slurm": "submitit"}  # the package behind each engine


@dataclass(frozen=True)
class EngineConfig:
    """Where runs are computed, and how many at a time; no result depends on it but for rounding.

    Attributes:
        engine: local (processes of this machine), ray, or slurm.
        address: For ray: "local" starts a cluster on this machine, "auto" finds the running one, or HOST:PORT. For
            slurm: the cluster as submitit names it, slurm or local. The default is "local" for ray, "slurm" for slurm.
        workers: Runs at a time. The default is one a CPU core, or --runs-per-gpu on each GPU; with ray and slurm, what
            the cluster has room for. 1 with the local engine stays in one process.
        runs_per_gpu: Runs that share a GPU (local and ray).
        cpus_per_run: Threads of a run, and with ray and slurm the cores it asks for; the default divides the cores of
            this machine among the workers, and is 1 with ray and slurm.
        retries: Times that a run begins again where it was after its process died.
        submit: For slurm: parameters of the job as submitit names them, such as timeout_min=600 gpus_per_node=1.
    """

    engine: Annotated[str, OneOf("engine", tuple(NEEDS))] = "local"
    address: str | None = None
    workers: Processes | None = None
    runs_per_gpu: Count = 1
    cpus_per_run: Annotated[int, Range(1, MOST_THREADS)] | None = None
    retries: Natural = 2
    submit: tuple[str, ...] = ()


class Engine(Protocol):
    """Does jobs."""

    def __call__(self, jobs: Sequence[Job], config: EngineConfig) -> Generator[Outcome]:
        """Yields one outcome a job, each as soon as it is there."""


def find(config: EngineConfig) -> Engine:
    """The engine that a config names.

    Raises:
        ConfigError: there is no such engine, its package is not installed, or a setting is illegal for it.
    """
    _check(config)
    if (package := NEEDS[config.engine]) is not None:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"The engine {config.engine!r} needs the package {package!r} ({error}): "
                "install it with pip install 'sapwood[cluster]', or take --engine local."
            ) from error
    return cast(Engine, importlib.import_module(f"{__name__}.{config.engine}").outcomes)


def _check(config: EngineConfig) -> None:
    check(config)
    for name, engines in (("address", ("ray", "slurm")), ("submit", ("slurm",))):
        if getattr(config, name) and config.engine not in engines:
            raise ConfigError(f"{name} is for the engine {' or '.join(engines)}; the engine is {config.engine!r}.")
