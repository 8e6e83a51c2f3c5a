"""The graph that autograd has recorded behind some tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor


def nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of it once, in no particular order."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    known = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        later = {following for following, _ in node.next_functions if following is not None}
        waiting += later - known
        known |= later


def reached(outputs: Iterable[Tensor], leaves: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the leaves that some of the outputs depend on."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    found = {names.get(id(getattr(node, "variable", None))) for node in nodes(outputs)}
    return frozenset(name for name in found if name is not None)
