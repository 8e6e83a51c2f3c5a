"""Structures of tensors: what a batch's inputs and targets may be, and what can be done to all of their tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Argument:
    """A model's one positional argument that is neither a tensor nor a mapping: a tuple, a list, an object."""

    value: Any


def is_sequence(value: Any) -> bool:
    """Whether a value is a tuple or list of parts; one that moves between devices by itself is a thing of its own."""
    return isinstance(value, tuple | list) and not callable(getattr(value, "to", None))


def each(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same structure with a function of every leaf; mappings become dictionaries."""
    if isinstance(tree, Argument):
        return Argument(each(function, tree.value))
    if isinstance(tree, Mapping):
        return {key: each(function, value) for key, value in tree.items()}
    if not is_sequence(tree):
        return function(tree)
    return rebuilt(tree, [each(function, part) for part in tree])


def rebuilt(sequence: Any, parts: list[Any]) -> Any:
    """A tuple, named tuple or list like another one, of other parts."""
    if hasattr(sequence, "_fields"):
        return type(sequence)(*parts)
    return parts if isinstance(sequence, list) else tuple(parts)


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same structure with a function of every tensor; all else stays as it is."""
    return each(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def parts_of(tree: Any) -> list[Any] | None:
    """The parts that a structure has directly, in order; None for a leaf."""
    if isinstance(tree, Argument):
        return [tree.value]
    if isinstance(tree, Mapping):
        return list(tree.values())
    return list(tree) if is_sequence(tree) else None


def leaves(tree: Any) -> list[Any]:
    """Everything in a structure that has no parts, in order."""
    parts = parts_of(tree)
    if parts is None:
        return [tree]
    return [leaf for part in parts for leaf in leaves(part)]


def has_list(tree: Any) -> bool:
    """Whether a structure is, or holds, a list."""
    return isinstance(tree, list) or any(has_list(part) for part in parts_of(tree) or ())


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in a structure, in order."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def is_opaque(leaf: Any) -> bool:
    """Whether nothing is known about a leaf: it is no tensor, and no plain value that samples could share."""
    return not isinstance(leaf, Tensor | str | int | float | complex | None)


def moved(tree: Any, device: torch.device) -> Any:
    """The structure on a device; what moves by itself (a packed sequence, a graph) does so as a copy."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            there = leaf.detach().to(device)
            return there.clone() if there.is_inference() else there  # which autograd would refuse to record
        return copy.copy(leaf).to(device) if callable(getattr(leaf, "to", None)) else leaf

    return each(move, tree)


def joined(trees: Sequence[Any]) -> Any:
    """Structures alike, one after the other along the first dimension; what has no dimension is the first one's."""
    first = trees[0]
    if isinstance(first, Tensor):
        return torch.cat(list(trees)) if first.dim() else first
    if isinstance(first, Mapping):
        return {key: joined([tree[key] for tree in trees]) for key in first}
    if isinstance(first, Argument):
        return Argument(joined([tree.value for tree in trees]))
    if is_sequence(first):
        return tuple(joined(parts) for parts in zip(*trees, strict=True))
    return first


def described(value: Any) -> str:
    """Shapes and dtypes of a structure's tensors, for messages."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Argument):
        return described(value.value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(part)}" for key, part in value.items()) + "}"
    if is_sequence(value):
        return f"{type(value).__name__} of ({', '.join(map(described, value))})"
    return type(value).__name__
