"""One run of many, as an engine hands it to a process, and what comes back; a run that fails does not stop others."""

from __future__ import annotations

import errno
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sapwood import files
from sapwood.errors import RunBusyError, SapwoodError, SapwoodWarning, for_the_user
from sapwood.experiments.config import Place, RunConfig
from sapwood.experiments.identity import Identity
from sapwood.experiments.run import run
from sapwood.experiments.store import RunResult
from sapwood.experiments.trackers import tracked


@dataclass(frozen=True)
class Job:
    """What a process needs to know to do a run.

    Attributes:
        config: The run.
        folder: Its folder, which this process and the one that asked both see.
        place: Device and data.
        tracker: Where the metrics go besides the folder; None: nowhere.
        threads: Threads of torch's CPU kernels; None leaves them.
        wait: Whether to wait for a process that is at the same run, rather than to come back busy.
        keep: Epochs after which its weights are kept, for runs that begin from them.
        inputs: What the data and the code are, see `identity.inputs`, in the process that asks.
    """

    config: RunConfig
    folder: Path
    place: Place
    tracker: str | None = None
    threads: int | None = None
    wait: bool = False
    keep: tuple[int, ...] = ()
    inputs: Identity | None = None


@dataclass(frozen=True)
class Outcome:
    """A run's result, or the sentence that says why there is none.

    Attributes:
        config: The run.
        result: What it gave; None without a result.
        error: Why there is no result.
        busy: Another process is at this run.
        disk_full: There was no room for its files, nor is there for those of other runs.
    """

    config: RunConfig
    result: RunResult | None
    error: str = ""
    busy: bool = False
    disk_full: bool = False


def attempt(job: Job) -> Outcome:
    """Does a run, and never raises."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    try:
        with warnings.catch_warnings(), tracked(job.tracker, job.config, job.folder) as on_epoch:
            warnings.simplefilter("ignore", SapwoodWarning)  # collapsed layers are in the result
            warnings.showwarning = for_the_user(warnings.showwarning)
            result = run(
                job.config,
                job.folder,
                job.place,
                keep=job.keep,
                on_epoch=on_epoch,
                wait=job.wait,
                inputs=job.inputs,
            )
            return Outcome(job.config, result)
    except RunBusyError as error:
        return Outcome(job.config, None, str(error), busy=True)
    except Exception as error:  # somebody's model or method may raise anything
        if _is_disk_full(error):
            return Outcome(job.config, None, f"no space is left for {job.folder}", disk_full=True)
        if isinstance(error, SapwoodError):
            return Outcome(job.config, None, str(error))
        return Outcome(job.config, None, f"{type(error).__name__}: {error}{_kept_traceback(job.folder)}")


def _is_disk_full(error: BaseException) -> bool:
    """Whether a write found no room: an OSError, or words of a library that hides it."""
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(cause)
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _kept_traceback(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "error.txt", traceback.format_exc())
    except OSError:
        return ""
    return f" (see {folder / 'error.txt'})"
