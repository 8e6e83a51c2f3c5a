"""All that changes during training, to and from one file: a resumed run equals an undisturbed one to the last bit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sapwood.errors import ConfigError, DataError
from sapwood.masks import Masks
from sapwood.training.config import TrainConfig, differences

_FORMAT = "sapwood training checkpoint 1"


class Epoch(TypedDict):
    """One row of the history: what an epoch cost and gave (losses: mean cross-entropy; accuracies: percent)."""

    epoch: int  # counted from 1
    lr: float  # of the epoch's first step
    train_loss: float  # over the epoch, while the weights change
    train_accuracy: float
    validation_accuracy: float | None
    test_accuracy: float
    images_per_second: float  # of training, without the evaluations
    seconds: float  # with them


@dataclass(frozen=True)
class State:
    """The parts of a run that a step changes; the global random state (dropout) is saved and restored along with it."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: GradScaler
    generator: torch.Generator
    device: torch.device
    history: list[Epoch] = field(default_factory=list)


def save(path: Path, state: State, config: TrainConfig, masks: Masks | None) -> None:
    """Writes the state beside `path` and renames it, so that `path` is always a whole checkpoint."""
    content = {
        "format": _FORMAT,
        "config": asdict(config),
        "masks": _digest(masks),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "scaler": state.scaler.state_dict(),
        "generator": state.generator.get_state(),
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state(state.device) if state.device.type == "cuda" else None,
        "history": state.history,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_name(path.name + ".tmp")
    torch.save(content, half_written)
    os.replace(half_written, path)


def restore(path: Path, state: State, config: TrainConfig, masks: Masks | None) -> None:
    """Loads `path` into `state` and the global random state.

    Raises:
        DataError: the file is damaged, or no checkpoint of this kind; nothing was changed.
        ConfigError: it belongs to another run (settings, masks or model); nothing was changed.
    """
    content = _read(path)
    _refuse_other_run(path, content, state.model, config, masks)
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.schedule.load_state_dict(content["schedule"])
    state.scaler.load_state_dict(content["scaler"])
    state.generator.set_state(content["generator"])
    state.history[:] = content["history"]
    torch.set_rng_state(content["random"])
    if state.device.type == "cuda" and content["cuda_random"] is not None:
        torch.cuda.set_rng_state(content["cuda_random"], state.device)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file leads the unpickler into errors of any kind, IndexError included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is truncated or no checkpoint ({reason}); delete it to start the run over.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError(f"{path} holds something else than a {_FORMAT!r}; choose another path, or delete it.")
    return content


def _refuse_other_run(
    path: Path, content: dict[str, Any], model: nn.Module, config: TrainConfig, masks: Masks | None
) -> None:
    changed = differences(content["config"], config)
    if content["masks"] != _digest(masks):
        changed.append("masks")
    if _shapes(content["model"]) != _shapes(model.state_dict()):
        changed.append("model")
    if changed:
        raise ConfigError(
            f"{path} belongs to another run, which differs in {', '.join(changed)}; "
            "give this run its own path, or delete the file to start over."
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _digest(masks: Masks | None) -> str | None:
    if masks is None:
        return None
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(masks[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
