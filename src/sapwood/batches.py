"""What a criterion may look at: labelled batches, unlabelled ones, or only the shape of an input.

A batch is opaque to everything but this file: a tensor, a pair `(input, target)`, or a mapping of keyword arguments
(Hugging Face style, with the targets under `labels`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.errors import DataError, UnsupportedModelError

Batch = Any
LABELS = ("labels", "label", "target", "targets")


@dataclass(frozen=True)
class Data:
    """The batches of one call, read once so that every pass sees the same ones, and the shape of one sample."""

    batches: tuple[Batch, ...] = ()
    input_shape: tuple[int, ...] | None = None

    @classmethod
    def collect(cls, batches: Iterable[Batch] | None, input_shape: Iterable[int] | None, device: torch.device) -> Data:
        """Reads the whole of `batches` onto `device`.

        Raises:
            DataError: `batches` is given and empty, or `input_shape` is not a shape.
        """
        read = tuple(_to(batch, device) for batch in batches or ())
        if batches is not None and not read:
            raise DataError("batches is empty: give at least one batch of (input, target).")
        shape = None if input_shape is None else tuple(int(size) for size in input_shape)
        if shape is not None and (not shape or min(shape) < 1):
            raise DataError(f"input_shape is {shape}; give one sample's shape without the batch, such as (3, 32, 32).")
        return cls(read, shape)

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
                    "This method needs targets: a batch must be (input, target), or a mapping with 'labels'."
                )
        return self.batches

    def templates(self) -> tuple[Batch, ...]:
        """Batches without targets, whose floating-point tensors stand for their shapes only.

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


def inputs_of(batch: Batch) -> Batch:
    """The batch without its targets."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in LABELS}
    return batch[0] if isinstance(batch, tuple | list) else batch


def target_of(batch: Batch) -> Any:
    """The batch's targets, or None."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABELS if key in batch), None)
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


def size(batch: Batch) -> int:
    """Number of samples in a batch."""
    return _leaves(inputs_of(batch))[0].shape[0]


def samples(batch: Batch) -> Iterator[Batch]:
    """The batches of one that a batch, labelled or not, is made of."""
    for i in range(size(batch)):
        yield _map_all(batch, itemgetter(slice(i, i + 1)))


def resized(batch: Batch, samples: int) -> Batch:
    """The first `samples` of an unlabelled batch; samples are repeated where it has fewer."""
    return _map(batch, lambda t: t[torch.arange(samples, device=t.device) % t.shape[0]])


def small(batch: Batch, samples: int) -> Batch:
    """The first samples of an unlabelled batch."""
    return sliced(batch, 0, samples)


def parts(batch: Batch, samples: int) -> Iterator[Batch]:
    """An unlabelled batch in pieces of at most `samples`, in order."""
    for start in range(0, size(batch), samples):
        yield sliced(batch, start, start + samples)


def taken(batch: Batch, index: Tensor) -> Batch:
    """The samples of an unlabelled batch at the positions `index`."""
    return _map(batch, lambda t: t[index.to(t.device)])


def sliced(batch: Batch, start: int, stop: int) -> Batch:
    """The samples `start` to `stop` (excluded) of an unlabelled batch."""
    return _map(batch, lambda t: t[start:stop])


def filled(batch: Batch, fill: Callable[[Tensor], Tensor]) -> Batch:
    """An unlabelled batch with every floating-point tensor replaced; integers (token ids, attention masks) stay."""
    return _map(batch, lambda t: fill(t) if t.is_floating_point() else t)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """A batch, labelled or not, with its floating-point inputs in `dtype`; targets stay as they are."""
    if isinstance(batch, tuple | list):
        return (cast(batch[0], dtype), *batch[1:])
    inputs = filled(inputs_of(batch), lambda t: t.to(dtype))
    return {**batch, **inputs} if isinstance(batch, Mapping) else inputs


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """Runs a model on an unlabelled batch: keyword arguments from a mapping, one positional argument else."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def output_tensor(output: Any) -> Tensor:
    """The logits in whatever a model returned: a tensor, an object or mapping with `logits`, the first of a tuple.

    Raises:
        UnsupportedModelError: there is no tensor in the output.
    """
    for candidate in (output, getattr(output, "logits", None)):
        if isinstance(candidate, Tensor):
            return candidate
    if isinstance(output, Mapping) and "logits" in output:
        return output_tensor(output["logits"])
    if isinstance(output, tuple | list) and output:
        return output_tensor(output[0])
    raise UnsupportedModelError(
        f"The model returned {type(output).__name__}; a tensor, a tuple that begins with one, or an object with "
        ".logits was expected. Pass forward=lambda model, inputs: ... that returns a tensor."
    )


def cross_entropy(output: Any, target: Any) -> Tensor:
    """Mean cross-entropy of the logits; classes in dimension 1, or last for targets of every position.

    Raises:
        DataError: the targets are not class indices.
    """
    logits = output_tensor(output)
    if not isinstance(target, Tensor) or target.is_floating_point():
        raise DataError("The targets are not class indices, which the default loss (cross-entropy) needs; pass loss=.")
    if target.dim() == logits.dim() - 1 >= 2 and target.shape == logits.shape[:-1]:
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())
    return F.cross_entropy(logits, target)


def _leaves(batch: Batch) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or not tensors[0].dim():
        raise DataError(
            f"A batch holds {type(batch).__name__} where a tensor, a pair (input, target) or a mapping of tensors was "
            "expected."
        )
    return tensors


def _map(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    if isinstance(batch, Mapping):
        return {key: function(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return function(batch)


def _map_all(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """Inputs and targets alike."""
    if isinstance(batch, tuple | list):
        return tuple(_map_all(part, function) for part in batch)
    return _map(batch, function) if isinstance(batch, Tensor | Mapping) else batch


def _to(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, tuple | list):
        return tuple(_to(part, device) for part in batch)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch
