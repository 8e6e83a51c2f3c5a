"""A run's folder: config.json, masks.safetensors, metrics.jsonl, and result.json last, each written in one step."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapwood.errors import ConfigError
from sapwood.experiments.config import RunConfig

CONFIG, MASKS, METRICS, RESULT = "config.json", "masks.safetensors", "metrics.jsonl", "result.json"
WEIGHTS, CHECKPOINT = "weights.safetensors", "checkpoint.pt"


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


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step: a killed write leaves the old one."""
    half_written = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    half_written.write_text(text, encoding="utf-8")
    os.replace(half_written, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, in one step."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads what `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_result(folder: Path) -> RunResult | None:
    """The result of a finished run; None where it is missing or damaged, so that the run is done again."""
    try:
        values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        layers = {name: (int(kept), int(total)) for name, (kept, total) in values["layers"].items()}
        return RunResult(**{**values, "layers": layers, "collapsed": tuple(values["collapsed"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_result(folder: Path, result: RunResult) -> None:
    """Writes the file that says that a run is finished."""
    write_json(folder / RESULT, dataclasses.asdict(result))


def open_folder(folder: Path, config: RunConfig) -> None:
    """Makes the folder of a run, or enters the one that the same run has begun.

    Raises:
        ConfigError: the folder belongs to another run, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; a folder for the run is expected: choose another one.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    wanted = json.loads(json.dumps(config.to_json()))
    if path.exists() and (found := _read_config(path)) != wanted:
        changed = [key for key in wanted if found.get(key) != wanted[key]]
        raise ConfigError(
            f"{folder} holds another run, which differs in {', '.join(changed)}; choose another folder, or delete it."
        )
    write_json(path, wanted)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged; choose another folder, or delete it to start the run over.")
    return found
