"""Masks in PyTorch's own clothes: `torch.nn.utils.prune` (`weight_orig`, `weight_mask`) and parametrizations."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sapwood.errors import MaskError
from sapwood.masks import Masks, clean_name

PARAMETRIZED = re.compile(r"^(?P<module>.*?)\.?parametrizations\.(?P<leaf>\w+)\.\d+\.mask$")


def to_torch_prune(masks: Masks, model: nn.Module) -> nn.Module:
    """Puts masks on a model as `torch.nn.utils.prune` does: parameter `X_orig`, buffer `X_mask`, attribute `X`.

    Args:
        masks: The masks.
        model: The model they fit; changed in place.

    Raises:
        MaskError: the masks do not fit the model.
    """
    params = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    masks.check(params)
    modules = {clean_name(name): module for name, module in model.named_modules()}
    for name, mask in masks.items():
        module, _, leaf = name.rpartition(".")
        torch_prune.custom_from_mask(modules[module], leaf, mask.to(params[name].device))
    return model


def from_torch_prune(source: nn.Module | Mapping[str, Tensor]) -> Masks:
    """Reads masks from a model or state dict: `X_mask` buffers, or `parametrizations.X.0.mask` (non-zero = keep).

    Raises:
        MaskError: there is no mask in it.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    masks = {}
    for key, value in state.items():
        name = clean_name(key)
        if found := PARAMETRIZED.match(name):
            masks[".".join(filter(None, found.group("module", "leaf")))] = value != 0
        elif name.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in state:
            masks[name.removesuffix("_mask")] = value != 0
    if not masks:
        raise MaskError(
            "No masks found: a model or state dict with 'X_orig' and 'X_mask' (torch.nn.utils.prune) or "
            "'parametrizations.X.0.mask' entries was expected."
        )
    return Masks(masks)
