"""How much each batch weighs: the number of units that its loss is the mean over."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sapwood.batches import Batch, Counts, Measured, counted, counts, size_or_one, target_of
from sapwood.functional.kinds import Params

if TYPE_CHECKING:
    from sapwood.functional.model import FunctionalModel


def units(net: FunctionalModel, batches: tuple[Batch, ...]) -> list[float]:
    """The units of each labelled batch (see `sapwood.batches.units`); 0 for one without a target that counts."""
    if net.loss_fn is None and not any(net.module.takes_targets(batch) for batch in batches):
        return [counted(target_of(batch)) for batch in batches]
    if len(batches) == 1 and net.group is None:
        return [size_or_one(batches[0]) if counted(target_of(batches[0])) else 0]

    @torch.no_grad()
    def look(params: Params, batch: Batch) -> Measured:
        return net.measured(params, batch, train=False)

    # At its own weights, a model whose last layer begins at zero has the same loss for all samples.
    looks = [partial(look, params) for params in (net.weights, net.drawn())]
    return counts(batches, looks, partial(_everywhere, net))


def _everywhere(net: FunctionalModel, found: Counts) -> list[Counts]:
    """What every process has found."""
    if net.group is None:
        return [found]
    every: list[Any] = [None] * dist.get_world_size(net.group)
    dist.all_gather_object(every, found, group=net.group)
    return every
