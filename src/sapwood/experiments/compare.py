"""Runs of a comparison, side by side in processes of their own; one that fails does not stop the others."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from sapwood.errors import ConfigError, SapwoodError, SapwoodWarning
from sapwood.experiments import store
from sapwood.experiments.config import Place, RunConfig
from sapwood.experiments.environment import cores, device_of
from sapwood.experiments.material import create_model, load_data
from sapwood.experiments.run import run
from sapwood.experiments.store import RunResult


@dataclass(frozen=True)
class Outcome:
    """A run's result, or the sentence that says why there is none."""

    config: RunConfig
    result: RunResult | None
    error: str = ""


def compare(
    configs: Sequence[RunConfig],
    out: Path,
    place: Place,
    *,
    workers: int | None = None,
    on_run: Callable[[Outcome, bool], None] = lambda outcome, fresh: None,
) -> list[Outcome]:
    """Does every run that is not finished in `out/runs` yet.

    Args:
        configs: The runs.
        out: The comparison's folder.
        place: Device and data.
        workers: Processes; None takes one a CPU core, or one on a GPU. 1 stays in this process.
        on_run: Called with every outcome, and whether it is fresh (False: finished by an earlier call).

    Returns:
        One outcome a config, in their order.

    Raises:
        SapwoodError: what would make every run fail: data, model or device that are not there.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; at least 1 process is needed.")
    outcomes: dict[str, Outcome] = {}
    for config in configs:
        if (result := store.read_result(run_folder(out, config))) is not None:
            outcomes[config.id] = Outcome(config, result)
            on_run(outcomes[config.id], False)
    pending = [config for config in configs if config.id not in outcomes]
    if pending:
        _check_common(pending[0], place)
        (out / "runs").mkdir(parents=True, exist_ok=True)
        for outcome in _outcomes(pending, out, place, workers or _usual_workers(place)):
            outcomes[outcome.config.id] = outcome
            on_run(outcome, True)
    return [outcomes[config.id] for config in configs]


def run_folder(out: Path, config: RunConfig) -> Path:
    """Where a comparison keeps a run."""
    return out / "runs" / config.id


def _check_common(config: RunConfig, place: Place) -> None:
    """Fails here and once, rather than in every run; a download happens once, too."""
    device_of(place.device)
    create_model(config.model, load_data(config.data, config.resolution, place), config.seed)


def _usual_workers(place: Place) -> int:
    return 1 if device_of(place.device).type == "cuda" else cores()


def _outcomes(configs: Sequence[RunConfig], out: Path, place: Place, workers: int) -> Iterator[Outcome]:
    workers = min(workers, len(configs))
    if workers == 1:
        yield from (_attempt(config, run_folder(out, config), place) for config in configs)
        return
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # a forked torch may hang in its thread pool
        initializer=_start_worker,
        initargs=(max(1, cores() // workers),),
    )
    try:
        futures = {executor.submit(_attempt, config, run_folder(out, config), place): config for config in configs}
        for future in as_completed(futures):
            yield _outcome(future, futures[future])
    except BaseException:  # Ctrl-C above all: nobody wants to wait for the runs that have begun
        executor.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    executor.shutdown()


def _start_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at Ctrl-C without a traceback from every process
    torch.set_num_threads(threads)


def _attempt(config: RunConfig, folder: Path, place: Place) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SapwoodWarning)  # collapsed layers are in the result
            return Outcome(config, run(config, folder, place))
    except SapwoodError as error:
        return Outcome(config, None, str(error))
    except Exception as error:  # somebody's model or method may raise anything
        folder.mkdir(parents=True, exist_ok=True)
        store.write_text(folder / "error.txt", traceback.format_exc())
        return Outcome(config, None, f"{type(error).__name__}: {error} (see {folder / 'error.txt'})")


def _outcome(future: Future[Outcome], config: RunConfig) -> Outcome:
    try:
        return future.result()
    except Exception as error:  # the process died: out of memory, most often
        return Outcome(config, None, f"{type(error).__name__}: {error}")
