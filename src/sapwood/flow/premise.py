"""Differentiates a positive flow, and checks that it is one.

The premise of all scores by paths is that the outputs R are sums of products of non-negative weights along paths. Two
things follow, which are checked on what was computed, not on what is known of the operations:

* R and all of its derivatives are non-negative;
* along a R(a), R on an input of a, grows at least as much as linearly: a dR/da >= R(a) - R(0), with equality for paths
  that meet the input once (Euler). What saturates or normalises the flow breaks it, and so would a wrong stand-in.

R(0), what comes from constants alone, costs one more forward pass, made once for a network.
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
START = "the input"  # no parameter's name has a blank in it

_CHECKED: set[int] = set()


def flow_gradient(
    net: FunctionalModel,
    params: Params,
    leaves: Params,
    ones: Batch,
    buffers: Callable[[], Params],
    counted: Callable[[Tensor], Tensor] = torch.Tensor.sum,
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
    start = torch.ones((), dtype=torch.float64, device=net.device, requires_grad=True)
    total, checkable = _total(net, {**params, **leaves}, ones, buffers, counted, start)
    gradient = net.differentiate(total, {**leaves, START: start})
    slope = gradient.pop(START)
    if checkable:
        _check_signs(total, gradient)
        _check_growth(
            net, total, slope, lambda: _total(net, {**params, **leaves}, ones, buffers, counted, 0 * start)[0]
        )
    return gradient


def _total(
    net: FunctionalModel,
    params: Params,
    ones: Batch,
    buffers: Callable[[], Params],
    counted: Callable[[Tensor], Tensor],
    start: Tensor,
) -> tuple[Tensor, bool]:
    batch, state = filled(ones, lambda t: t * start), buffers()
    with PositiveFlow(batch, {**params, **state}, start=start) as flow:
        output = net.outputs(params, batch, buffers=state)
        output = flow.arrived(output)
    return counted(output), flow.checkable


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


def _check_growth(net: FunctionalModel, total: Tensor, slope: Tensor, at_zero: Callable[[], Tensor]) -> None:
    if id(net) in _CHECKED:
        return
    with torch.no_grad():
        constant = at_zero()
    if bool(slope < (total - constant) * (1 - SLACK)):
        raise UnsupportedModelError(
            f"The flow saturates: on an input of ones its slope is {float(slope):.3g} where it has grown by "
            f"{float(total - constant):.3g}, so that it is not conserved on its way, which synflow, synflow-l2 and px "
            "need; ntk-sap, snip and grasp take the model as it is."
        )
    _CHECKED.add(id(net))
    weakref.finalize(net, _CHECKED.discard, id(net))
