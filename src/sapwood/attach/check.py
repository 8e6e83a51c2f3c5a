"""The masked parameters of a model, and whether they obey their masks."""

from __future__ import annotations

from torch import nn

from sapwood.attach.pruned import Pruned
from sapwood.errors import MaskError
from sapwood.masks import Masks
from sapwood.names import Names


def assert_masked(model: nn.Module, masks: Masks, *, strict: bool = True) -> None:
    """Checks that every pruned weight of `model` is exactly zero; sharded parameters are checked on this rank's shard.

    Raises:
        MaskError: a weight is not zero (NaN included), or the masks do not fit the model.
    """
    names = Names.of(model)
    for name, mask in names.fit(masks, strict=strict).items():
        parameter, pruned = names.parameters[name], Pruned(name, mask)
        alive = pruned.alive(parameter)
        if alive.numel():
            raise MaskError(
                f"Layer {name!r}: {alive.numel()} of {int(pruned.like(parameter).sum())} pruned weights are not zero "
                f"(largest magnitude {alive.abs().max().item():.3g}); was an optimizer stepped, or a state loaded, "
                "without attach?"
            )
