"""Runs in spawned processes of this machine, the GPUs shared out among them."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import torch

from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.environment import cores, device_of
from sapwood.experiments.job import Job, Outcome, attempt


@dataclass
class _Worker:
    """One process for one run after the other; a pool of its own, because a process that dies breaks its whole pool."""

    device: str
    threads: int
    pool: ProcessPoolExecutor = field(default_factory=lambda: _Worker.new_pool())

    @staticmethod
    def new_pool() -> ProcessPoolExecutor:
        # A forked torch may hang in its thread pool.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker)

    def submit(self, job: Job) -> Future[Outcome]:
        here = dataclasses.replace(job.place, device=self.device)
        job = dataclasses.replace(job, place=here, threads=self.threads)
        try:
            return self.pool.submit(attempt, job)
        except BrokenProcessPool:  # it died while it had nothing to do
            self.renew()
            return self.pool.submit(attempt, job)

    def renew(self) -> None:
        self.pool.shutdown(wait=False)
        self.pool = self.new_pool()


def outcomes(jobs: Sequence[Job], config: EngineConfig) -> Generator[Outcome]:
    """Does the jobs side by side; 1 worker stays in this process, where a debugger sees it."""
    device_of(jobs[0].place.device)  # said once, and not by every run
    if config.workers == 1:
        yield from (attempt(dataclasses.replace(job, threads=config.cpus_per_run)) for job in jobs)
        return
    others = set(multiprocessing.active_children())
    workers = _workers(jobs, config)
    try:
        yield from _all(jobs, workers, config.retries)
    except BaseException:  # Ctrl-C above all: nobody wants to wait for the runs that have begun
        for worker in workers:
            worker.pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    for worker in workers:
        worker.pool.shutdown()


def _all(jobs: Sequence[Job], workers: list[_Worker], retries: int) -> Generator[Outcome]:
    idle = list(workers)
    waiting = deque((job, 0) for job in jobs)
    running: dict[Future[Outcome], tuple[_Worker, Job, int]] = {}
    while waiting or running:
        while waiting and idle:
            worker, (job, deaths) = idle.pop(), waiting.popleft()
            running[worker.submit(job)] = (worker, job, deaths)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            worker, job, deaths = running.pop(future)
            idle.append(worker)
            outcome = _outcome(future, job)
            if outcome is None or outcome.result is None:  # after an error of CUDA a process is of no more use
                worker.renew()
            if outcome is not None:
                yield outcome
            elif deaths < retries:
                waiting.append((job, deaths + 1))
            else:
                yield died(job, deaths + 1)


def _outcome(future: Future[Outcome], job: Job) -> Outcome | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return None
    except Exception as error:  # the job or its result cannot be sent between processes
        return Outcome(job.config, None, f"{type(error).__name__}: {error}")


def died(job: Job, times: int, reason: str = "") -> Outcome:
    """The outcome of a run whose process died once too often."""
    return Outcome(
        job.config, None, f"its process died {times} times{reason}: killed, out of memory, or a crash of native code"
    )


def _workers(jobs: Sequence[Job], config: EngineConfig) -> list[_Worker]:
    devices = shares(device_of(jobs[0].place.device), config)[: len(jobs)]
    threads = config.cpus_per_run or max(1, cores() // len(devices))
    return [_Worker(device, threads) for device in devices]


def shares(device: torch.device, config: EngineConfig) -> list[str]:
    """The device of every worker: GPUs in turn, `runs_per_gpu` times each unless the number of workers is given."""
    if device.type != "cuda":
        return [str(device)] * (config.workers or cores())
    gpus = [device.index] if device.index is not None else range(torch.cuda.device_count())
    names = [f"cuda:{index}" for index in gpus]
    return list(itertools.islice(itertools.cycle(names), config.workers or len(names) * config.runs_per_gpu))


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at Ctrl-C without a traceback from every process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A sweep that was killed leaves no process behind, which would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a spawned process
    parent.join()
    os._exit(1)
