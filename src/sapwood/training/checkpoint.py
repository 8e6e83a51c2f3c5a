"""All that changes during training, to and from one file: a resumed run equals an undisturbed one to the last bit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sapwood.errors import ConfigError, DataError
from sapwood.masks import Masks, clean_name
from sapwood.training.checksum import checksum
from sapwood.training.config import TrainConfig, differences

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.distributed.checkpoint.state_dict import StateDictOptions

_FORMAT = "sapwood training checkpoint 1"


class Epoch(TypedDict):
    """One row of the history: what an epoch cost and gave (losses: mean cross-entropy; accuracies: percent)."""

    epoch: int  # counted from 1, or from where training began in the schedule
    lr: float  # of the epoch's first step
    train_loss: float  # over the epoch, while the weights change
    train_accuracy: float
    validation_accuracy: float | None
    test_accuracy: float
    images_per_second: float  # of training, without the evaluations
    seconds: float  # with them


@dataclass(frozen=True)
class State:
    """The parts of a run that a step changes, and the Fabric that takes the step."""

    fabric: Fabric
    model: nn.Module  # the caller's
    forward: nn.Module  # the same, as the Fabric calls it: precision, and gradients exchanged between processes
    optimizer: Optimizer
    step: Callable[[], Any]  # of the optimizer, with the Fabric's loss scale
    schedule: LRScheduler
    generator: torch.Generator
    history: list[Epoch] = field(default_factory=list)


def save(path: Path, state: State, config: TrainConfig, masks: Masks | None) -> None:
    """Writes the state beside `path` and renames it, so that `path` is always a whole checkpoint.

    All processes call it, the first one writes. The weights and momentum are whole, whatever held them: any number of
    processes may resume from the file.
    """
    from torch.distributed.checkpoint.state_dict import (
        get_state_dict,
    )  # takes seconds, if it is torch's first optimizer

    model, optimizer = get_state_dict(state.model, state.optimizer, options=_whole())
    content = {
        "format": _FORMAT,
        "config": asdict(config),
        "masks": _digest(masks),
        "model": model,
        "optimizer": optimizer,
        "schedule": state.schedule.state_dict(),
        "precision": state.fabric.strategy.precision.state_dict(),
        "generator": state.generator.get_state(),
        "history": state.history,
    }
    content["sha256"] = checksum(content)  # torch reads a file without looking at the checksums of its zip format
    if state.fabric.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(content, path)


def _write(content: dict[str, Any], path: Path) -> None:
    half_written = path.with_name(path.name + ".tmp")
    try:
        with half_written.open("wb") as file:
            torch.save(content, file)
        os.replace(half_written, path)
    except (OSError, RuntimeError) as error:
        half_written.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch hides a full disk behind "unexpected pos"
            raise error.__context__ from None
        raise


def restore(path: Path, state: State, config: TrainConfig, masks: Masks | None) -> None:
    """Loads `path` into `state`.

    Raises:
        DataError: the file is damaged, or no checkpoint of this kind; nothing was changed.
        ConfigError: it belongs to another run (settings, masks or model); nothing was changed.
    """
    content = _read(path)
    _refuse_other_run(path, content, state.model, config, masks)
    _load_tensors(state, content)
    state.schedule.load_state_dict(content["schedule"])
    for group, lr in zip(state.optimizer.param_groups, state.schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    state.fabric.strategy.precision.load_state_dict(content["precision"])
    state.generator.set_state(content["generator"])
    state.history[:] = content["history"]


def intact(path: Path) -> bool:
    """Whether a file is a checkpoint as it was written, of this run or another."""
    try:
        _read(path)
    except DataError:
        return False
    return True


def epochs_in(path: Path) -> int:
    """The last epoch in a checkpoint.

    Raises:
        DataError: the file is damaged, or no checkpoint of this kind.
    """
    history: list[Epoch] = _read(path)["history"]
    return history[-1]["epoch"] if history else 0


def _load_tensors(state: State, content: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    set_model_state_dict(state.model, content["model"], options=_whole())
    if content["optimizer"]["state"]:  # SGD without momentum has none, which torch cannot load
        state.optimizer.zero_grad()  # nor does it load where gradients of an earlier run are left
        set_optimizer_state_dict(state.model, state.optimizer, content["optimizer"], options=_whole())


def _whole() -> StateDictOptions:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file leads the unpickler into errors of any kind, IndexError included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is truncated or no checkpoint ({reason}); delete it to start the run over.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError(f"{path} holds something else than a {_FORMAT!r}; choose another path, or delete it.")
    found = content.pop("sha256", None)  # older ones have none
    if found is not None and found != checksum(content):
        raise DataError(f"{path} is damaged: its content contradicts its checksum; delete it to start the run over.")
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
    return {clean_name(name): tensor.shape for name, tensor in tensors.items()}


def _digest(masks: Masks | None) -> str | None:
    if masks is None:
        return None
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(masks[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
