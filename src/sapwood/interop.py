"""Masks in PyTorch's own clothes: `torch.nn.utils.prune` (`weight_orig`, `weight_mask`) and parametrizations.

torch recomputes a pruned weight, `weight_orig * weight_mask`, in a hook of the module that owns it. Where the forward
of another module uses the weight without calling its owner (MultiheadAttention's output projection, a matrix in a
ParameterList, a layer whose weight is passed to `F.linear`), that hook never runs: outputs are those of weights of
before, and the second `backward` fails. So `to_torch_prune` has the modules above the owner recompute it, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils import _pytree as pytree

from sapwood.errors import MaskError, UnsupportedModelError
from sapwood.masks import WRAPPERS, Masks
from sapwood.names import Names, has_forward, wrapped

PARAMETRIZED = re.compile(r"^(?P<module>.*?)\.?parametrizations\.(?P<leaf>\w+)\.\d+\.mask$")


def to_torch_prune(masks: Masks, model: nn.Module) -> nn.Module:
    """Puts masks on a model as `torch.nn.utils.prune` does: parameter `X_orig`, buffer `X_mask`, attribute `X`.

    A tied weight is masked in all of its owners. `torch.nn.utils.prune.remove` works on each of them as usual.

    Args:
        masks: The masks.
        model: The model they fit; changed in place.

    Raises:
        MaskError: the masks do not fit the model; nothing was changed.
        UnsupportedModelError: an attribute of a module holds a masked weight besides being its parameter, where no mask
            of torch's reaches it, or the model is sharded; nothing was changed.
    """
    names = Names.of(model)
    masks = names.fit(masks)
    _refuse_sharded(model, names)
    aliases = [alias for name in masks for alias in names.aliases[name]]
    _refuse_held_elsewhere({id(names.parameters[name]): name for name in masks}, names)

    done: set[tuple[int, str]] = set()  # a shared module has several names
    for alias in aliases:
        module, leaf = names.owner(alias)
        if (id(module), leaf) not in done:
            mask = masks[names.first[alias]].to(names.tensors[alias].device)
            torch_prune.custom_from_mask(module, leaf, mask)
        done.add((id(module), leaf))

    above = {id(module): module for alias in aliases for module in _above(alias, names)}
    for module in above.values():
        module.register_forward_pre_hook(_recompute, prepend=True)
    return model


def from_torch_prune(source: nn.Module | Mapping[str, Tensor]) -> Masks:
    """Reads masks from a model or state dict: `X_mask` buffers, or `parametrizations.X.0.mask` (1 = keep).

    A tied weight has one mask, under its first name. Copies of the owners' weights in a file are not seen to be tied.

    Raises:
        MaskError: there is no mask in it; a mask holds other values than 0 and 1; or of the owners of a tied weight
            only some are masked, or not alike, so that no mask of the weight says the same.
    """
    if isinstance(source, nn.Module):
        state: Mapping[str, Tensor] = Names.of(source).tensors
    else:
        state = _without_prefix(source)

    masks: dict[str, Tensor] = {}
    for key, value in state.items():
        if (name := _masked_by(key, state)) is not None:
            kept = _kept(key, value)
            masks[name] = masks[name] & kept if name in masks else kept
    if not masks:
        raise MaskError(
            "No masks found: a model or state dict with 'X_orig' and 'X_mask' (torch.nn.utils.prune) or "
            "'parametrizations.X.0.mask' entries was expected."
        )
    return Masks(_once_each(masks, state))


def _refuse_sharded(model: nn.Module, names: Names) -> None:
    sharded = [name for name, parameter in names.parameters.items() if hasattr(parameter, "device_mesh")]
    if sharded or any(wrapped(module) == "_fsdp_wrapped_module" for module in model.modules()):
        raise UnsupportedModelError(
            "A sharded model keeps its parameters under their names, and torch.nn.utils.prune renames them: convert "
            "the model before sharding it, or use sapwood.attach with fully_shard."
        )


def _above(name: str, names: Names) -> list[nn.Module]:
    """The model, and the nearest module above the owner of a parameter that has a forward (a ModuleList has none)."""
    path = name.split(".")[:-2]
    prefixes = [".".join(path[:end]) for end in range(len(path), -1, -1)]
    callers = [names.modules[prefix] for prefix in prefixes if has_forward(names.modules[prefix])]
    return [*callers[:1], names.modules[""]]


def _recompute(module: nn.Module, inputs: Any) -> None:
    """A hook before a forward: every weight that torch has pruned below, from its present `X_orig`."""
    for part in module.modules():
        for hook in list(part._forward_pre_hooks.values()):
            if isinstance(hook, torch_prune.BasePruningMethod):
                hook(part, inputs)


def _refuse_held_elsewhere(masked: Mapping[int, str], names: Names) -> None:
    """What holds the parameter itself, and not the module that has it, goes on to show it without its mask."""
    for owner, module in names.modules.items():
        for attribute, value in vars(module).items():
            known = isinstance(module, nn.RNNBase) and attribute == "_flat_weights"  # which torch keeps up to date
            if known or attribute in ("_parameters", "_modules"):
                continue
            for name in (masked[id(held)] for held in _held(value, names) if id(held) in masked):
                raise UnsupportedModelError(
                    f"{name!r} is also held by the attribute {attribute!r} of {owner or 'the model'!r}, where no mask "
                    "of torch.nn.utils.prune reaches it: use sapwood.attach, or have the forward read the parameter "
                    "from its module."
                )


def _held(value: Any, names: Names) -> Iterator[Any]:
    """What an attribute holds in containers, in closures of functions, and in modules that are not the model's."""
    for leaf in pytree.tree_leaves(value):
        yield leaf
        for cell in getattr(leaf, "__closure__", None) or ():
            with suppress(ValueError):  # an empty cell
                yield cell.cell_contents
        if isinstance(leaf, nn.Module) and not any(leaf is module for module in names.modules.values()):
            yield from leaf.parameters()


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the words that wrappers put before or into names; `module.` only if all names have it."""
    state = {".".join(part for part in key.split(".") if part not in WRAPPERS): value for key, value in state.items()}
    state.pop("n_averaged", None)  # AveragedModel's
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _masked_by(key: str, state: Mapping[str, Tensor]) -> str | None:
    """The parameter that an entry masks; None if it is no mask."""
    if found := PARAMETRIZED.match(key):
        return ".".join(filter(None, found.group("module", "leaf")))
    name = key.removesuffix("_mask")
    return name if name != key and f"{name}_orig" in state else None


def _kept(key: str, value: Tensor) -> Tensor:
    if not bool(((value == 0) | (value == 1)).all()):
        raise MaskError(f"{key!r} holds other values than 0 and 1, so it scales weights and is no mask.")
    return value != 0


def _once_each(masks: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One mask a tied weight, under the first of its names."""
    owners: dict[Any, list[str]] = {}
    for key, tensor in state.items():
        name = key.removesuffix("_orig")
        owners.setdefault(_memory(tensor), []).append(name if name in masks else key)

    once = {}
    for name, mask in masks.items():
        tied = owners[_memory(state[f"{name}_orig"])] if f"{name}_orig" in state else [name]
        for other in tied:
            if other not in masks or not torch.equal(masks[other], mask):
                raise MaskError(
                    f"{name!r} and {other!r} are one tied weight, but their masks differ (or one has none): prune both "
                    "owners alike with torch.nn.utils.prune.custom_from_mask."
                )
        once[tied[0]] = mask
    return once


def _memory(tensor: Tensor) -> Any:
    """Equal for tensors that are one: a state dict shows tied parameters as tensors over the same memory."""
    known = tensor.numel() and not tensor.is_meta
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if known else id(tensor)
