"""Runs a network as a positive flow: what rises goes on, what scales is a constant, what turns round is refused.

**What the flow of a network is.** SynFlow and its kin sum over paths: the network is run on ones with all weights made
non-negative, and what arrives is a sum of products along paths, to which every weight on a path gives its part. That
holds for linear layers and for rectifiers, which are the identity on non-negative values. Everything else has to be
given a meaning in these terms, and the meaning must not depend on how it is written down. Five rules do it:

1. *Linear operations*, and those that choose (max-pools, `where`, `maximum`), are what they are. Constants take their
   absolute values there, as weights do; a subtracted constant or mean is dropped, since a flow is not centred.
2. *Functions of one value* are looked at where it is large (`values.Growth`). Those that grow like it (GELU, SiLU, ELU,
   softplus, leaky rectifiers) are the flow times their slope there; those that rise to a bound are the flow times
   their slope at zero (tanh, relu6), or times the bound where they begin open (sigmoid, hardsigmoid); powers are
   powers; what falls, or goes up and down (cos), is refused.
3. *A factor that comes from the same flow and does not grow with it* (1/std, rsqrt(mean x^2), 1/norm, sigmoid(x) in
   x sigmoid(x), 1/sum exp) has no path of its own: it is the constant to which it tends. So a norm passes its affine
   part, a self-gated unit is the identity, and a softmax divides by the number of its keys, however it is written.
4. *Products of flows that come through different weights* (attention, gated linear units, squeeze-and-excitation) are
   products: a path runs through all of the factors.
5. *A difference of two flows*, a quotient of two that come through different weights, and operations of which nothing
   is known and which are not positively homogeneous when tried, are refused by name.

It works on functions, not modules, so that a `F.gelu` inside a forward is seen as well. Fused recurrent cells are left
as they are: their gates saturate, and the premise is not checked on them. Everything is in float64, also what a forward
asks for in float32.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sapwood.flow import moves, pointwise, sums
from sapwood.flow.calls import Call, is_number, unseen
from sapwood.flow.constants import Constants
from sapwood.flow.layers import BY_NAME, WRITTEN_OUT
from sapwood.flow.names import is_pointwise, name_of
from sapwood.flow.values import NEAR, SMALL, Growth, Value, one, uniform

RULES: dict[str, Any] = {**sums.RULES, **pointwise.RULES, **moves.RULES}
READS = frozenset(("item", "tolist", "numpy", "__float__", "__int__", "__index__", "__array__"))
OWN = torch.empty(0)  # stands for the tensor itself, which would else be kept alive by what is known of it
Entry = tuple[weakref.ref[Tensor], int, Value | None]


class PositiveFlow(Constants, TorchFunctionMode):
    """A context in which a network runs as a positive flow.

    Args:
        inputs: The batch that the network is run on; its floating-point tensors are where flows begin.
        named: Parameters and buffers by name, as the network has them in this context.
        pools: What is called in place of some functions (see `pooling`).
        paths: Constants count paths: they are one wherever they are not zero, and add none.
        level: Divides what leaves a layer by its largest entry, so that depth neither overflows nor vanishes.
        start: What the rows of embeddings, where flows begin as well, are multiplied by.

    Attributes:
        checkable: False once an operation has run that is no positive flow and known not to be one.
    """

    tries: ClassVar[bool] = True

    def __init__(
        self,
        inputs: Any,
        named: Mapping[str, Tensor] | None = None,
        *,
        pools: Mapping[Any, Callable[..., Any]] | None = None,
        paths: bool = False,
        level: bool = False,
        start: float = 1.0,
    ) -> None:
        TorchFunctionMode.__init__(self)
        Constants.__init__(self, named or {}, paths)
        self.pools = pools or {}
        self.levelled = level
        self.start = start
        self.checkable = True
        self.inside = 0  # layers of torch's that are being written out
        self.where = "at the input"
        self.table: dict[int, Entry] = {}
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.begin(leaf)

    def begin(self, tensor: Tensor) -> None:
        """A flow begins here."""
        self.note(tensor, self.fresh(tensor, object()))

    def fresh(self, flow: Tensor, sheet: Hashable) -> Value:
        """A flow of its own."""
        return Value(flow, sheet, uniform(flow))

    def note(self, tensor: Tensor, value: Value | None) -> None:
        """Keeps what is known of a tensor, for as long as it lives and is not written to."""
        if value is not None and value.flow is tensor:
            value = replace(value, flow=OWN)
        self.table[id(tensor)] = (weakref.ref(tensor), tensor._version, value)

    def known(self, tensor: Tensor) -> Value | None:
        """The value of a tensor; None for a constant."""
        entry = self.table.get(id(tensor))
        seen = entry is not None and entry[0]() is tensor
        made = tensor.grad_fn is not None and not tensor._is_view()
        if (made and not seen) or isinstance(tensor.grad_fn, BackwardCFunction):
            raise unseen(tensor, self.where)
        if entry is None or not seen:
            return None
        _, version, value = entry
        if value is not None and tensor._version != version:
            value = self.fresh(tensor, object())
            self.note(tensor, value)
        return value if value is None or value.flow is not OWN else replace(value, flow=tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the rule of an operation on flows; makes all other calls, in float64."""
        kwargs = kwargs or {}
        leaves, shape = pytree.tree_flatten((args, kwargs))
        values = [self.known(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        self._pass_by(leaves)
        if not any(values):
            return self._constant(func, leaves, shape)

        name = name_of(func)
        if name.text in READS and any(v and v.flow.is_floating_point() for v in values):
            raise self._call(func, leaves, values, shape).refused("takes a flow's values into Python")
        norm = F.instance_norm if self.paths and func is F.batch_norm else func  # a path does not see an epsilon
        written_out = WRITTEN_OUT.get(norm, BY_NAME.get(name.text))
        if written_out is not None:
            return self.write_out(written_out, func, args, kwargs)

        rule = RULES.get(name.text) or (pointwise.looked_at if is_pointwise(name.text) else None)
        call = self._call(func, leaves, values, shape)
        if rule is None and not call.writes:
            told = call.run(lambda value: value.flow)
            if not any(map(is_number, pytree.tree_leaves(told))):
                return told  # a shape, a dtype, a truth value
        return self._finished(call, (rule or moves.tried)(self, call), leaves)

    def _pass_by(self, leaves: list[Any]) -> None:
        """Notes which named weight was used last, for messages."""
        for leaf in leaves:
            name = self.named.get(id(leaf), "")
            if name.endswith("weight"):
                self.where = f"at {name!r}"

    def _constant(self, func: Any, leaves: list[Any], shape: Any) -> Any:
        known = [self.cast(leaf) if isinstance(leaf, torch.dtype) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(known, shape)
        result = func(*args, **kwargs)
        if name_of(func).text == "embedding" and isinstance(result, Tensor):
            root = self.rooted(result)
            self.begin(root)
            return root

        def seen(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = self.cast(leaf)
            if leaf.grad_fn is not None:
                self.note(leaf, None)
            return leaf

        return pytree.tree_map(seen, result)

    def _call(self, func: Any, leaves: list[Any], values: list[Value | None], shape: Any) -> Call:
        known = [self.cast(leaf) if value is None else value for leaf, value in zip(leaves, values, strict=True)]
        args, kwargs = pytree.tree_unflatten(known, shape)
        name = name_of(func)
        writes = name.writes or bool(kwargs.get("inplace"))
        return Call(self.pools.get(func, func), func, name.text, args, kwargs, name.is_reversed, writes, self.where)

    def _finished(self, call: Call, result: Any, leaves: list[Any]) -> Any:
        """Tensors for the network to go on with, which stand for the values of a result."""
        if call.writes:
            first = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
            self._overwrite(call, first, pytree.tree_leaves(result)[0])
            return first

        given = {id(v.flow) for v in call.values}
        outputs = pytree.tree_map(lambda leaf: self._shown(leaf, given), result)
        return iter(outputs) if call.name == "iter" else outputs

    def _shown(self, leaf: Any, given: set[int]) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        flow = self.cast(leaf.flow)
        tensor = flow.view_as(flow) if id(flow) in given or self._is_noted(flow) else flow
        self.note(tensor, replace(leaf, flow=tensor if leaf.settled and tensor is flow else flow))
        return tensor

    def _is_noted(self, tensor: Tensor) -> bool:
        entry = self.table.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def _overwrite(self, call: Call, tensor: Tensor, value: Value) -> None:
        """What an operation in place leaves in a tensor, and in what it is a part of."""
        own = self.known(tensor)
        if value.flow is tensor:
            self.note(tensor, value)
        elif value.settled and value.flow.shape == tensor.shape and (own is None or own.flow is tensor):
            tensor.copy_(value.flow)
            self.note(tensor, replace(value, flow=tensor))
            if tensor._base is not None:
                self.note(tensor._base, self.fresh(tensor._base, object()))
        elif tensor._is_view() and own is not None and own.flow is tensor:
            raise call.refused("changes a part of a flow in place; write it out of place")
        else:
            self.note(tensor, value)

    def write_out(self, written_out: Callable[..., Any], func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a layer of torch's as the operations that it consists of."""
        self.inside += 1
        try:
            with self:
                return written_out(*args, **kwargs)
        finally:
            self.inside -= 1

    def arrived(self, output: Tensor) -> Tensor:
        """The flow that a network's output stands for."""
        value = self.known(output)
        if value is None:
            return output
        return self.settled(value, Call(torch.sum, torch.sum, "the output", (value,), {}, where=self.where))

    # What rules ask for.

    def computed(self, call: Call, flow: Callable[[], Any]) -> Any:
        """The flow that a rule gives for a call."""
        return flow()

    def rooted(self, tensor: Tensor) -> Tensor:
        """The flow that begins with the rows of an embedding."""
        rows = self.cast(tensor)
        started: Tensor = rows if self.start == 1 else rows * self.start
        return started

    def gated(self, flow: Tensor, source: Tensor, rectifies: bool) -> Tensor:
        """The flow behind a function of `source`, which is shut where that is negative, if it `rectifies`."""
        return flow

    def cast(self, leaf: Any) -> Any:
        """Floating-point tensors, and precisions that are asked for, in float64."""
        if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
            return torch.float64
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
            return leaf.double()
        return leaf

    def kept_precise(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that changes the precision of its first argument, without doing so."""
        return moves.precise(function)

    def level(self, result: Any) -> Any:
        """What leaves a layer."""
        if not self.levelled or not isinstance(result, Tensor):
            return result
        peak = result.detach().max()
        levelled: Tensor = result / torch.where(peak > 0, peak, 1)
        return levelled

    def settled(self, value: Value, call: Call) -> Tensor:
        """What a value stands for where it goes on."""
        if value.settled:
            return value.flow
        growth = Growth.of(value.probe)
        if growth.flowing and torch.allclose(growth.high, -growth.low):
            return value.flow  # a constant times a flow, which counts by its size
        grows = growth.order > NEAR and growth.positive
        if grows and growth.order > 0.5:
            return value.flow
        if grows:  # a logarithm
            return value.flow if value.root is None else value.root
        if growth.bounded and growth.rises:
            return self._bounded(value, growth)
        raise call.refused("takes a flow that falls, vanishes or turns round as it grows")

    def _bounded(self, value: Value, growth: Growth) -> Tensor:
        """What rises to a bound: the flow times its slope at zero, or, where it begins open, times the bound."""
        if value.base is None or value.root is None:
            return value.flow
        if not bool(value.probe(0.0).any()):
            once, twice = value.probe(SMALL) / SMALL, value.probe(2 * SMALL) / (2 * SMALL)
            return self.times(value.base, 2 * once - twice)  # without what bends
        return self.times(value.root, torch.where(growth.high == 0, 1.0, growth.high.abs()))

    def times(self, flow: Tensor, factor: Tensor) -> Tensor:
        """A flow times constants, which mostly are ones."""
        return flow.expand(factor.shape) if bool((one(factor) == 1).all()) else flow * self.factor(factor)
