"""One call of an operation on flows, which can be run again on what its flows stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sapwood.errors import UnsupportedModelError
from sapwood.flow.names import is_pointwise
from sapwood.flow.values import Probe, Value, one


class _Probed(NamedTuple):
    probe: Probe


def _is_probed(leaf: Any) -> bool:
    return isinstance(leaf, _Probed)


@dataclass(frozen=True, eq=False)
class Call:
    """A call.

    Attributes:
        function: What is called on flows.
        original: What the network calls.
        name: Its one name.
        args: Positional arguments, with a `Value` for every tensor that is a flow.
        kwargs: Keyword arguments, likewise.
        is_reversed: Whether its two operands come in reverse.
        writes: Whether it writes into its first argument.
        where: Where in the network it is, for messages.
    """

    function: Callable[..., Any]
    original: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_reversed: bool = False
    writes: bool = False
    where: str = "at the input"

    @cached_property
    def values(self) -> list[Value]:
        """All flows among the arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]

    @cached_property
    def constants(self) -> list[Tensor | float]:
        """Numbers and floating-point tensors among the arguments that are no flows."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return tensors + [leaf for leaf in leaves if isinstance(leaf, float | int) and not isinstance(leaf, bool)]

    @property
    def operands(self) -> tuple[Any, Any]:
        """The two operands of a binary operation, in the order of the formula."""
        named = [self.kwargs[key] for key in ("input", "other", "exponent") if key in self.kwargs]
        given = [*self.args, *named][:2]
        if len(given) != 2:
            raise self.refused("is called with other operands than are known of it")
        return (given[1], given[0]) if self.is_reversed else (given[0], given[1])

    def run(self, pick: Callable[[Value], Any], constant: Callable[[Any], Any] | None = None) -> Any:
        """Makes the call on what `pick` gives for flows, and `constant` for all else; never in place."""

        def argument(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return pick(leaf)
            return leaf if constant is None else constant(leaf)

        args, kwargs = pytree.tree_map(argument, (self.args, self.kwargs))
        return applied(self.function, args, kwargs, self.writes)

    @cached_property
    def probe(self) -> Probe:
        """What the result would be, if the flow that it comes from were t everywhere."""
        arguments = pytree.tree_map(lambda a: _Probed(a.probe) if isinstance(a, Value) else a, (self.args, self.kwargs))
        leaves = pytree.tree_leaves(arguments, is_leaf=_is_probed)
        alone = is_pointwise(self.name) and sum(isinstance(leaf, Tensor | _Probed) for leaf in leaves) == 1
        original, writes = self.original, self.writes

        @cache
        def probe(t: float) -> Any:
            shapes = []

            def at(leaf: Any) -> Any:
                if not _is_probed(leaf):
                    return leaf
                tensor = leaf.probe(t)
                shapes.append(tensor.shape)
                return one(tensor) if alone else tensor

            with torch._C.DisableTorchFunction(), torch.no_grad():
                args, kwargs = pytree.tree_map(at, arguments, is_leaf=_is_probed)
                result = applied(original, args, kwargs, writes)
                return result.expand(shapes[0]) if alone else result

        return probe

    def refused(self, reason: str) -> UnsupportedModelError:
        """The error for what cannot be part of a positive flow."""
        return UnsupportedModelError(
            f"{self.name} ({self.where}) {reason}, so that the model is no positive flow, which synflow, synflow-l2, "
            "px and the diagnosis of paths need; ntk-sap, snip and grasp take it as it is."
        )


def applied(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool) -> Any:
    """The result of a call, which for one that writes is what it writes into a copy."""
    if not writes:
        return function(*args, **kwargs)

    first = (args[0] if args else kwargs["input"]).clone()
    result = function(first, *args[1:], **kwargs) if args else function(**{**kwargs, "input": first})
    return first if result is None else result  # `x[i] = y` returns nothing


def is_number(leaf: Any) -> bool:
    """Whether it is a tensor of real or complex numbers."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def unseen(tensor: Tensor, where: str) -> UnsupportedModelError:
    """The error for a tensor that came about where no operations can be seen."""
    name = "" if tensor.grad_fn is None else tensor.grad_fn.name()
    return UnsupportedModelError(
        f"{name} ({where}) is a function of the model's own, a checkpoint or compiled code, into which synflow, "
        "synflow-l2, px and the diagnosis of paths cannot look; write it in torch's functions, turn checkpoints off "
        "(model.set_grad_checkpointing(False) in timm), or use method='ntk-sap' or 'snip', which take it as it is."
    )
