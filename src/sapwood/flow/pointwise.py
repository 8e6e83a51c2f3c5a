"""Rules for functions that work entry by entry: they are looked at where the flow is large."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.flow.calls import Call, applied
from sapwood.flow.moves import layer
from sapwood.flow.sums import based, hides, one_sided, pending
from sapwood.flow.values import NEAR, Growth, Uniform, Value, uniform

if TYPE_CHECKING:
    from sapwood.flow.positive import PositiveFlow


def looked_at(mode: PositiveFlow, call: Call) -> Value:
    """A function of one flow: the identity where it follows it, a power where it grows faster, pending else."""
    value = next((v for v in call.values if v.flow.is_floating_point()), call.values[0])
    if any(other.sheet != value.sheet for other in call.values):
        raise call.refused("takes several flows that come through different weights, and is neither sum nor product")

    if value.settled and not value.linear and not value.reduced and len(call.values) == 1:
        value = Value(value.flow, value.sheet, uniform(value.flow), root=value.root)  # a softmax goes on as a flow
        call = replace(call, args=(value, *call.args[1:]))

    growth = _growth(call, value)
    if growth.logical:
        return replace(pending(call, value), flow=mode.computed(call, lambda: call.run(lambda v: v.flow)))
    if value.reduced:
        return _of_statistic(mode, call, value, growth)
    if growth.flowing and growth.positive:
        return _following(mode, call, value, growth)
    if NEAR < growth.order < float("inf") and growth.order > 1:
        base = based(pending(call, value))
        flow = mode.computed(call, lambda: base**growth.order * mode.factor(growth.coefficient.abs()))
        return Value(flow, value.sheet, call.probe, linear=False, base=base)
    return _rectified(mode, pending(call, value), growth)


def _growth(call: Call, value: Value) -> Growth:
    """What a function does where its input is large; of one with numbers alone beside a flow it is looked up."""
    alone = call.args[:1] == (value,) and not any(isinstance(constant, Tensor) for constant in call.constants)
    if not alone or len(call.values) > 1 or not isinstance(value.probe, Uniform):
        return Growth.of(call.probe)

    try:
        known = _of_function(call.original, call.args[1:], tuple(call.kwargs.items()), call.writes)
    except TypeError:  # a list among its arguments
        return Growth.of(call.probe)
    return known.expanded(value.flow.shape, value.flow.device)


@lru_cache(maxsize=512)
def _of_function(function: Any, args: tuple[Any, ...], options: tuple[tuple[str, Any], ...], writes: bool) -> Growth:
    def probe(t: float) -> Tensor:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            entry = torch.tensor(t, dtype=torch.float64)
            return applied(function, (entry, *args), dict(options), writes)  # type: ignore[no-any-return]

    return Growth.of(probe)


def _following(mode: PositiveFlow, call: Call, value: Value, growth: Growth) -> Value:
    base = value.flow if value.linear else based(pending(call, value))
    slope = growth.coefficient

    flow = mode.computed(call, lambda: mode.times(base, slope))
    flow = mode.gated(flow, base, growth.rectifies)
    return Value(flow, value.sheet, one_sided(uniform(flow), growth.negative))


def _of_statistic(mode: PositiveFlow, call: Call, value: Value, growth: Growth) -> Value:
    """Of what was brought together (a norm, a mean of squares): itself where it grows, for a bound the skeleton."""
    if growth.bounded:
        return pending(call, value)
    flow = mode.computed(call, lambda: call.run(lambda v: v.flow))
    return replace(pending(call, value), flow=flow)


def _rectified(mode: PositiveFlow, value: Value, growth: Growth) -> Value:
    """A bounded rectifier, as relu6."""
    if value.base is None:
        return value
    flow = mode.gated(value.flow, value.base, growth.bounded and growth.rectifies)
    return value if flow is value.flow else replace(value, flow=flow, base=flow, root=flow)


def chosen(mode: PositiveFlow, call: Call) -> Value:
    """`where`, `maximum`, `minimum`, `masked_fill`: one of several, entry by entry."""
    values = [v for v in call.values if v.flow.is_floating_point()]
    if not values:
        return looked_at(mode, call)
    if any(hides(constant) for constant in call.constants):
        return pending(call, values[0])

    if any(v.sheet != values[0].sheet for v in call.values):
        flow = mode.computed(call, lambda: call.run(lambda v: mode.settled(v, call), mode.shift))
        return mode.fresh(flow, (call.name, tuple(v.sheet for v in call.values)))

    growth = Growth.of(call.probe)
    if not growth.flowing or values[0].reduced or not growth.positive:
        return looked_at(mode, call)
    flow = mode.computed(call, lambda: call.run(lambda v: v.flow, mode.shift))
    flow = mode.gated(flow, based(values[0]), growth.rectifies)
    return Value(flow, values[0].sheet, one_sided(uniform(flow), call.probe))


def parametric(mode: PositiveFlow, call: Call) -> Value:
    """PReLU: a rectifier, whatever slope it has learned."""
    relu = Call(F.relu, F.relu, "relu", tuple(call.values), {}, where=call.where)
    return looked_at(mode, relu)


def filled(mode: PositiveFlow, call: Call) -> Any:
    """x[mask] = number, the mask being of x's own; else entries that are written into another tensor."""
    target, where, number = call.args
    own = isinstance(where, Value) and where.flow.dtype == torch.bool and isinstance(target, Value)
    if not own or isinstance(number, Value):
        return layer(mode, call)
    chosen_call = Call(torch.where, torch.where, "where", (where, number, target), {}, where=call.where)
    return chosen(mode, chosen_call)


def made(mode: PositiveFlow, call: Call) -> Any:
    """A constant in the shape of a flow."""
    return mode.cast(call.run(lambda value: value.flow))


def identity(mode: PositiveFlow, call: Call) -> Value:
    """Dropout: a flow is not dropped."""
    return call.values[0]


RULES: dict[str, Any] = {
    "prelu": parametric,
    "setitem": filled,
    **dict.fromkeys(
        (
            "zeros_like",
            "ones_like",
            "empty_like",
            "full_like",
            "rand_like",
            "randn_like",
            "new_zeros",
            "new_ones",
            "new_full",
            "new_empty",
            "new_tensor",
        ),
        made,
    ),
    **dict.fromkeys(("where", "maximum", "minimum", "fmax", "fmin", "masked_fill"), chosen),
    **dict.fromkeys(
        ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"),
        identity,
    ),
}
