"""Derivatives of a model, and what they are found to depend on: a derivative of zero is no missing one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sapwood.errors import SapwoodError, UnsupportedModelError
from sapwood.functional.kinds import Params


@dataclass
class Derivatives:
    """What is known of a model's derivatives; filled while it is scored.

    Attributes:
        asked: Names of the parameters that something was differentiated in.
        found: Names of those that any of it depended on. A derivative that is zero still depends.
        second: Whether second derivatives were seen to be right.
    """

    asked: set[str] = field(default_factory=set)
    found: set[str] = field(default_factory=set)
    second: bool = False

    def first(self, value: Tensor, leaves: Params, *, create_graph: bool = False) -> Params:
        """Gradients of a scalar by name; zero where it does not depend on a leaf, which is noted.

        Raises:
            UnsupportedModelError: it depends on none of them, or cannot be differentiated.
        """
        _refuse_constant(value)
        with differentiating():
            gradients = torch.autograd.grad(value, list(leaves.values()), create_graph=create_graph, allow_unused=True)
        return self._noted(leaves, gradients)

    def again(self, value: Tensor, leaves: Params) -> Params:
        """The same for a value that is itself made of derivatives; zero where they are constants.

        By `backward()`, which runs everything that the value was made of. `autograd.grad` runs what lies between the
        value and the leaves, and so never meets torch's own error for a function that cannot be differentiated twice.

        Raises:
            UnsupportedModelError: it cannot be differentiated.
        """
        if not value.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.grad = None
        with differentiating():
            value.backward(retain_graph=True)
        gradients = [leaf.grad for leaf in leaves.values()]
        for leaf in leaves.values():
            leaf.grad = None
        return self._noted(leaves, gradients)

    def _noted(self, leaves: Params, gradients: Iterable[Tensor | None]) -> Params:
        found = dict(zip(leaves, gradients, strict=True))
        self.asked.update(leaves)
        self.found.update(name for name, gradient in found.items() if gradient is not None)
        zeros = {name: torch.zeros_like(leaves[name]) for name, gradient in found.items() if gradient is None}
        return {name: zeros[name] if gradient is None else gradient for name, gradient in found.items()}

    def missing(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the names that something was differentiated in and nothing depended on."""
        missing = self.asked - self.found
        return tuple(name for name in names if name in missing)


def _refuse_constant(value: Tensor) -> None:
    if not value.requires_grad:
        raise UnsupportedModelError(
            "The model's output does not depend on any prunable weight through autograd (a detach, no_grad or integer "
            "cast in its forward?)."
        )


@contextmanager
def differentiating() -> Iterator[None]:
    """Says what autograd's error means for whoever prunes.

    Raises:
        UnsupportedModelError: autograd failed inside.
    """
    try:
        yield
    except (SapwoodError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"The model cannot be differentiated as this method needs it: {error}. Where its forward is run again in "
            "the backward pass (activation checkpointing), turn that off for scoring: "
            "model.set_grad_checkpointing(False), model.gradient_checkpointing_disable() or your own switch. A "
            "custom function without a (second) derivative needs one, or a method that takes none ('snip', 'ntk-sap')."
        ) from error
