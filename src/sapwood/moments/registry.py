"""The rules, by operation.

A rule is a function `(call, *args, **kwargs)` with the operation's own signature after `call`, in which the tensors
that depend on the input have become `Moments`, layer weights `Weight`, and all else is what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.overrides import resolve_name

from sapwood.errors import UnsupportedModelError

Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
RULES: dict[Any, Rule] = {}
WAY_OUT = 'use method="ntk-sap" (Monte Carlo), which runs any model'


@dataclass(frozen=True)
class Call:
    """One operation of the network, as a rule sees it.

    Attributes:
        name: The operation's name, for messages.
        where: Where it stands in the network, for messages.
        shapes: Shapes of the tensors that it returns in the network, in order.
        epsilon: Variance of the perturbation; 0 is the limit.
        flat: Whether positions are taken as alike (their axes have size one).
        normed: Whether only BatchNorms use the result, which do not look at the perturbed network's pair moment.
    """

    name: str
    where: str
    shapes: tuple[torch.Size, ...]
    epsilon: float
    flat: bool
    normed: bool = False

    @property
    def shape(self) -> torch.Size:
        """Shape of the (first) tensor that the operation returns in the network."""
        return self.shapes[0]

    def refuse(self, reason: str) -> UnsupportedModelError:
        """The error for an operation, or a use of it, that no rule covers."""
        return UnsupportedModelError(f"{self.name} ({self.where}): {reason}; {WAY_OUT}.")


def rule(*operations: Any) -> Callable[[R], R]:
    """Registers a moment rule for operations: functions of torch (`F.conv2d`) or methods (`torch.Tensor.view`).

    A later rule for the same operation replaces the earlier one.

    Example:
        A pointwise function by quadrature:

        >>> import torch
        >>> from sapwood.moments import rule
        >>> from sapwood.moments.gates import passed
        >>> from sapwood.moments.smooth import Smooth
        >>> @rule(torch.nn.functional.hardswish)
        ... def hardswish(call, x, inplace=False):
        ...     return passed(call, x, Smooth(torch.nn.functional.hardswish))
    """

    def register(function: R) -> R:
        for operation in operations:
            RULES[operation] = function
        return function

    return register


def name_of(operation: Any) -> str:
    """What users call an operation: "torch.nn.functional.conv2d"."""
    return str(resolve_name(operation) or getattr(operation, "__qualname__", repr(operation)))
