"""Names: what wrappers put into the names of parameters is taken out here, and put back, one-to-one.

A wrapper (`torch.compile`, DataParallel, DDP, FSDP1, AveragedModel, activation checkpointing, Fabric) holds the module
that it stands for under an attribute of its own, which shows in `model.named_parameters()`. *Clean* names are those of
the same model without its wrappers, wherever in it they are; *raw* names are what torch says. Masks, results and
patterns are keyed by clean names. Whether a module is a wrapper is decided by its type, never by the attribute's name:
a user's own module may be called `module` or `_orig_mod`, and keeps that name.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.errors import MaskError, UnsupportedModelError
from sapwood.masks import Masks, fingerprint, matched

WRAPPERS = (  # where a type is defined, its name, and the attribute that holds what it wraps
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_forward_module"),
    ("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
)
HOOKS = "_forward_.*hooks.*"  # attributes of torch's modules


class Passing(nn.Module):
    """Stands for a wrapper in a copy: it calls what it holds, and compiles, scatters, checkpoints, exchanges nothing.

    Args:
        attribute: Where the wrapper holds the wrapped module, and where this one holds `inner`.
        inner: A copy of the wrapped module.
        wrapper: The wrapper itself, whose forward hooks are taken over.
    """

    def __init__(self, attribute: str, inner: nn.Module, wrapper: nn.Module) -> None:
        super().__init__()
        self.attribute = attribute
        self._modules[attribute] = inner
        vars(self).update({key: copy.copy(value) for key, value in vars(wrapper).items() if re.fullmatch(HOOKS, key)})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped module."""
        return self.get_submodule(self.attribute)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Also finds what the wrapped module has, as most wrappers do."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.attribute), name)


