"""Every optimizer that steps a masked weight: gradients and state are masked before, weights zeroed after."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sapwood.attach.gradients import GradientMask, carried
from sapwood.attach.pruned import PLAIN, is_sharded
from sapwood.errors import MaskError

Key = tuple[Any, ...]
_clean_states: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""By optimizer, the `state` whose pruned entries were zeroed; loading a state dict makes a new one."""


@functools.cache
def watch_all_optimizers() -> None:
    """Asks torch to call the two functions below around the steps of all optimizers, once a process.

    An optimizer is known by the tensors in it: so one that was copied with its model, or built later, is
    seen as well, and one that has no masked weight is left alone.
    """
    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)


def before_step(optimizer: Any, *_: Any) -> None:
    """Masks gradients that something other than a backward pass wrote, and a state that is new."""
    found = list(masked(optimizer))
    for parameter, mask in found:
        mask.held = True
        if mask.is_compiled and parameter._version != mask.version:
            _check_unwritten(parameter, mask)
        if parameter.grad is not None:
            mask.pruned.zero_(parameter.grad.data)
    if found and _clean_states.get(optimizer) is not getattr(optimizer, "state", None):
        zero_state(optimizer)


def after_step(optimizer: Any, *_: Any) -> None:
    """Zeroes the pruned weights."""
    for parameter, mask in masked(optimizer):
        mask.pruned.zero_(parameter.data)
        mask.version = parameter._version


def masked(optimizer: Any) -> Iterator[tuple[Tensor, GradientMask]]:
    """The masked weights of an optimizer."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mask = carried(parameter)
            if mask is not None:
                yield parameter, mask


def zero_state(optimizer: Any) -> None:
    """Zeroes momentum, moments and slow copies of pruned weights: all that is kept entry by entry."""
    states = getattr(optimizer, "state", None)
    _clean_states[optimizer] = states
    by_entry = _kept_by_entry(states or {})
    for parameter, state in (states or {}).items():
        mask = carried(parameter) if isinstance(parameter, Tensor) else None
        if mask is None:
            continue
        for key, value in _tensors(state):
            if key in by_entry and value.shape == parameter.shape:
                mask.pruned.zero_(value.detach())


def _kept_by_entry(states: Mapping[Any, Any]) -> set[Key]:
    """The entries of an optimizer's state that hold a number for each weight.

    They have the shape of their parameter, whatever it is. A preconditioner has that of a square matrix
    only, so that square ones tell nothing; and codes of quantised states need not mean zero where they are 0.
    """
    told, other = set[Key](), set[Key]()
    for parameter, state in states.items():
        for key, value in _tensors(state):
            plain = type(value) in PLAIN or is_sharded(value)
            numeric = value.is_floating_point() or value.is_complex()
            if not (plain and numeric and value.shape == parameter.shape):
                other.add(key)
            elif value.dim() > 1 and len(set(value.shape)) > 1:
                told.add(key)
    return told - other


def is_optimizer(value: Any) -> bool:
    """Whether something can be stepped and says which tensors it steps."""
    return hasattr(value, "param_groups") and callable(getattr(value, "step", None))


def with_inner(optimizers: Iterable[Any]) -> list[Any]:
    """The optimizers and those inside them (wrappers such as Lookahead, SAM and accelerate's), each once."""
    found: dict[int, Any] = {}
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop()
        if id(optimizer) in found:
            continue
        found[id(optimizer)] = optimizer
        inside = [value for each in getattr(optimizer, "__dict__", {}).values() for value in _members(each)]
        waiting += filter(is_optimizer, inside)
    return list(found.values())


def watch(optimizer: Any) -> None:
    """Sees to it that steps of a wrapper are seen, too: torch calls its hooks for its own `Optimizer.step` only."""
    step = getattr(optimizer.step, "__func__", None)
    if step is None or getattr(step, "hooked", False) or getattr(step, "watched", False):
        return

    @functools.wraps(step)
    def watched(self: Any, *args: Any, **settings: Any) -> Any:
        before_step(self)
        result = step(self, *args, **settings)
        after_step(self)
        return result

    watched.watched = True  # type: ignore[attr-defined]
    optimizer.step = MethodType(watched, optimizer)  # a method, so that a copy steps the copy


def _check_unwritten(parameter: Tensor, mask: GradientMask) -> None:
    if mask.pruned.alive(parameter).numel():
        raise MaskError(
            f"Pruned weights of {mask.pruned.name!r} were written outside of an optimizer's step (a state was loaded?) "
            "and a compiled forward pass may have used them: call the attachment's apply() after such a write, or give "
            "attach the compiled model, which then zeroes them itself."
        )


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else (value,)


def _tensors(state: Any, key: Key = ()) -> Iterator[tuple[Key, Tensor]]:
    """Every tensor in nested containers, and where it is."""
    if isinstance(state, Tensor):
        yield key, state
    elif isinstance(state, Mapping):
        for name, value in state.items():
            yield from _tensors(value, (*key, name))
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from _tensors(value, (*key, index))
