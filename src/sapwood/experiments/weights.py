"""A network's weights beside a run: after its last epoch, after earlier ones that others rewind to, and new ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from sapwood.errors import DataError
from sapwood.experiments import store
from sapwood.files import in_one_step


def path(folder: Path, epoch: int, last: int) -> Path:
    """The file of the weights after an epoch of `last`."""
    return folder / (store.WEIGHTS if epoch == last else store.KEPT_WEIGHTS.format(epoch))


def save(model: nn.Module, file: Path) -> None:
    """Writes a model's parameters and buffers in one step."""
    with in_one_step(file) as temporary:
        save_model(model, str(temporary))


def load(model: nn.Module, file: Path) -> None:
    """Reads what `save` wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        load_model(model, str(file), device=str(next(model.parameters()).device))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{file} is missing or damaged ({error}); delete its folder to train again.") from error


def save_new(params: Mapping[str, Tensor], file: Path) -> None:
    """Writes new weights by name in one step."""
    with in_one_step(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in params.items()}, str(temporary))


def load_new(file: Path, device: torch.device) -> dict[str, Tensor]:
    """Reads what `save_new` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        return load_file(str(file), device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or damaged") from error


def all_there(folder: Path, epochs: Iterable[int], last: int) -> bool:
    """Whether the weights after these epochs were kept."""
    return all(path(folder, epoch, last).exists() for epoch in epochs)


def missing_before(folder: Path, epoch: int, keep: Iterable[int], last: int) -> bool:
    """Whether a training that is at this epoch is past one whose weights are wanted and were not kept.

    So it is where the weights became wanted later, or a process was killed between checkpoint and weights.
    """
    return any(each < last and each <= epoch and not path(folder, each, last).exists() for each in keep)
