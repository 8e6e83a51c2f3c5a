"""Differentiates a positive flow, and checks that it is one.

The premise of all scores by paths is that the outputs R are sums of products of non-negative weights along paths. Two
things follow, which are checked on what was computed, not on what is known of the operations:

* R and all of its derivatives are non-negative;
* R(a), on an input of a, is a polynomial in a with non-negative coefficients, and so it grows ever faster (along a
  bias-free chain in proportion): R(2) - R(1) >= R(1) - R(0). What saturates or normalises the flow breaks it, and so
  would a wrong stand-in; for what is linear in a this is Euler's theorem, the conservation law of the layers.

R(0) and R(2) cost two more forward passes, made once for a network.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sapwood.batches import Batch, filled
from sapwood.errors import UnsupportedModelError
from sapwood.flow.positive import PositiveFlow
from sapwood.functional import FunctionalModel, Params

SLACK = 1e-6

_CHECKED: set[int] = set()


def flow_gradient(
    net: FunctionalModel,
    params: Params,
    leaves: Params,
    ones: Batch,
    buffers: Callable[[], Params],
    counted: Callable[[Tensor], Tensor] = torch.sum,
) -> Params:
    """dR/d(leaves) of a network that is run as a positive flow.

    Args:
        net: The network.
        params: Its parameters, non-negative and in float64.
        leaves: Those of them to differentiate with respect to.
        ones: An input of ones, in float64.
        buffers: Makes its buffers.
        counted: R of the outputs; linear and non-negative.

    Raises:
        UnsupportedModelError: the network is no positive flow.
    """

    def at(start: float) -> tuple[Tensor, bool]:
        batch, state, named = filled(ones, lambda t: t * start), buffers(), {**params, **leaves}
        with PositiveFlow(batch, {**named, **state}, start=start) as flow:
            output = flow.arrived(net.outputs(named, batch, buffers=state))
        return counted(output), flow.checkable

    total, checkable = at(1.0)
    gradient = net.differentiate(total, leaves)
    if checkable:
        _check_signs(total, gradient)
        _check_growth(net, total.detach(), at)
    return gradient


def _check_signs(total: Tensor, gradient: Mapping[str, Tensor]) -> None:
    """Infinite ones are left to whoever looks at scores."""
    if bool(total < 0):
        raise UnsupportedModelError(
            "The model's output is negative on a non-negative flow, so that it is no sum over paths, which synflow, "
            "synflow-l2 and px need; ntk-sap, snip and grasp take the model as it is."
        )
    for name, part in gradient.items():
        if bool(part.min() < -SLACK * part.max().abs()):
            raise UnsupportedModelError(
                f"The flow falls where a weight of {name!r} grows (a subtraction, or a function that turns round, "
                "behind it?), so that it is no sum over paths, which synflow, synflow-l2 and px need; ntk-sap, snip "
                "and grasp take the model as it is."
            )


def _check_growth(net: FunctionalModel, one: Tensor, at: Callable[[float], tuple[Tensor, bool]]) -> None:
    if id(net) in _CHECKED:
        return

    with torch.no_grad():
        none, two = at(0.0)[0], at(2.0)[0]
    if bool(two - one < (one - none) * (1 - SLACK)):
        raise UnsupportedModelError(
            f"The flow saturates: from an input of zeros to one of ones the outputs grow by {float(one - none):.3g}, "
            f"from there to one of twos by {float(two - one):.3g}, so that the flow is not conserved on its way, which "
            "synflow, synflow-l2 and px need; ntk-sap, snip and grasp take the model as it is."
        )
    _CHECKED.add(id(net))
    weakref.finalize(net, _CHECKED.discard, id(net))
