"""The masked parameters of a model, and whether they obey their masks."""

from __future__ import annotations

from torch import nn

from sapwood.attach.pruned import Pruned
from sapwood.errors import MaskError
from sapwood.masks import Masks, clean_name


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters under the names that masks have: the one place where attaching translates names."""
    return {clean_name(name): parameter for name, parameter in model.named_parameters()}


def masked_parameters(masks: Masks, model: nn.Module, strict: bool) -> dict[str, nn.Parameter]:
    """The parameters that have a mask.

    Raises:
        MaskError: the masks do not fit the model.
    """
    parameters = named_parameters(model)
    masks.check(parameters, strict=strict)
    return {name: parameters[name] for name in masks}


def assert_masked(model: nn.Module, masks: Masks, *, strict: bool = True) -> None:
    """Checks that every pruned weight of `model` is exactly zero; sharded parameters are checked on this rank's shard.

    Raises:
        MaskError: a weight is not zero (NaN included), or the masks do not fit the model.
    """
    for name, parameter in masked_parameters(masks, model, strict).items():
        pruned = Pruned(name, masks[name])
        alive = pruned.alive(parameter)
        if alive.numel():
            raise MaskError(
                f"Layer {name!r}: {alive.numel()} of {int(pruned.like(parameter).sum())} pruned weights are not zero "
                f"(largest magnitude {alive.abs().max().item():.3g}); was an optimizer stepped, or a state loaded, "
                "without attach?"
            )
