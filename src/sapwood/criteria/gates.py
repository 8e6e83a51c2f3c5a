"""Rectifiers' gates: recorded on one forward pass, imposed on another.

A rectifier is open where its input is positive. `Record` notes this for every call, in order; `Replay` runs another
pass of the same model in which each of these calls multiplies its input by what was noted for it. Both work on
functions, not modules, and within their context only: nothing of torch is patched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sapwood.criteria.linear_flow import LinearFlow
from sapwood.errors import UnsupportedModelError

RECTIFIERS = frozenset((
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.leaky_relu, torch._C._nn.leaky_relu_,
    F.rrelu, torch.rrelu, F.prelu, torch.prelu, F.elu, F.celu, torch.celu, F.selu, torch.selu, F.gelu, F.silu,
    F.mish, F.hardswish, F.softplus,
))  # fmt: skip
"""Functions whose output follows their input where it is positive, and is about zero, or small, where it is not."""


class Record(TorchFunctionMode):
    """A context in which the gates of all rectifiers are noted.

    Attributes:
        gates: One bool tensor a call, of the input's shape; True where the input is positive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gates: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes the gate and makes the call."""
        if func in RECTIFIERS:
            self.gates.append(_input(args, kwargs).detach() > 0)  # now: the call may be in place
        return func(*args, **(kwargs or {}))


class Replay(LinearFlow):
    """A context of positive linear flow (see `LinearFlow`) in which rectifiers have the gates of an earlier pass.

    Args:
        gates: The gates, in the order of the calls.
    """

    def __init__(self, gates: Sequence[Tensor]) -> None:
        super().__init__()
        self.gates = iter(gates)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Multiplies by the next gate, or calls the stand-in.

        Raises:
            UnsupportedModelError: the pass does not call the same rectifiers on the same shapes as the recorded one.
        """
        if func not in RECTIFIERS:
            return super().__torch_function__(func, types, args, kwargs)
        value = _input(args, kwargs)
        gate = next(self.gates, None)
        if gate is None or gate.shape != value.shape:
            raise UnsupportedModelError(
                "The model does not call the same activation functions whatever its weights are (does its forward "
                "depend on values?), so that paths cannot be followed through it; synflow-l2 needs no activations."
            )
        return value * gate


def _input(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["input"]  # type: ignore[no-any-return]
