"""Which numbers of a batch a method may put its own in place of: NTK-SAP its noise, SynFlow its ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sapwood.batches.reading import Batch, argument
from sapwood.batches.trees import Argument, described, is_opaque, is_sequence, leaves, mapped, rebuilt, tensors
from sapwood.errors import DataError

Draw = tuple[Any, ...] | None
"""Keys of a mapping (positions of a tuple) whose floating-point tensors may be replaced; None: see `filled`."""


def filled(batch: Batch, fill: Callable[[Tensor], Tensor], draw: Draw = None) -> Batch:
    """An unlabelled batch with the floating-point tensors that are its numbers replaced; integers stay.

    Where `draw` is None, a lone tensor is the numbers. Beside others a floating-point one may as well be a mask, a time
    step or a graph's weights, and the user has to say.

    Raises:
        DataError: two readings fit, or `draw` names what is not there.
    """

    def numbers(tensor: Tensor) -> Tensor:
        return fill(tensor) if tensor.is_floating_point() else tensor

    if draw is None:
        _refuse_two_readings(batch)
        return mapped(numbers, batch)
    entries = _entries(batch)
    for key in draw:
        if not any(tensor.is_floating_point() for tensor in tensors(entries.get(key))):
            raise DataError(
                f"draw names {key!r}, but the inputs are {described(batch)}: name entries of a mapping (or positions "
                "of a tuple) that are floating-point tensors, or give () to leave all as they are."
            )
    if not draw:
        return batch
    replaced = {key: mapped(numbers, part) if key in draw else part for key, part in entries.items()}
    return replaced if isinstance(batch, Mapping) else Argument(rebuilt(argument(batch), list(replaced.values())))


def _entries(batch: Batch) -> dict[Any, Any]:
    inputs = argument(batch)
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return dict(enumerate(inputs)) if is_sequence(inputs) else {}


def _refuse_two_readings(batch: Batch) -> None:
    found, opaque = tensors(batch), [leaf for leaf in leaves(batch) if is_opaque(leaf)]
    floating = any(tensor.is_floating_point() for tensor in found)
    if opaque or (floating and len(found) > 1):
        names = tuple(key for key, part in _entries(batch).items() if _has_numbers(part))
        raise DataError(
            f"The inputs are {described(batch)}: which of them are numbers that the method may replace by its own, and "
            "which a mask, time steps or edges that it must leave, cannot be seen: pass draw= with the names of the "
            f"numbers (of {names!r}), or draw=() to leave all as they are."
        )


def _has_numbers(part: Any) -> bool:
    return any(tensor.is_floating_point() for tensor in tensors(part))
