"""The masks under which a model is looked at, and whether a pass has left the masked weights as they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sapwood.errors import UnsupportedModelError


def half_pruned(weight: Tensor) -> Tensor:
    """Where a weight is pruned: its first unit, what reads the first input, and half of all entries; bool.

    Of these there are as many in every row and in every column, and they are others in the transpose.
    """
    places = torch.zeros(weight.shape, dtype=torch.long, device=weight.device)
    for axis, size in enumerate(weight.shape):
        ramp = torch.arange(size, device=weight.device) * (3 if axis % 2 else 1)
        places += ramp.view(-1, *[1] * (weight.dim() - axis - 1))

    pruned = places % 4 < 2
    for axis in range(min(2, weight.dim())):
        if weight.shape[axis] > 1:
            pruned.select(axis, 0).fill_(True)
    return pruned


def masked_like(weight: Tensor, pruned: Tensor) -> Tensor:
    """The weight, zero where it is pruned; one that is zero everywhere (and so shows nothing) as a constant."""
    shown = weight if bool(weight.any()) else torch.full_like(weight, 0.05)
    return shown.masked_fill(pruned, 0)


def written_into(given: Mapping[str, Tensor], before: Mapping[str, Tensor], masked: Iterable[str]) -> frozenset[str]:
    """Names of the tensors that a pass has changed.

    Args:
        given: What the pass had, by name.
        before: What that was before it.
        masked: Names of the weights that are to be scored.

    Raises:
        UnsupportedModelError: one of `masked` has changed: its score would be another weight's than the applied one.
    """
    changed = {name for name, tensor in given.items() if not _equal(tensor, before[name])}
    for name in masked:
        if name in changed:
            raise UnsupportedModelError(
                f"The model's forward writes into its own parameter {name!r} (renormalised, clipped, max_norm=?), so "
                f"that it has no one value to score: turn that off, or leave the layer dense with exclude=({name!r},)."
            )
    return frozenset(changed)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
