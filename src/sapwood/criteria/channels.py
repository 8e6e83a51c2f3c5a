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
CANCELS = 1e-4  # of the terms' magnitudes: a sum that is zero but for rounding and a norm's epsilon


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
    return {name: _pooled(value, layout_of(net, name), inputs) for name, value in values.items()}


def layout_of(net: FunctionalModel, name: str) -> Layout:
    """Where a prunable weight has its channels.

    Raises:
        UnsupportedModelError: a matrix is no layer's weight, so that they are not known.
    """
    if name not in net.layout:
        raise UnsupportedModelError(
            f"{name!r} is not the weight of a layer, so which of its dimensions is the output channels' is not "
            "known: exclude it, or score single weights."
        )
    return net.layout[name]


def channel_of(weight: Tensor, layout: Layout, *, inputs: bool = False) -> Tensor:
    """The number of the output (or input) channel of each entry of a prunable weight, to be broadcast over it."""
    device, size = weight.device, weight.shape
    if weight.dim() < 2 or layout.output == int(inputs):  # the channels are in dimension 0
        return torch.arange(size[0], device=device).reshape(-1, *[1] * (weight.dim() - 1))
    firsts = torch.arange(layout.groups, device=device).repeat_interleave(size[0] // layout.groups) * size[1]
    numbers = firsts.unsqueeze(1) + torch.arange(size[1], device=device)
    return numbers.reshape(*size[:2], *[1] * (weight.dim() - 2))


def channel_sums(value: Tensor, layout: Layout, *, inputs: bool = False) -> Tensor:
    """The sum over each output (or input) channel, one entry a channel, in the order of `channel_of`."""
    if value.dim() < 2:
        return value
    if layout.output == int(inputs):
        return value.flatten(1).sum(1)
    by_group = torch.unflatten(value, 0, (layout.groups, -1))  # (groups, dim 0 / groups, dim 1, ...)
    return by_group.sum((1, *range(3, by_group.dim()))).flatten()


def refuse_without_scale(
    net: FunctionalModel, changes: Params, sums: Params | None = None, *, inputs: bool = False
) -> None:
    """Refuses a layer whose channels cannot be scored by what scaling them does, since it does nothing.

    Args:
        net: The model.
        changes: w dL/dw of every prunable weight.
        sums: The scores of the channels, one entry a channel; by default the sums of `changes`.
        inputs: The channels are those that a layer reads.

    Raises:
        UnsupportedModelError: in at least half of a layer's channels (two or more) the sum is 0 though its terms are
            not.
    """
    for name, change in changes.items():
        sizes = channel_sums(change.abs(), layout_of(net, name), inputs=inputs)
        found = channel_sums(change, layout_of(net, name), inputs=inputs) if sums is None else sums[name]
        alive = sizes > 0
        cancelled = alive & (found.abs() <= CANCELS * sizes)
        if int(cancelled.sum()) >= max(2, int(alive.sum()) / 2):
            raise UnsupportedModelError(
                f"The scale of the channels of {name!r} has no effect on the loss (a normalisation takes it out), so "
                "that all of them would score zero: exclude the layer, score single weights, or, if it is BatchNorm, "
                "set batch_statistics=False."
            )


def _pooled(value: Tensor, layout: Layout, inputs: bool) -> Tensor:
    sums = channel_sums(value, layout, inputs=inputs)
    return sums[channel_of(value, layout, inputs=inputs)].expand_as(value)
