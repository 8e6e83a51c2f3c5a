"""A run's folder, which one process at a time works in, every file written in one step.

config.json, environment.json, identity.json, masks.safetensors, metrics.jsonl, checkpoint.pt while it trains, and
result.json last.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from sapwood.errors import ConfigError, MaskError, RunBusyError, SapwoodError
from sapwood.experiments.config import DENSE, RunConfig
from sapwood.files import digest, read_json, read_rows, remove_remnants, write_json
from sapwood.masks import Masks

CONFIG, MASKS, METRICS, RESULT = "config.json", "masks.safetensors", "metrics.jsonl", "result.json"
WEIGHTS, CHECKPOINT, ENVIRONMENT = "weights.safetensors", "checkpoint.pt", "environment.json"
IDENTITY = "identity.json"
KEPT_WEIGHTS = "weights-epoch-{}.safetensors"  # after an epoch that is not the last
NEW_WEIGHTS = "new-weights.safetensors"  # of a method that changes them; training begins there
COLUMNS = {"epoch", "lr", "train_loss", "test_accuracy", "seconds"}  # of the metrics that others read
FILES = (CONFIG, ENVIRONMENT, IDENTITY, MASKS, NEW_WEIGHTS, METRICS, CHECKPOINT, WEIGHTS, RESULT)
LOCK = "run.lock"  # the operating system frees it when its holder dies


@dataclass(frozen=True)
class RunResult:
    """What a run gave.

    Attributes:
        test_accuracy: Percent, after the last epoch.
        validation_accuracy: Percent, after the last epoch; None without a validation split.
        diverged: Whether the weights became NaN or infinite.
        epochs: Epochs trained.
        prune_seconds: Wall time of the pruning, as the masks' provenance has it; 0 for the dense model.
        train_seconds: Wall time of the training.
        layers: Kept and all weights of each prunable layer, by name.
        collapsed: Layers in which no weight is kept.
        environment: Versions and hardware.
        prune_memory: Peak bytes while pruning, see `cost.peak_memory`; None where unknown, as for the dense model.
        train_memory: Peak bytes while training.
        flops: FLOPs of a forward pass on one input that kept weights take part in, and all; None where not countable.
        effective: Kept weights on a path from an input to an output; None where that cannot be told.
        init_hash: Of the initial weights.
        order_hash: Of the first training batch.
        settings: The method's fields, those of the method table included.
        files: SHA-256 of the metrics, masks and weights beside the result, by file name.
        prior_epochs: Epochs trained before this pruning, over the dense network and earlier levels.
        prior_seconds: Wall time of those trainings and of the prunings between them, whoever did them.

    Fields with defaults came later: results without them are still read.
    """

    test_accuracy: float
    validation_accuracy: float | None
    diverged: bool
    epochs: int
    prune_seconds: float
    train_seconds: float
    layers: Mapping[str, tuple[int, int]]
    collapsed: tuple[str, ...]
    environment: Mapping[str, str]
    prune_memory: int | None = None
    train_memory: int | None = None
    flops: tuple[int, int] | None = None
    effective: int | None = None
    init_hash: str = ""
    order_hash: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    prior_epochs: int = 0
    prior_seconds: float = 0.0

    @property
    def kept(self) -> int:
        """Weights that the masks keep."""
        return sum(kept for kept, _ in self.layers.values())

    @property
    def weights(self) -> int:
        """Prunable weights."""
        return sum(total for _, total in self.layers.values())


def read_result(folder: Path) -> RunResult | None:
    """The result of a finished run; None where it is missing or damaged, so that the run is done again."""
    try:
        values = read_json(folder / RESULT)
        layers = {name: (int(kept), int(total)) for name, (kept, total) in values["layers"].items()}
        flops = values.get("flops")
        tuples = {"collapsed": tuple(values["collapsed"]), "flops": flops and (int(flops[0]), int(flops[1]))}
        return RunResult(**{**values, **tuples, "layers": layers})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def finished(folder: Path, config: RunConfig) -> RunResult | None:
    """The result of a run all of whose files are whole; None where one is missing or damaged."""
    result = read_result(folder)
    try:
        if result is None or not _are_metrics(read_rows(folder / METRICS), result.epochs):
            return None
        if any(digest(folder / name) != expected for name, expected in result.files.items()):
            return None
        if _differences(read_json(folder / CONFIG), config) or read_json(folder / ENVIRONMENT) != result.environment:
            return None
        if config.method != DENSE and config.masks is None:
            Masks.load(folder / MASKS)
    except (OSError, ValueError, MaskError):
        return None
    return result


def _are_metrics(rows: Sequence[Mapping[str, Any]], epochs: int) -> bool:
    return len(rows) == epochs and all(row.keys() >= COLUMNS for row in rows)


def digests(folder: Path) -> dict[str, str]:
    """For a result: the checksums of the files beside it."""
    found = [folder / IDENTITY, folder / METRICS, *sorted(folder.glob("*.safetensors"))]
    return {path.name: digest(path) for path in found if path.exists()}


def write_result(folder: Path, result: RunResult) -> None:
    """Writes the file that says that a run is finished."""
    write_json(folder / RESULT, dataclasses.asdict(result))


class RunFolder:
    """A run's folder while this process works in it: made, or entered where the same run has begun, and locked.

    Args:
        path: The folder.
        config: The run.
        wait: Whether to wait for another process that is in it.

    Attributes:
        begun: Whether the run had begun when the folder was entered.
    """

    def __init__(self, path: Path, config: RunConfig, *, wait: bool = True) -> None:
        self.path, self.config = path, config
        self._wait = wait
        self._place: tuple[int, int] | None = None
        self.begun = False

    def __enter__(self) -> Self:
        """Raises a ConfigError where the folder is another run's, or a file; RunBusyError where somebody is in it."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; a folder for the run is expected: choose another one.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / LOCK, poll_interval=0.5)
        try:
            self._lock.acquire(timeout=-1 if self._wait else 0)
        except Timeout:
            raise RunBusyError(f"Another process is at the run in {self.path}.") from None

        try:
            self._place = _place_of(self.path / LOCK)
            self._enter()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Lets others in. A write that failed because the folder is gone says so."""
        self._lock.release()
        if isinstance(error, OSError):
            self.check()

    def check(self) -> None:
        """Makes sure that the folder is still the one that was entered: another one would not be locked.

        Raises:
            SapwoodError: somebody removed or replaced it.
        """
        if _place_of(self.path / LOCK) != self._place:
            raise SapwoodError(
                f"The folder {self.path} was removed or replaced while its run was going on, which is lost: the same "
                "command runs it again."
            )

    def half_done(self) -> list[Path]:
        """The files that the run would go on from: its own masks with their weights, its checkpoint, kept weights."""
        prunes = self.config.method != DENSE and self.config.masks is None
        names = [CHECKPOINT, KEPT_WEIGHTS.format("*"), *([MASKS, NEW_WEIGHTS] if prunes else [])]
        return [path for name in names for path in sorted(self.path.glob(name))]

    def _enter(self) -> None:
        for name in FILES:
            if (self.path / name).is_dir():
                raise ConfigError(f"{self.path / name} is a folder where a file of the run belongs: move it away.")
        self.begun = (self.path / CONFIG).exists()
        if self.begun:
            _refuse_other_run(self.path, self.config)
        remove_remnants(self.path)
        write_json(self.path / CONFIG, self.config.to_json())


def _place_of(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _refuse_other_run(folder: Path, config: RunConfig) -> None:
    if folder.name == config.id:  # the name says which run it is: a file that says otherwise is damaged
        return
    try:
        changed = _differences(read_json(folder / CONFIG), config)
    except ValueError as error:
        path = folder / CONFIG
        raise ConfigError(f"{path} is damaged; choose another folder, or delete it to start the run over.") from error
    if changed:
        raise ConfigError(
            f"{folder} holds another run, which differs in {', '.join(changed)}; choose another folder, or delete it."
        )


def _differences(found: Mapping[str, Any], config: RunConfig) -> list[str]:
    """The settings in which a config that was read differs; an older file lacks the newer ones."""
    found = json.loads(json.dumps(_complete(found)))
    wanted = json.loads(json.dumps(config.to_json()))
    return [key for key in {**wanted, **found} if key not in wanted or found[key] != wanted[key]]


def _complete(found: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of newer fields, which an older file lacks."""
    default = RunConfig("", "").to_json()
    train = found.get("train", {})
    return {**default, **found, "train": {**default["train"], **train} if isinstance(train, dict) else train}