def wrapped(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds the module that it stands for; None for any other module.

    A subclass with a forward of its own does more than to call what it holds, and is no wrapper. A type whose file was
    never imported has no instances, so nothing is imported to ask.
    """
    if isinstance(module, Passing):
        return module.attribute
    for place, name, attribute in WRAPPERS:
        kind = getattr(sys.modules.get(place), name, None)
        if kind is not None and isinstance(module, kind) and attribute in module._modules:
            written_in = type(module).forward.__module__
            return attribute if written_in.partition(".")[0] == place.partition(".")[0] else None
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside any wrappers around the whole of it.

    Raises:
        UnsupportedModelError: FSDP1 holds the weights in shards.
    """
    attribute = wrapped(model)
    if attribute is None:
        return model
    _refuse_shards(model)
    return unwrapped(model.get_submodule(attribute))


@dataclass(frozen=True)
class Names:
    """The names of a model's tensors and modules, read from the module itself.

    What a wrapper holds besides the module that it wraps (AveragedModel's counter) is no part of the user's model and
    has no name here.

    Attributes:
        parameters: Every parameter once, by the first of its clean names, in torch's order.
        buffers: Every buffer once, likewise.
        modules: Every module that is not a wrapper, by clean name, shared ones under each of theirs.
        tensors: All parameters and buffers by all their clean names: tied ones under each of theirs.
        raw: The raw name of each clean name in `tensors`, relative to the model.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    modules: dict[str, nn.Module]
    tensors: dict[str, Tensor]
    raw: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        """Reads a model; raw names are relative to it, wrapped or not.

        Raises:
            UnsupportedModelError: two tensors would share a clean name, or FSDP1 holds the weights in shards.
        """
        names = cls({}, {}, {}, {}, {})
        known: set[int] = set()
        for raw, clean, module in _walk(model):
            names.modules[clean.removesuffix(".")] = module
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    names._add(clean + leaf, raw + leaf, tensor)
                    names._add_once(clean + leaf, tensor, known)
        return names

    def _add(self, clean: str, raw: str, tensor: Tensor) -> None:
        if clean in self.raw:
            raise UnsupportedModelError(
                f"The parameters {self.raw[clean]!r} and {raw!r} would both be called {clean!r} without their "
                "wrappers: rename one of the modules (a name that contains a dot?)."
            )
        self.raw[clean], self.tensors[clean] = raw, tensor

    def _add_once(self, clean: str, tensor: Tensor, known: set[int]) -> None:
        if id(tensor) not in known and isinstance(tensor, nn.Parameter):
            self.parameters[clean] = tensor
        elif id(tensor) not in known:
            self.buffers[clean] = tensor
        known.add(id(tensor))

    @cached_property
    def first(self) -> dict[str, str]:
        """For every clean name the first one of the same tensor, under which masks hold it."""
        names = {id(tensor): name for name, tensor in (*self.parameters.items(), *self.buffers.items())}
        return {clean: names[id(tensor)] for clean, tensor in self.tensors.items()}

    @cached_property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """All clean names of each tensor, by its first."""
        found: dict[str, tuple[str, ...]] = {}
        for alias, name in self.first.items():
            found[name] = (*found.get(name, ()), alias)
        return found

    def owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a tensor, and the attribute under which it does."""
        path, _, leaf = name.rpartition(".")
        return self.modules[path], leaf

    def translated(self, names: Iterable[str]) -> dict[str, str]:
        """For each given name the first clean name of its tensor.

        All are read as clean names if all of them are names of this model, else all as raw ones if they all are; else
        they are matched but for the words of wrappers, so that names from a wrapper that is not known here are found.

        Raises:
            MaskError: a name is none of the model's.
        """
        names, first = list(names), self.first
        raw = {self.raw[clean]: target for clean, target in first.items()}
        for table in (first, raw):
            if all(name in table for name in names):
                return {name: table[name] for name in names}
        return matched(names, (*self.parameters, *self.buffers))

    def fit(self, masks: Masks, *, strict: bool = True) -> Masks:
        """The masks under this model's clean names, checked; two equal masks of one tied weight are one.

        Raises:
            MaskError: a masked name is missing, a shape differs, a tied weight has two unlike masks, or the fingerprint
                is another model's (`strict`).
        """
        for name, parameter in self.parameters.items():
            if isinstance(parameter, nn.UninitializedParameter):
                raise MaskError(f"{name!r} has no shape yet: run one forward pass first (lazy module).")
        owners: dict[str, str] = {}
        for name, target in self.translated(masks).items():
            owner = owners.setdefault(target, name)
            if owner != name and not torch.equal(masks[owner], masks[name].to(masks[owner].device)):
                raise MaskError(f"{owner!r} and {name!r} are one tied weight, but their masks differ: keep one.")
        fitted = Masks({target: masks[name] for target, name in owners.items()}, masks.provenance)
        as_torch_says = {self.raw[name]: tensor for name, tensor in self.parameters.items()}
        known = masks.provenance.get("fingerprint") == fingerprint(as_torch_says)  # a file from before clean names
        fitted.check(self.parameters, strict=strict and not known)
        return fitted


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called (a ModuleList or a bare holder of parameters cannot)."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by the first of its clean names, in torch's order."""
    return Names.of(model).parameters


def _refuse_shards(wrapper: nn.Module) -> None:
    """FSDP1 keeps the original shapes with its flat parameter; its modules hold other ones outside of a forward."""
    flat = getattr(getattr(wrapper, "_handle", None), "flat_param", None)
    if flat is None:
        return
    for (leaf, module, path), shape in zip(flat._param_infos, flat._shapes, strict=True):
        if getattr(module._parameters.get(leaf), "shape", None) != shape:
            name = f"{path}.{leaf}" if path else leaf
            raise UnsupportedModelError(
                f"{name!r} is sharded or flattened by FullyShardedDataParallel: prune the model before wrapping it "
                "(then fully_shard, and attach), or call this inside FSDP.summon_full_params(model)."
            )


def _walk(module: nn.Module, raw: str = "", clean: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Every module that is not a wrapper, below its raw and its clean prefix, in torch's order."""
    attribute = wrapped(module)
    if attribute is not None:
        _refuse_shards(module)
        yield from _walk(module.get_submodule(attribute), f"{raw}{attribute}.", clean)
        return
    yield raw, clean, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{raw}{name}.", f"{clean}{name}.")
