"""What a model's output says: logits, a loss of its own, or what a loss makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.batches.trees import described
from sapwood.errors import DataError, SapwoodError, UnsupportedModelError

IGNORED = -100
"""The class index that cross-entropy leaves out, in torch and in Hugging Face's models."""


class Measured(NamedTuple):
    """A batch's loss, a scalar, and the number of units that it is the mean over, if that is known."""

    loss: Tensor
    units: float | None


def output_tensor(output: Any) -> Tensor:
    """The logits in whatever a model returned: a tensor, an object or mapping with `logits`, the first of a tuple.

    In a tuple a loss (a scalar) before the logits is passed over.

    Raises:
        UnsupportedModelError: there is no tensor in the output.
    """
    for candidate in (output, getattr(output, "logits", None)):
        if isinstance(candidate, Tensor):
            return candidate
    if isinstance(output, Mapping) and "logits" in output:
        return output_tensor(output["logits"])
    if isinstance(output, tuple | list) and output:
        return output_tensor(output[1] if len(output) > 1 and _is_scalar(output[0]) else output[0])
    raise UnsupportedModelError(
        f"The model returned {type(output).__name__}; a tensor, a tuple that begins with one, or an object with "
        ".logits was expected. Pass forward=lambda model, inputs: ... that returns a tensor."
    )


def own_loss(output: Any) -> Tensor | None:
    """The loss that a model which was given targets returned: under `loss`, or the one scalar among its outputs.

    Raises:
        DataError: several scalars might be the loss, or what is under `loss` is none.
    """
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(named, Tensor):
        return _scalar(named, "The model's own loss")
    if _is_scalar(output):
        return output  # type: ignore[no-any-return]
    scalars = [part for part in output if _is_scalar(part)] if isinstance(output, tuple | list) else []
    if len(scalars) > 1:
        raise DataError(
            f"The model returned {described(output)} when it was given targets: any of its {len(scalars)} scalars may "
            "be the loss; pass loss=lambda output, batch: ..."
        )
    return scalars[0] if scalars else None


def measured(loss: Callable[[Any, Any], Any] | None, output: Any, target: Any) -> Measured:
    """A loss of an output; default: cross-entropy, the mean over the targets that count.

    Args:
        loss: `loss(output, target)`, a scalar, or a pair of a mean and the number of units that it is over.
        output: What the model returned, or its logits.
        target: The targets, or the batch if it is a mapping.

    Raises:
        DataError: the loss failed on what it was given, or is no scalar.
    """
    try:
        if loss is None:
            return Measured(cross_entropy(output, target), float(counted(target)))
        found = loss(output, target)
    except (SapwoodError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = "loss=" if loss else "The default loss (cross-entropy of class indices)"
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{what} failed on outputs of {described(output)} and targets of {described(target)}: "
            f"{type(error).__name__}: {reason}; give targets that fit it, or pass loss=lambda output, target: ..."
        ) from error
    units = None
    if isinstance(found, tuple) and len(found) == 2:
        found, units = found[0], float(found[1])
    return Measured(_scalar(found, "loss="), units)


def cross_entropy(output: Any, target: Any) -> Tensor:
    """Mean cross-entropy of the logits; classes in dimension 1, or last for targets of every position.

    Raises:
        DataError: the targets are not class indices, or the classes may be in either dimension.
    """
    logits = output_tensor(output)
    if not _are_classes(target):
        raise DataError(
            f"The targets, {described(target)}, are not class indices, which the default loss (cross-entropy) of "
            f"outputs of {described(logits)} needs; pass loss=."
        )
    if logits.dim() > 2 and classes_last(logits, target):
        return F.cross_entropy(logits.flatten(0, -2), target.long().flatten())
    return F.cross_entropy(logits, target.long())


def classes_last(logits: Tensor, target: Tensor) -> bool:
    """Whether the last dimension of the logits is that of the classes; else it is dimension 1.

    Raises:
        DataError: both fit.
    """
    last = target.shape == logits.shape[:-1]
    if last and logits.dim() > 2 and target.shape == logits.shape[:1] + logits.shape[2:]:
        raise DataError(
            f"For targets of {described(target)}, dimension 1 and the last one of the outputs, {described(logits)}, "
            "may be that of the classes: pass loss=lambda output, target: ... that says which."
        )
    return last


def counted(target: Any) -> int:
    """Number of the class indices that cross-entropy does not leave out; 1 for what are no class indices."""
    return int((target != IGNORED).sum()) if _are_classes(target) else 1


def _are_classes(target: Any) -> bool:
    numbers = isinstance(target, Tensor) and not target.is_floating_point() and not target.is_complex()
    return numbers and target.dtype != torch.bool


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _scalar(value: Any, whose: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise DataError(
            f"{whose} is {described(value)}, where a scalar was expected: the mean or the sum over the batch "
            "(reduction='mean' or 'sum'), or a pair (mean, number of units that it is over)."
        )
    return value.reshape(())
