"""A run's folder, which one process at a time works in, every file written in one step.

config.json, environment.json, masks.safetensors, metrics.jsonl, checkpoint.pt while it trains, and result.json last.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sapwood.errors import ConfigError, MaskError, RunBusyError
from sapwood.experiments import integrity
from sapwood.experiments.config import DENSE, RunConfig
from sapwood.masks import Masks

CONFIG, MASKS, METRICS, RESULT = "config.json", "masks.safetensors", "metrics.jsonl", "result.json"
WEIGHTS, CHECKPOINT, ENVIRONMENT = "weights.safetensors", "checkpoint.pt", "environment.json"
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


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step: a killed write leaves the old one."""
    half_written = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        half_written.write_text(text, encoding="utf-8")
        os.replace(half_written, path)
    except OSError:  # a full disk, most often, which a remnant would not help
        half_written.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON in one step, with a checksum of its own."""
    write_text(path, json.dumps(integrity.sealed(value), indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    return integrity.unsealed(json.loads(path.read_text(encoding="utf-8")))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, in one step."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads what `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
        if result is None or len(read_rows(folder / METRICS)) != result.epochs:
            return None
        if any(integrity.digest(folder / name) != digest for name, digest in result.files.items()):
            return None
        if _differences(read_json(folder / CONFIG), config) or read_json(folder / ENVIRONMENT) != result.environment:
            return None
        if config.method != DENSE and config.masks is None:
            Masks.load(folder / MASKS)
    except (OSError, ValueError, MaskError):
        return None
    return result


def digests(folder: Path) -> dict[str, str]:
    """For a result: the checksums of the files beside it that have none of their own."""
    return integrity.digests(folder, (METRICS, *sorted(path.name for path in folder.glob("*.safetensors"))))


def write_result(folder: Path, result: RunResult) -> None:
    """Writes the file that says that a run is finished."""
    write_json(folder / RESULT, dataclasses.asdict(result))


@contextmanager
def opened(folder: Path, config: RunConfig, *, wait: bool = True) -> Iterator[None]:
    """Makes the folder of a run, or enters the one that the same run has begun, and keeps other processes out.

    Raises:
        ConfigError: the folder belongs to another run, or is a file.
        RunBusyError: another process is in it, and `wait` is False.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; a folder for the run is expected: choose another one.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, poll_interval=0.5)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise RunBusyError(f"Another process is at the run in {folder}.") from None
    try:
        _enter(folder, config)
        yield
    finally:
        lock.release()


def _enter(folder: Path, config: RunConfig) -> None:
    path = folder / CONFIG
    if path.exists():
        _refuse_other_run(folder, config)
    for remnant in folder.glob(".*.tmp"):  # of a process that was killed
        remnant.unlink(missing_ok=True)
    write_json(path, config.to_json())


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
