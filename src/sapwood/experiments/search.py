"""Masks for a model outside of a comparison: what it is built for, and what the method is shown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn

from sapwood import data, models
from sapwood.batches import Batch
from sapwood.checks import Count, Rule
from sapwood.errors import ConfigError, DataError
from sapwood.experiments import cost
from sapwood.experiments.config import Place
from sapwood.experiments.material import initialised, load_data
from sapwood.masks import Masks
from sapwood.methods import METHODS, configured, find, prune
from sapwood.pruning import Result, Round


class Held(Rule):
    """A shape of which a tensor can be made."""

    def check(self, name: str, value: tuple[int, ...]) -> None:
        """Refuses an empty one, and one of more than 2^40 numbers."""
        if not value or math.prod(value) > 2**40:
            raise ConfigError(
                f"{name} is {' '.join(map(str, value))[:80] or 'empty'}; one sample's shape was expected."
            )


@dataclass(frozen=True)
class Shape:
    """What a model is built for, in the absence of data.

    Attributes:
        num_classes: Outputs of the model; the default is what --data has, else 10.
        in_channels: Input channels; the default is what --data or --input-shape has, else the model's usual number.
        input_shape: One sample's shape (channels height width, in pixels), such as 3 32 32; the default is what --data
            has, else the model's usual shape.
    """

    num_classes: Count | None = None
    in_channels: Count | None = None
    input_shape: Annotated[tuple[Count, ...] | None, Held()] = None


@dataclass(frozen=True)
class Subject:
    """A model at its initial weights, one sample's shape, and labelled batches if a data set is there and wanted."""

    model: nn.Module
    input_shape: tuple[int, ...]
    batches: list[Batch] | None


def subject(
    model: str,
    shape: Shape,
    *,
    data_name: str | None,
    place: Place,
    per_class: int | None,
    seed: int,
) -> Subject:
    """Builds the model for the data set, or for the given shape.

    Args:
        model: The model's name.
        shape: What the model is built for, in the absence of data.
        data_name: The data set's name, or None.
        place: Where the data are.
        per_class: Training images of each class for the batches; None: no batches.
        seed: Of the initial weights and of the choice of images.

    Raises:
        ConfigError: an unknown name, or a shape that contradicts the data.
    """
    if data_name is None:
        return Subject(*_built(model, shape, seed), None)
    dataset = load_data(data_name, None, place)
    wanted = Shape(dataset.num_classes, dataset.input_shape[0], dataset.input_shape)
    for field in dataclasses.fields(Shape):
        given, found = getattr(shape, field.name), getattr(wanted, field.name)
        if given not in (None, found):
            flag = "--" + field.name.replace("_", "-")
            raise ConfigError(f"{flag} is {given}, but the data set {data_name!r} has {found}: leave one of them out.")
    batches = None
    if per_class is not None:
        batches = data.pruning_batches(dataset, per_class=per_class, seed=seed)
    return Subject(*_built(model, wanted, seed), batches)


def needs_batches(method: str, fields: Mapping[str, Any]) -> bool:
    """Whether a method is given batches: every one is that does not say `needs_data = False`."""
    name, found = find(method)
    return bool(getattr(configured(name, found, dict(fields)), "needs_data", True))


def refuse_without_data(method: str, fields: Mapping[str, Any]) -> None:
    """Refuses a method of the table that looks at data, where there are none; other people's are left to find out.

    Raises:
        ConfigError: it does.
    """
    if method in METHODS and needs_batches(method, fields):
        raise _no_data(method)


@contextmanager
def asking_for_data(method: str, data_name: str | None) -> Iterator[None]:
    """Inside, a method that asks for batches where no data set is named is refused in the command's words.

    Raises:
        ConfigError: it is.
    """
    try:
        yield
    except DataError as error:
        if data_name is not None:
            raise
        raise _no_data(method) from error


def _no_data(method: str) -> ConfigError:
    legal = ", ".join(data.names())
    return ConfigError(f"Method {method!r} scores on images of a data set: add --data NAME, NAME of {legal}.")


def search(
    subject: Subject,
    *,
    method: str,
    density: float,
    seed: int,
    on_round: Callable[[Round, Masks], Any] | None = None,
    **settings: Any,
) -> Result:
    """Prunes and notes in the masks' provenance what it cost; `settings` go to `sapwood.prune`."""
    device = next(subject.model.parameters()).device
    cost.reset_peak(device)
    result = prune(
        subject.model,
        method=method,
        density=density,
        input_shape=subject.input_shape,
        batches=subject.batches,
        seed=seed,
        on_round=on_round,
        **settings,
    )
    provenance = {**result.masks.provenance, "seconds": result.seconds, "peak_memory": cost.peak_memory(device)}
    return dataclasses.replace(result, masks=dataclasses.replace(result.masks, provenance=provenance))


def _built(name: str, shape: Shape, seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    input_shape = shape.input_shape or models.input_shape(name)
    if shape.in_channels is not None:
        if shape.input_shape is not None and shape.input_shape[0] != shape.in_channels:
            raise ConfigError(
                f"--in-channels is {shape.in_channels}, but --input-shape begins with {shape.input_shape[0]}."
            )
        input_shape = (shape.in_channels, *input_shape[1:])
    size = input_shape[1] if len(input_shape) == 3 and input_shape[1] == input_shape[2] else None
    classes = 10 if shape.num_classes is None else shape.num_classes
    return initialised(name, seed, num_classes=classes, in_channels=input_shape[0], image_size=size), input_shape
