"""The batches of one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches.drawing import Draw
from sapwood.batches.reading import LABELS, Batch, as_batch, inputs_of, target_of
from sapwood.batches.trees import described, moved, tensors
from sapwood.errors import DataError


@dataclass(frozen=True)
class Data:
    """The batches of one call, read once so that every pass sees the same ones, and the shape of one sample.

    Attributes:
        batches: The batches, on the model's device.
        input_shape: One sample's shape without the batch.
        draw: Entries of a batch's inputs whose numbers a method may replace (see `sapwood.batches.filled`).
    """

    batches: tuple[Batch, ...] = ()
    input_shape: tuple[int, ...] | None = None
    draw: Draw = None

    @classmethod
    def collect(
        cls,
        batches: Iterable[Batch] | None,
        input_shape: Iterable[int] | None,
        device: torch.device,
        draw: Iterable[str] | None = None,
    ) -> Data:
        """Reads the whole of `batches` onto `device`.

        Raises:
            DataError: `batches` is given and empty, is one batch and not several, or holds what is none; `input_shape`
                is not a shape.
        """
        if isinstance(batches, Tensor | Mapping | str):
            raise DataError(
                f"batches is one {type(batches).__name__}; a list of batches was expected, such as batches=[batch]."
            )
        read = tuple(moved(as_batch(batch), device) for batch in batches or ())
        if batches is not None and not read:
            raise DataError("batches is empty: give at least one batch of (input, target).")
        _refuse_unlike(read)
        shape = None if input_shape is None else tuple(int(size) for size in input_shape)
        if shape is not None and (not shape or min(shape) < 1):
            raise DataError(f"input_shape is {shape}; give one sample's shape without the batch, such as (3, 32, 32).")
        names = (draw,) if isinstance(draw, str) else draw
        return cls(read, shape, None if names is None else tuple(names))

    def labelled(self) -> tuple[Batch, ...]:
        """The batches, each with a target.

        Raises:
            DataError: there are none, or one has no target.
        """
        if not self.batches:
            raise DataError("This method scores on labelled data: give batches=[(input, target), ...].")
        for batch in self.batches:
            if target_of(batch) is None:
                raise DataError(
                    f"This method needs targets, and a batch is {described(batch)}: it must be (input, target), or a "
                    f"mapping with one of {', '.join(map(repr, LABELS))}."
                )
        return self.batches

    def templates(self) -> tuple[Batch, ...]:
        """Batches without targets, whose numbers stand for their shapes only.

        Raises:
            DataError: neither batches nor an input shape were given.
        """
        if self.input_shape is not None:
            return (torch.empty(1, *self.input_shape),)
        if not self.batches:
            raise DataError(
                "This method needs an input's shape: give input_shape=(3, 32, 32), or batches to read it from."
            )
        return self.inputs()

    def inputs(self) -> tuple[Batch, ...]:
        """The batches without targets.

        Raises:
            DataError: there are none.
        """
        if not self.batches:
            raise DataError("This method scores on real inputs: give batches=[(input, target), ...] or [input, ...].")
        return tuple(inputs_of(batch) for batch in self.batches)


def _refuse_unlike(batches: tuple[Batch, ...]) -> None:
    lone = [batch for batch in batches if isinstance(batch, Tensor)]
    if len({(tensor.dim(), tensor.is_floating_point()) for tensor in lone}) > 1:
        raise DataError(
            f"Batches are {' and '.join(map(described, lone[:2]))}: inputs of one call are alike. Are they one batch, "
            "batches=[(input, target)]?"
        )
    for batch in batches:
        inputs = tensors(inputs_of(batch))
        if inputs and not any(tensor.numel() for tensor in inputs):
            raise DataError(f"A batch has no samples ({described(batch)}): leave it out.")
