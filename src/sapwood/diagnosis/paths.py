"""Effective sparsity: kept weights that lie on no path from an input to an output do nothing, and are found here.

A weight behind an emptied channel, or in front of one, counts into the budget without ever reaching the output
(Vysogorets and Kempe 2023, "Connectivity Matters", call what is left the effective sparsity). A network whose kept
weights are all ones and whose biases are all zero, run as a positive flow on an input of ones, has a gradient of
exactly zero for just those weights: what flows is a sum of products over paths, and nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sapwood.batches import Batch, Data, filled
from sapwood.criteria.linear_flow import LinearFlow
from sapwood.functional import Forward, FunctionalModel, Params
from sapwood.isolation import device_of, isolated
from sapwood.masks import Masks
from sapwood.names import Names
from sapwood.rows import shortened
from sapwood.witness import opened

CONSTANT = ("bias", "beta")  # they put values in that come from no input


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
        ones = filled(template, lambda t: torch.ones_like(t, device=device), data.draw)
        leaves = {n: _probe(n, p, masks.get(n)) for n, p in net.params.items() if p.is_floating_point()}
        wanted = {name: leaf.requires_grad_() for name, leaf in leaves.items() if name in masks}
        with _Paths(), LinearFlow():
            output = net.outputs(leaves, ones, buffers=_uncentred(net))
        gradient = net.differentiate(output.sum(), wanted)
    return Masks({n: mask & (gradient[n] != 0).to(mask.device) for n, mask in masks.items()}, masks.provenance)


class _Paths(TorchFunctionMode):
    """A context that keeps flows near one, however deep the network, and lets pooling pass all of its inputs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Levels the outputs of linear functions and calls the stand-ins of the others."""
        output = STAND_INS.get(func, func)(*args, **(kwargs or {}))
        if func not in LINEAR:
            return output
        peak = output.detach().max()
        return output / torch.where(peak > 0, peak, 1)


def _average(pool: Callable[..., Tensor], average: Callable[..., Tensor]) -> Callable[..., Any]:
    """Max pooling passes one input of every window, by an accident of values; its average passes all of them."""

    def pooled(
        input: Tensor,
        size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        **_: Any,
    ) -> Tensor:
        if dilation not in (1, (1,), (1, 1), (1, 1, 1)):  # for which there is no average
            return pool(input, size, stride, padding, dilation, ceil_mode)
        return average(input, size, stride, padding, ceil_mode)

    return pooled


LINEAR = (
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
)  # fmt: skip
STAND_INS: dict[Any, Callable[..., Any]] = {
    F.max_pool1d: _average(F.max_pool1d, F.avg_pool1d),
    F.max_pool2d: _average(F.max_pool2d, F.avg_pool2d),
    F.max_pool3d: _average(F.max_pool3d, F.avg_pool3d),
    F.adaptive_max_pool1d: lambda input, size, *_, **__: F.adaptive_avg_pool1d(input, size),
    F.adaptive_max_pool2d: lambda input, size, *_, **__: F.adaptive_avg_pool2d(input, size),
    F.adaptive_max_pool3d: lambda input, size, *_, **__: F.adaptive_avg_pool3d(input, size),
    torch.amax: torch.mean,
    Tensor.amax: Tensor.mean,
}


def _probe(name: str, parameter: Tensor, mask: Tensor | None) -> Tensor:
    """A mask, or ones where there is none, divided by the fan-in, so that no gate of a recurrent cell saturates."""
    if mask is None and any(word in name.rpartition(".")[2] for word in CONSTANT):
        return torch.zeros_like(parameter, dtype=torch.float64)
    ones = torch.ones_like(parameter) if mask is None else mask.to(parameter.device)
    return ones.double() / (parameter[0].numel() if parameter.dim() > 1 else 1)


def _uncentred(net: FunctionalModel) -> Params:
    """Buffers in float64, with running means of zero: a flow is not centred."""
    buffers = {name: b.double().abs() if b.is_floating_point() else b.clone() for name, b in net.buffers.items()}
    means = {name: torch.zeros_like(buffer) for name, buffer in buffers.items() if name.endswith("running_mean")}
    return buffers | means
