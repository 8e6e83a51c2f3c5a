"""What parameters and buffers are while a network runs as a positive flow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sapwood.flow.sums import hides
from sapwood.functional import FunctionalModel, Params

CONSTANT = ("bias", "beta")


def is_constant(name: str) -> bool:
    """Whether a parameter puts values in that come from no input."""
    return any(word in name.rpartition(".")[2] for word in CONSTANT)


def non_negative(tensor: Tensor, positive: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor in float64 under `positive`; integers, and masks that hide from a softmax, as they are."""
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.double()
    return tensor if hides(tensor) else positive(tensor)


def statistics(net: FunctionalModel, positive: Callable[[Tensor], Tensor]) -> Params:
    """Buffers in float64; running means are zero, since a flow is not centred."""
    return {
        name: torch.zeros_like(buffer, dtype=torch.float64)
        if name.endswith("running_mean")
        else non_negative(buffer, positive).clone()
        for name, buffer in net.buffers.items()
    }
