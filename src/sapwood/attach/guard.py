"""Hooks on modules: pruned weights are zero before any forward pass that could read them, and in every state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sapwood.attach.gradients import carried, carry
from sapwood.attach.pruned import Pruned
from sapwood.attach.stepping import watch_all_optimizers
from sapwood.errors import MaskError

Function = TypeVar("Function", bound=Callable[..., Any])


def _while_compiling(function: Function) -> Function:
    """What torch.compile runs itself, once, instead of compiling it."""
    mark: Any = torch.compiler.assume_constant_result
    marked: Function = mark(function)
    return marked


class Entry:
    """The mask of one parameter of one module; copied or pickled with it, it masks the copy's parameter.

    Args:
        pruned: Where.
        parameter: Its pruned entries are zeroed.

    Attributes:
        pruned: Where.
        parameter: The tensor that was last seen to be the module's parameter.
    """

    def __init__(self, pruned: Pruned, parameter: nn.Parameter) -> None:
        watch_all_optimizers()
        self.pruned = pruned
        self.parameter = parameter
        self._kind = _kind(parameter)
        self._handles = carry(parameter, pruned)
        pruned.zero_(parameter.detach())

    def __reduce__(self) -> tuple[Any, ...]:
        # Built anew: a copied or loaded tensor has no hooks.
        return Entry, (self.pruned, self.parameter)

    def zero(self, parameter: nn.Parameter) -> bool:
        """Zeroes the pruned weights; follows a tensor that took the parameter's place, and says whether one did."""
        is_another = parameter is not self.parameter
        if is_another:
            self._handles += carry(parameter, self.pruned)
            self.parameter = parameter
        if _kind(parameter) != self._kind:
            # A conversion may have swapped what is behind the tensor: autograd is told of its hooks again.
            parameter._backward_hooks = parameter._backward_hooks
            self._kind = _kind(parameter)
        self.pruned.zero_(parameter.data)
        return is_another

    def release(self) -> None:
        """Takes the gradient's mask off."""
        while self._handles:
            self._handles.pop().remove()


class Guard:
    """The hooks of one module that has masked parameters in it or below.

    The outermost guarded module that is called zeroes everything below, whoever reads it (attention
    reads its projection's weight without calling the projection); those inside then need not.
    Nothing refers to a module: hooks are told theirs, so that a copy of a module guards the copy.

    Attributes:
        entries: The masks of the module's own parameters.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._is_inside = False
        self._inside: list[Guard] = []
        self._handles: list[RemovableHandle] = []

    def install(self, module: Any) -> None:
        """Hooks the module."""
        self._handles = [
            module.register_forward_pre_hook(self, prepend=True),
            module.register_forward_hook(self.leave, always_call=True),
            module.register_state_dict_pre_hook(self.save),
        ]

    def uninstall(self) -> None:
        """Takes the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def __call__(self, module: Any, _: Any) -> None:
        """Before the forward pass."""
        if self._is_inside:
            return
        if torch.compiler.is_compiling():
            self.compiled()
            return

        with torch._C._DisableFuncTorch():  # the weights are the user's own, whatever torch.func does
            for below, guard in guards(module):
                is_another = guard.zero(below)
                if is_another:
                    # Perhaps gathered from its shards by a hook (fully_shard's) that ran before: not again.
                    module._forward_pre_hooks.move_to_end(self._handles[0].id, last=False)
                if guard is not self:
                    guard._is_inside = True
                    self._inside.append(guard)

    @_while_compiling
    def compiled(self) -> None:
        """Runs once, when a forward pass is compiled that no guard precedes.

        A graph cannot zero weights unseen by autograd, so that optimizers look whether it had to.
        """
        for entry in self.entries.values():
            mask = carried(entry.parameter)
            if mask is not None:
                mask.is_compiled = True

    def leave(self, *_: Any) -> None:
        """After the forward pass, also one that raised."""
        while self._inside:
            self._inside.pop()._is_inside = False

    def save(self, module: nn.Module, *_: Any) -> None:
        """Before the module's own part of a state dict is taken."""
        self.zero(module)

    def zero(self, module: nn.Module) -> bool:
        """Zeroes the pruned weights of the module's own parameters; says whether another tensor was one's place."""
        followed = False
        if "_is_replica" in vars(module):
            return followed  # of DataParallel: it has no parameters, and reads those of the model that was called
        for leaf, entry in self.entries.items():
            parameter: Tensor | None = module._parameters.get(leaf)
            if parameter is None or parameter.shape != entry.pruned.mask.shape:
                came = "gone" if parameter is None else f"of shape {tuple(parameter.shape)}"
                raise MaskError(
                    f"Parameter {entry.pruned.name!r} of shape {tuple(entry.pruned.mask.shape)} was attached to masks, "
                    f"and is {came} now (a parametrization, torch.nn.utils.prune or a conversion "
                    "took its place?): undo that, or remove() the attachment and attach masks made for the new model."
                )
            if isinstance(parameter, nn.Parameter):  # else lent by functional_call, whose tensors are the caller's
                followed |= entry.zero(parameter)
        return followed


def _kind(parameter: Tensor) -> tuple[torch.device, torch.dtype]:
    return parameter.device, parameter.dtype


def guard_of(module: nn.Module) -> Guard | None:
    """The guard of a module, if it has one."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, Guard):
            return hook
    return None


def guards(module: nn.Module) -> Iterator[tuple[nn.Module, Guard]]:
    """Every guarded module in and below a module, with its guard (a quarter of the time of `modules()`)."""
    seen = set[int]()
    waiting: list[nn.Module | None] = [module]
    while waiting:
        below = waiting.pop()
        if below is None or id(below) in seen:
            continue
        seen.add(id(below))
        waiting += below._modules.values()
        guard = guard_of(below)
        if guard is not None:
            yield below, guard
