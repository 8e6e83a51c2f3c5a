"""What is read of the user's module before it is scored: copies of its tensors, in a precision that can be scored."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from sapwood.errors import SapwoodWarning, ScoreError, UnsupportedModelError
from sapwood.functional.kinds import Params
from sapwood.names import Names
from sapwood.prunable import Weight

NOT_A_SCALE = ("bias", "beta", "token", "embed", "pos")


def readable(weight: Weight) -> Tensor:
    """A copy of a parameter, in no less than float32.

    Raises:
        ScoreError: it holds NaN or infinite values.
    """
    tensor = weight.tensor.detach().clone()
    if tensor.is_floating_point() and tensor.itemsize > 1 and not torch.isfinite(tensor).all():
        raise ScoreError(f"The parameter {weight.name!r} holds NaN or infinite values; nothing can be scored with it.")
    return widened(tensor)


def widened(tensor: Tensor) -> Tensor:
    """In no less than float32; a BatchNorm's statistics must not stay behind its weights."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def refuse_unreadable(model: nn.Module) -> None:
    """Refuses parameters that have no values, or none of their own.

    Raises:
        UnsupportedModelError: one is lazy, sharded, complex or on the meta device.
    """
    for name, parameter in Names.of(model).parameters.items():
        if isinstance(parameter, nn.UninitializedParameter):
            raise UnsupportedModelError(f"{name!r} has no shape yet: run one forward pass first (lazy module).")
        if hasattr(parameter, "device_mesh"):  # a DTensor, whose class takes a second to import
            raise UnsupportedModelError(
                f"{name!r} is sharded: prune the model first, then fully_shard it, then attach the masks."
            )
        if parameter.is_meta:
            raise UnsupportedModelError(f"{name!r} is on the meta device: give it values first.")
        if parameter.is_complex():
            raise UnsupportedModelError(f"{name!r} is complex; only real weights can be scored.")


def opened_branches(params: Params) -> Params:
    """Scale vectors that close a branch at initialisation (all one small constant), set to one."""
    closed = [name for name, p in params.items() if _is_scale(name, p) and _is_small_constant(p)]
    if closed:
        warnings.warn(
            f"{len(closed)} scales are initialised to zero or nearly so ({closed[0]!r}, ...): scored as ones, so that "
            "their branches are not pruned by an accident of initialisation; zero_init='keep' scores them as they are.",
            SapwoodWarning,
            stacklevel=4,
        )
    return {name: torch.ones_like(params[name]) for name in closed}


def _is_scale(name: str, parameter: Tensor) -> bool:
    """A scalar, or one number per channel: (C,), (C, 1, 1); not (1, 1, C), which is a token or a position."""
    per_channel = parameter.dim() == 0 or parameter.numel() == parameter.shape[0]
    return per_channel and not any(word in name.rpartition(".")[2] for word in NOT_A_SCALE)


def _is_small_constant(parameter: Tensor) -> bool:
    first = parameter.flatten()[0]
    return bool(first.abs() <= 0.1) and bool((parameter == first).all())
