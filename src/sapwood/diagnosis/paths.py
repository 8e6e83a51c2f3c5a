"""Effective sparsity: kept weights that lie on no path from an input to an output do nothing, and are found here.

A weight behind an emptied channel, or in front of one, counts into the budget without ever reaching the output
(Vysogorets and Kempe 2023, "Connectivity Matters", call what is left the effective sparsity). A network whose kept
weights are all ones and whose biases are all zero, run as a positive flow on an input of ones, has a gradient of
exactly zero for just those weights: what flows is a sum of products over paths, and nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sapwood.batches import Batch, Data, filled
from sapwood.flow import PositiveFlow
from sapwood.flow.pooling import AVERAGES
from sapwood.flow.state import is_constant, statistics
from sapwood.functional import Forward
from sapwood.isolation import device_of, isolated
from sapwood.masks import Masks
from sapwood.names import Names
from sapwood.witness import opened
from sapwood.witness.rows import shortened


def effective(
    model: nn.Module,
    masks: Masks,
    *,
    input_shape: Iterable[int] | None = None,
    batches: Iterable[Batch] | None = None,
    draw: Iterable[str] | None = None,
    forward: Forward | None = None,
) -> Masks:
    """The masks without the kept weights that are on no path from an input to an output.

    It depends on the model's structure and on the input's shape, not on the values of the weights. What a path can
    pass is decided by torch's operations: all of them but a product with zero, so that a layer outside of the masks
    connects whatever its values; a 3x3 kernel on a 1x1 image has one weight that sees more than the padding.

    Args:
        model: The model that the masks are for; it is not changed.
        masks: Its masks.
        input_shape: Shape of one sample without the batch, e.g. (3, 32, 32).
        batches: Batches to take the shapes, or integer inputs, from instead.
        draw: Which tensors of a mapping are numbers, as in `prune`.
        forward: `forward(model, inputs)`, for models that are not simply called.

    Returns:
        Masks that keep a part of what `masks` keep; their `sparsity` is the effective sparsity.

    Raises:
        MaskError: the masks are another model's.
        DataError: neither an input shape nor batches were given.
        UnsupportedModelError: the model cannot be run on such an input.

    Example:
        >>> import torch
        >>> from sapwood import Masks
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> cut = {"0.weight": torch.tensor([[True, True], [True, False]]), "1.weight": torch.tensor([[True, False]])}
        >>> effective(model, Masks(cut), input_shape=(2,)).per_layer()["0.weight"].kept
        2
    """
    masks = Names.of(model).fit(masks, strict=False)
    device = device_of(model)
    with isolated(0, device):
        data = Data.collect(batches, input_shape, device, draw)
        net = opened(model, data, masked=tuple(masks), include=tuple(masks), forward=forward, zero_init="keep")
        template = shortened(net, data.templates()[0], 1)
        ones = filled(template, lambda t: torch.ones_like(t, device=device, dtype=torch.float64), data.draw)
        leaves = {n: _probe(n, p, masks.get(n)) for n, p in net.params.items() if p.is_floating_point()}
        wanted = {name: leaf.requires_grad_() for name, leaf in leaves.items() if name in masks}
        state = statistics(net, torch.abs)
        with PositiveFlow(ones, {**leaves, **state}, pools=AVERAGES, paths=True, level=True) as flow:
            output = flow.arrived(net.outputs(leaves, ones, buffers=state))
        gradient = net.differentiate(output.sum(), wanted)
    return Masks({n: mask & (gradient[n] != 0).to(mask.device) for n, mask in masks.items()}, masks.provenance)


def _probe(name: str, parameter: Tensor, mask: Tensor | None) -> Tensor:
    """A mask, or ones where there is none, divided by the fan-in, so that no gate of a recurrent cell saturates."""
    if mask is None and is_constant(name):
        return torch.zeros_like(parameter, dtype=torch.float64)
    ones = torch.ones_like(parameter) if mask is None else mask.to(parameter.device)
    return ones.double() / (parameter[0].numel() if parameter.dim() > 1 else 1)
