"""Rectifiers' gates: recorded on one forward pass, imposed on another.

A rectifier is open where its input is positive. `Record` runs the network as it is and notes this for every function
that is small on the negative side, by looking at it; `Replay` runs the same network as a positive flow in which each of
them multiplies by what was noted. Nothing of torch is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sapwood.errors import UnsupportedModelError
from sapwood.flow.calls import Call
from sapwood.flow.positive import PositiveFlow
from sapwood.flow.values import Value

MISSING = torch.empty(0)


class Record(PositiveFlow):
    """A context in which a network runs as it is, and the gates of its rectifiers are noted.

    Attributes:
        gates: One a function of a flow, of its shape: True where its input is positive; None for what never shuts.
    """

    tries: ClassVar[bool] = False

    def __init__(self, inputs: Any, named: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(inputs, named)
        self.gates: list[Tensor | None] = []

    def gated(self, flow: Tensor, source: Tensor, rectifies: bool) -> Tensor:
        """Notes where a rectifier is open."""
        if not self.inside:
            self.gates.append(source.detach() > 0 if rectifies else None)
        return flow

    def computed(self, call: Call, flow: Callable[[], Any]) -> Any:
        """What the network itself computes."""
        return call.run(lambda value: value.flow)

    def cast(self, leaf: Any) -> Any:
        """Tensors as they are."""
        return leaf

    def kept_precise(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What the network itself computes."""
        return function

    def write_out(self, written_out: Callable[..., Any], func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a layer of torch's as it is; what is known of its result comes from the operations written out."""
        like = pytree.tree_leaves(super().write_out(written_out, func, args, kwargs))
        leaves, shape = pytree.tree_flatten(func(*args, **kwargs))
        for shown, leaf in zip(like, leaves, strict=True):
            value = self.known(shown) if isinstance(shown, Tensor) else None
            if value is not None:
                self.note(leaf, replace(value, flow=leaf))
        return pytree.tree_unflatten(leaves, shape)

    def _finished(self, call: Call, result: Any, leaves: list[Any]) -> Any:
        real = pytree.tree_leaves(call.run(lambda value: value.flow))
        values, shape = pytree.tree_flatten(result)
        pairs = zip(values, real, strict=True)
        exact = [replace(v, flow=flow) if isinstance(v, Value) else flow for v, flow in pairs]
        return super()._finished(call, pytree.tree_unflatten(exact, shape), leaves)


class Replay(PositiveFlow):
    """A context of positive flow in which rectifiers have the gates of an earlier pass.

    Args:
        gates: The gates, in the order of the calls.
        inputs: As for `PositiveFlow`.
        named: As for `PositiveFlow`.
    """

    def __init__(self, gates: Sequence[Tensor | None], inputs: Any, named: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(inputs, named)
        self.gates = iter(gates)

    def gated(self, flow: Tensor, source: Tensor, rectifies: bool) -> Tensor:
        """Multiplies by the next gate.

        Raises:
            UnsupportedModelError: the pass does not call the same functions on the same shapes as the recorded one.
        """
        if self.inside:
            return flow
        gate = next(self.gates, MISSING)
        if gate is None:
            return flow
        if gate.shape != source.shape or gate is MISSING:
            raise UnsupportedModelError(
                "The model does not call the same activation functions whatever its weights are (does its forward "
                "depend on values?), so that paths cannot be followed through it; synflow-l2 needs no activations."
            )
        return flow * gate
