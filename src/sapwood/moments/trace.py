"""The network as a list of operations: what one forward pass calls, on one random sample.

The model is run once in eval mode, as it is (control flow, hooks and a `forward` of the user's own included), and every
call of a torch function that depends on the input or on a parameter is written down. What cannot be written down is
refused: a branch on the values of a tensor, or a tensor that leaves torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sapwood.errors import UnsupportedModelError
from sapwood.functional import FunctionalModel
from sapwood.moments.registry import WAY_OUT, name_of

READS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__array__", "nonzero")
"""Methods through which a tensor's values reach Python; shapes and dtypes may."""


@dataclass(frozen=True)
class Value:
    """Stands for the result number `index` of the trace; 0 is the input."""

    index: int


@dataclass(frozen=True)
class Parameter:
    """Stands for a parameter or a buffer by name."""

    name: str


@dataclass(frozen=True)
class Operation:
    """One call: its function, arguments with `Value` and `Parameter` in place of tensors, and results."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    structure: pytree.TreeSpec
    where: str


@dataclass(frozen=True)
class Trace:
    """Operations in order; the input's shape (batch of one); and which result is the network's output."""

    operations: tuple[Operation, ...]
    input_shape: torch.Size
    output: Value


_TRACES: dict[int, dict[torch.Size, Trace]] = {}


def traced(net: FunctionalModel, shape: tuple[int, ...]) -> Trace:
    """The trace of a network on one sample of `shape`; made once for each network object.

    Raises:
        UnsupportedModelError: the model fails on such an input, or cannot be traced.
    """
    size = torch.Size((1, *shape))
    if id(net) not in _TRACES:
        _TRACES[id(net)] = {}
        weakref.finalize(net, _TRACES.pop, id(net))
    known = _TRACES[id(net)]
    if size not in known:
        known[size] = _trace(net, size)
    return known[size]


def _trace(net: FunctionalModel, size: torch.Size) -> Trace:
    generator = torch.Generator(net.device).manual_seed(0)
    sample = torch.randn(size, generator=generator, device=net.device, dtype=net.dtype)
    buffers = {name: buffer.clone() for name, buffer in net.buffers.items()}
    recorder = _Recorder(sample, {**net.params, **buffers})
    with torch.no_grad(), recorder:
        output = net.outputs({}, sample, buffers=buffers)
    if id(output) not in recorder.values:
        raise UnsupportedModelError(
            f"The output of the model does not come from its input through torch functions, so there is no graph to "
            f"propagate moments through; {WAY_OUT}."
        )
    return Trace(tuple(recorder.operations), size, Value(recorder.values[id(output)]))


class _Recorder(TorchFunctionMode):
    """Writes down every call that involves a tensor of the network."""

    def __init__(self, sample: Tensor, named: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.values: dict[int, int] = {id(sample): 0}
        self.names = {id(tensor): name for name, tensor in named.items()}
        self.alive: list[Any] = [sample, *named.values()]  # as long as they live, their ids are theirs
        self.stale: dict[int, str] = {}
        self.count = 0
        self.where = "at the input"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [leaf for leaf in leaves if id(leaf) in self.values or id(leaf) in self.names]
        if not known:
            return func(*args, **kwargs)
        self._check(func, known)
        frozen = pytree.tree_map(self._stand_in, (args, kwargs))
        versions = [leaf._version for leaf in known]
        result = func(*args, **kwargs)
        changed = [leaf for leaf, version in zip(known, versions, strict=True) if leaf._version != version]
        self._record(func, frozen, result, known)
        self._invalidate(changed, result, func)
        return result

    def _stand_in(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and id(leaf) in self.values:
            return Value(self.values[id(leaf)])
        if isinstance(leaf, Tensor) and id(leaf) in self.names:
            return Parameter(self.names[id(leaf)])
        return leaf

    def _check(self, func: Any, known: list[Tensor]) -> None:
        dependent = any(id(leaf) in self.values for leaf in known)
        if dependent and getattr(func, "__name__", "") in READS:
            raise UnsupportedModelError(
                f"The model cannot be traced: its forward takes the values of a tensor into Python "
                f"({name_of(func)}, {self.where}), so that its graph depends on the input; {WAY_OUT}."
            )
        for leaf in known:
            if id(leaf) in self.stale:
                raise UnsupportedModelError(
                    f"The model cannot be traced: {self.stale[id(leaf)]} changed in place a tensor of which another "
                    f"view is used later ({self.where}); {WAY_OUT}."
                )

    def _record(self, func: Any, arguments: Any, result: Any, known: list[Tensor]) -> None:
        leaves, structure = pytree.tree_flatten(result)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves if leaf is not None):
            return  # a shape, a dtype, a flag
        for leaf in known:
            if self.names.get(id(leaf), "").endswith("weight"):
                self.where = f"at {self.names[id(leaf)]!r}"
        numbers = []
        for leaf in leaves:
            self.count += 1
            numbers.append(self.count)
            if leaf is not None:
                self.values[id(leaf)] = self.count
                self.alive.append(leaf)
        shapes = tuple(torch.Size(()) if leaf is None else leaf.shape for leaf in leaves)
        self.operations.append(
            Operation(func, arguments[0], arguments[1], tuple(numbers), shapes, structure, self.where)
        )

    def _invalidate(self, changed: list[Tensor], result: Any, func: Any) -> None:
        """After an operation in place, other tensors on the same memory no longer hold what the trace says."""
        fresh = {id(leaf) for leaf in pytree.tree_leaves(result)}
        for tensor in changed:
            memory = tensor.untyped_storage().data_ptr()
            for other in self.alive:
                if id(other) not in fresh and other.untyped_storage().data_ptr() == memory:
                    self.stale[id(other)] = name_of(func)
