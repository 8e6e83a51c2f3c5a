"""How many paths lead from the inputs to the outputs, and how many of them use each kept weight.

A path is a chain of kept weights from one entry of the input to one output (in a convolution, pixel by pixel). A
network whose kept weights are ones, run as a positive flow on an input of ones, has their number P as the sum of its
outputs; P is linear in every weight m, so that m dP/dm of the paths use it. Norms pass through, pools sum, and in
attention a path runs through query, key and value together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sapwood.batches import Batch, Draw, filled
from sapwood.errors import UnsupportedModelError
from sapwood.flow import PositiveFlow
from sapwood.flow.pooling import SUMS
from sapwood.flow.state import is_constant
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks

SCALES = (1.0, 1e-300)  # of the inputs and of the outputs: float64 then counts to 10^308 or to 10^600


@dataclass(frozen=True)
class Paths:
    """Numbers of paths.

    Attributes:
        log10: Decimal logarithm of their number; -inf for none, inf beyond 10^600.
        shares: Share of the paths that use each weight, in the masks' shapes; zero where there are no paths.
    """

    log10: float
    shares: Mapping[str, Tensor]


def count(net: FunctionalModel, masks: Masks, template: Batch, draw: Draw = None) -> Paths:
    """Counts for one input of the template's shape; call it under `isolated`."""
    for scale in SCALES:
        leaves = {name: _ones(name, p, masks.get(name)) for name, p in net.params.items() if _is_real(p)}
        wanted = {name: leaf.requires_grad_() for name, leaf in leaves.items() if name in masks}
        fill = partial(torch.full_like, fill_value=scale, device=net.device, dtype=torch.float64)
        inputs = filled(template, fill, draw)
        state = _unit(net)
        with PositiveFlow(inputs, {**leaves, **state}, pools=SUMS, paths=True) as flow:
            output = flow.arrived(net.outputs(leaves, inputs, buffers=state))
        total = output.sum()
        seed = torch.full_like(total, scale)
        if not total.requires_grad:
            raise UnsupportedModelError("The model's output does not depend on the masked weights through autograd.")
        found = torch.autograd.grad(total, list(wanted.values()), seed, materialize_grads=True)
        value = float(total.detach())
        if math.isfinite(value) and all(bool(torch.isfinite(g).all()) for g in found):
            return _paths(value, scale, dict(zip(wanted, found, strict=True)), leaves)
    return Paths(math.inf, {name: torch.zeros_like(mask, dtype=torch.float64) for name, mask in masks.items()})


def _paths(value: float, scale: float, gradients: Params, leaves: Params) -> Paths:
    log10 = math.log10(value) - math.log10(scale) if value > 0 else -math.inf
    some = value > 0
    parts = {n: leaves[n].detach() * g / (value * scale) if some else torch.zeros_like(g) for n, g in gradients.items()}
    return Paths(log10, parts)


def _is_real(parameter: Tensor) -> bool:
    return parameter.is_floating_point()


def _ones(name: str, parameter: Tensor, mask: Tensor | None) -> Tensor:
    """A mask, or ones where there is none; constants lead no path."""
    if mask is None:
        return (torch.zeros_like if is_constant(name) else torch.ones_like)(parameter, dtype=torch.float64)
    return mask.to(parameter.device, torch.float64)


def _unit(net: FunctionalModel) -> Params:
    """Buffers under which BatchNorm passes a flow as it is, but for its epsilon."""
    fills = {"running_mean": torch.zeros_like, "running_var": torch.ones_like}
    found = {name: b.double() if b.is_floating_point() else b.clone() for name, b in net.buffers.items()}
    return {name: fills.get(name.rpartition(".")[2], torch.clone)(buffer) for name, buffer in found.items()}
