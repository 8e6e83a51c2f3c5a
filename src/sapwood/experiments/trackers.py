"""Metrics of a run to TensorBoard, Weights & Biases, MLflow or trackio, besides the run's own folder.

A tracker is a function `(config, folder)` that returns a context manager, which gives a function to call with every
epoch's row. Each imports its package when it is used; none is a dependency.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from sapwood.checks import takes
from sapwood.errors import ConfigError, unknown_name
from sapwood.experiments.config import RunConfig
from sapwood.imports import imported
from sapwood.training import Epoch

Log = Callable[[Epoch], None]
Tracker = Callable[[RunConfig, Path], AbstractContextManager[Log]]


@contextmanager
def tensorboard(config: RunConfig, folder: Path) -> Iterator[Log]:
    """Event files beside the run's own files: `tensorboard --logdir DIR/runs`."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:

        def log(row: Epoch) -> None:
            for name, value in _numbers(row).items():
                writer.add_scalar(name, value, row["epoch"])
            writer.flush()

        yield log


@contextmanager
def wandb(config: RunConfig, folder: Path) -> Iterator[Log]:
    """A run of Weights & Biases in the project "sapwood" (else $WANDB_PROJECT); $WANDB_MODE=offline keeps it here."""
    import wandb as package

    run = package.init(
        project=None if "WANDB_PROJECT" in os.environ else "sapwood",
        id=config.id,
        name=_title(config),
        config=config.to_json(),
        dir=str(folder),
        resume="allow",
    )
    with run:
        yield lambda row: run.log(_numbers(row), step=row["epoch"])


@contextmanager
def mlflow(config: RunConfig, folder: Path) -> Iterator[Log]:
    """A run of MLflow's active experiment ($MLFLOW_TRACKING_URI, $MLFLOW_EXPERIMENT_NAME), found again by its tag."""
    import mlflow as package

    found = package.search_runs(filter_string=f"tags.sapwood = '{config.id}'", output_format="list")
    known = found[0].info.run_id if found else None
    with package.start_run(run_id=known, run_name=None if known else _title(config), tags={"sapwood": config.id}):
        if known is None:
            package.log_params(config.meaning())
        yield lambda row: package.log_metrics(_numbers(row), step=row["epoch"])


@contextmanager
def trackio(config: RunConfig, folder: Path) -> Iterator[Log]:
    """A run of trackio's project "sapwood", which lives on this machine."""
    import trackio as package

    run = package.init(project="sapwood", name=_title(config), config=config.to_json(), resume="allow")
    try:
        yield lambda row: run.log(_numbers(row), step=row["epoch"])
    finally:
        run.finish()


TRACKERS: dict[str, Tracker] = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}


def find(name: str) -> Tracker:
    """The tracker of a name, or of package.module:function.

    Raises:
        ConfigError: there is none, or its package is not installed.
    """
    if ":" in name:
        tracker: Tracker = imported(name, "tracker")
        if not callable(tracker) or not takes(tracker, "config", "folder"):
            raise ConfigError(f"The tracker {name!r} is not a function that may be called with (config, folder).")
        return tracker
    if name not in TRACKERS:
        raise unknown_name("tracker", name, TRACKERS)
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"The tracker {name!r} cannot be imported ({error}); install it with pip.") from error
    return TRACKERS[name]


@contextmanager
def tracked(name: str | None, config: RunConfig, folder: Path) -> Iterator[Log | None]:
    """What to call with every epoch's row. The tracker opens at the first one: a run that is done needs none."""
    if name is None:
        yield None
        return
    with ExitStack() as stack:
        opened: list[Log] = []

        def log(row: Epoch) -> None:
            if not opened:
                opened.append(stack.enter_context(find(name)(config, folder)))
            opened[0](row)

        yield log


def _numbers(row: Epoch) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "epoch"}


def _title(config: RunConfig) -> str:
    return f"{config.method} {100 * (1 - config.density):.4g} % seed {config.seed} {config.id}"
