"""All that changes during training, to and from one file: a resumed run equals an undisturbed one to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sapwood.errors import ConfigError, DataError
from sapwood.files import KEY, checksum, in_one_step
from sapwood.masks import Masks, clean_name
from sapwood.training.config import TrainConfig, differences

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.distributed.checkpoint.state_dict import StateDictOptions

_FORMAT = "sapwood training checkpoint 1"
_PARTS: dict[str, Any] = {
    "format": str,
    "config": dict,
    "masks": str | None,
    "model": dict,
    "optimizer": dict,
    "schedule": dict,
    "precision": dict,
    "generator": Tensor,
    "history": list,
}
"""What a checkpoint consists of, beside its checksum."""


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
    """Writes the state in one step, so that `path` is always a whole checkpoint.

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
    content[KEY] = checksum(content)  # torch reads a file without looking at the checksums of its zip format
    if state.fabric.is_global_zero:
        with in_one_step(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)


def restore(path: Path, state: State, config: TrainConfig, masks: Masks | None) -> None:
    """Loads `path` into `state`.

    Raises:
        DataError: the file is damaged, or no checkpoint of this kind; nothing was changed.
        ConfigError: it belongs to another run (settings, masks or model); nothing was changed.
    """
    content = _read(path)
    _refuse_other_run(path, content, state.model, config, masks)
    try:
        _load(state, content)
    except Exception as error:  # whatever torch's parts say to a state that is none of theirs
        raise DataError(
            f"{path} holds something else than the state of a training like this one ({_first_line(error)}); delete it "
            "to start the run over, with a new model."
        ) from error


def history_in(path: Path) -> list[Epoch]:
    """The epochs that a checkpoint has behind it, one row each.

    Raises:
        DataError: the file is damaged, or no checkpoint of this kind.
    """
    history: list[Epoch] = _read(path)["history"]
    return history


def _load(state: State, content: dict[str, Any]) -> None:
    _refuse_other_schedule(content["schedule"], state.schedule.state_dict())
    _load_tensors(state, content)
    state.schedule.load_state_dict(content["schedule"])
    for group, lr in zip(state.optimizer.param_groups, state.schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    state.fabric.strategy.precision.load_state_dict(content["precision"])
    state.generator.set_state(content["generator"])
    state.history[:] = content["history"]


def _refuse_other_schedule(found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """A schedule itself takes whatever it is given."""
    alike = found.keys() == own.keys()
    if not alike or any(isinstance(own[key], int) and not isinstance(found[key], int) for key in own):
        raise ValueError("the state of another learning-rate schedule")


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
        reason = _first_line(error)
        raise DataError(f"{path} is truncated or no checkpoint ({reason}); delete it to start the run over.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError(f"{path} holds something else than a {_FORMAT!r}; choose another path, or delete it.")

    found = content.pop(KEY, None)  # older ones have none
    if found is not None and found != checksum(content):
        raise DataError(f"{path} is damaged: its content contradicts its checksum; delete it to start the run over.")
    if (wrong := _wrong_part(content)) is not None:
        raise DataError(
            f"{path} is damaged: its {wrong!r} is missing or not what a checkpoint holds; delete it to start the run "
            "over."
        )
    return content


def _wrong_part(content: Mapping[str, Any]) -> str | None:
    """The first part that is not there, too much, or not of its type."""
    for part in {**dict.fromkeys(_PARTS), **content}:
        if part not in _PARTS or part not in content or not isinstance(content[part], _PARTS[part]):
            return str(part)

    if not all(isinstance(tensor, Tensor) for tensor in content["model"].values()):
        return "model"
    if "state" not in content["optimizer"]:
        return "optimizer"
    return None if all(_is_epoch(row) for row in content["history"]) else "history"


def _is_epoch(row: object) -> bool:
    """Whether this is a row of the history: a number for every key, None for the validation at most."""
    return (
        isinstance(row, dict)
        and set(row) == set(Epoch.__annotations__)
        and all(isinstance(row[key], int | float) for key in row if key != "validation_accuracy")
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error).strip() else type(error).__name__


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
