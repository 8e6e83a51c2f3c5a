"""A network's weights beside a run: after its last epoch, after earlier ones that others rewind to, and new ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from sapwood.errors import DataError
from sapwood.experiments import store
from sapwood.training import epochs_in

NEW = "new-weights.safetensors"  # of a method that changes them; training begins there


def path(folder: Path, epoch: int, last: int) -> Path:
    """The file of the weights after an epoch of `last`."""
    return folder / (store.WEIGHTS if epoch == last else f"weights-epoch-{epoch}.safetensors")


def save(model: nn.Module, file: Path) -> None:
    """Writes a model's parameters and buffers in one step."""
    half_written = file.with_name(f".{file.name}.tmp")
    save_model(model, str(half_written))
    os.replace(half_written, file)


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
    half_written = file.with_name(f".{file.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in params.items()}, str(half_written))
    os.replace(half_written, file)


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


def drop_checkpoint_beyond(folder: Path, epochs: Iterable[int], last: int) -> None:
    """Lets a training begin again that is past an epoch whose weights are wanted and were not kept.

    So it is where the weights became wanted later, or a process was killed between checkpoint and weights.
    """
    missing = [epoch for epoch in epochs if not path(folder, epoch, last).exists()]
    checkpoint = folder / store.CHECKPOINT
    if missing and min(missing) < last and checkpoint.exists():
        try:
            beyond = epochs_in(checkpoint) >= min(missing)
        except DataError:  # damaged: the training begins again anyway
            return
        if beyond:
            checkpoint.unlink()
