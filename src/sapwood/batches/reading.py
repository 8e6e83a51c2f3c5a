"""Inputs and targets: what belongs to which, in every kind of batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sapwood.batches.trees import Argument, described, is_sequence, mapped
from sapwood.errors import DataError

Batch = Any
LABELS = ("labels", "label", "target", "targets")


def as_batch(batch: Any) -> Batch:
    """A batch as a tensor, a tuple, a mapping or an object: named fields become a mapping of keyword arguments.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(batch, str | bytes | int | float | complex | None):
        raise DataError(
            f"A batch is {type(batch).__name__}; a tensor, a pair (input, target) or a mapping was expected."
        )
    if isinstance(batch, Mapping | Argument):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if is_sequence(batch) and hasattr(batch, "_fields"):
        pair = len(batch) == 2 and batch._fields[0] not in LABELS
        return tuple(batch) if pair else dict(zip(batch._fields, batch, strict=True))
    return batch


def label_of(batch: Batch) -> Any:
    """The key of a mapping's targets, the first of `LABELS` that it has; None where there is none."""
    if not isinstance(batch, Mapping):
        return None
    return next((key for key in LABELS if key in batch), None)


def inputs_of(batch: Batch) -> Batch:
    """The batch without its targets: a tensor, a dictionary of keyword arguments, or an `Argument`.

    Raises:
        DataError: it is a tuple of no or of more than two parts.
    """
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != label_of(batch)}
    if is_sequence(batch):
        return _argument(_pair(batch)[0])
    return _argument(batch)


def target_of(batch: Batch) -> Any:
    """The batch's targets, or None.

    Raises:
        DataError: it is a tuple of no or of more than two parts.
    """
    if isinstance(batch, Mapping):
        return batch.get(label_of(batch))
    return _pair(batch)[1] if is_sequence(batch) else None


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Runs a model: keyword arguments from a mapping, one positional argument else.

    Raises:
        DataError: a mapping has keys that are no names.
    """
    if not isinstance(inputs, Mapping):
        return model(inputs)
    for key in inputs:
        if not isinstance(key, str):
            raise DataError(
                f"A mapping is given to the model as keyword arguments, but has the key {key!r}: use the names of its "
                "forward's arguments, or pass forward=lambda model, inputs: ..."
            )
    return model(**inputs)


def argument(inputs: Batch) -> Any:
    """What a model or a user's `forward` is given."""
    return inputs.value if isinstance(inputs, Argument) else inputs


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """A copy of the inputs, floating-point ones in `dtype`, so that a forward may write into them.

    A mapping keeps its targets, as they are.
    """

    def own(tensor: Tensor) -> Tensor:
        return tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()

    if not isinstance(batch, Mapping):
        return mapped(own, inputs_of(batch))
    label = label_of(batch)
    return {key: value if key == label else mapped(own, value) for key, value in batch.items()}


def _argument(inputs: Any) -> Batch:
    if isinstance(inputs, Mapping):
        return inputs_of(inputs)
    return inputs if isinstance(inputs, Tensor | Argument) else Argument(inputs)


def _pair(batch: tuple[Any, ...] | list[Any]) -> tuple[Any, Any]:
    if not 1 <= len(batch) <= 2:
        raise DataError(
            f"A batch has {len(batch)} parts, {described(batch)}, where (input, target) was expected: give a mapping "
            "of the model's arguments, such as {'input_ids': ..., 'attention_mask': ..., 'labels': ...}, or "
            "((input, input), target) with forward=lambda model, inputs: model(*inputs)."
        )
    return batch[0], batch[1] if len(batch) == 2 else None
