"""Scores of whole channels: pooled over the weights of each, so that they fall together.

An allocation keeps an exact number of weights, higher scores first and ties by position. All weights of a channel
share one score, so channels fall whole, except the one in which the budget ends: of that (one in all under a global
allocation, one a layer under a layer-wise one) the first weights stay, and likewise of channels that tie with it.
Budgets count weights, not channels: a channel of a wide layer spends more of it.

The rows of a recurrent layer's weight are the gates of its units, those of an attention layer's input projection the
queries, keys and values: each is a channel here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.errors import UnsupportedModelError, unknown_name
from sapwood.functional import FunctionalModel, Params
from sapwood.prunable import Layout

STRUCTURES = ("weights", "channels")


def check_structure(structure: str) -> None:
    """Refuses what is not one of `STRUCTURES`.

    Raises:
        ConfigError: it is not.
    """
    if structure not in STRUCTURES:
        raise unknown_name("structure", structure, STRUCTURES)


def structured(net: FunctionalModel, values: Params, structure: str) -> Params:
    """The values themselves, or for `"channels"` their sums over output channels."""
    return pooled(net, values) if structure == "channels" else values


def pooled(net: FunctionalModel, values: Params, *, inputs: bool = False) -> Params:
    """The sum over each output channel (or input channel), at every weight of it.

    Args:
        net: The model.
        values: One tensor a prunable weight, of its shape; a vector's entries are channels of one.
        inputs: Sum over input channels instead: over all weights that read one unit in this layer.

    Raises:
        UnsupportedModelError: a matrix is no layer's weight, so that its channels are not known.
    """
    for name in values:
        if name not in net.layout:
            raise UnsupportedModelError(
                f"{name!r} is not the weight of a layer, so which of its dimensions is the output channels' is not "
                "known: exclude it, or score single weights."
            )
    return {name: _pooled(value, net.layout[name], inputs) for name, value in values.items()}


def _pooled(value: Tensor, layout: Layout, inputs: bool) -> Tensor:
    if value.dim() < 2:
        return value
    if layout.output == int(inputs):  # the channels are in dimension 0
        return value.flatten(1).sum(1).reshape(-1, *[1] * (value.dim() - 1)).expand_as(value)
    by_group = torch.unflatten(value, 0, (layout.groups, -1))  # (groups, dim 0 / groups, dim 1, ...)
    sums = by_group.sum((1, *range(3, by_group.dim())), keepdim=True)
    return sums.expand_as(by_group).flatten(0, 1)
