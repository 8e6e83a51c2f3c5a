"""Rules for sums, differences, products and quotients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sapwood.flow.calls import Call
from sapwood.flow.values import NEAR, Growth, Probe, Value, uniform

if TYPE_CHECKING:
    from sapwood.flow.positive import PositiveFlow

MASKED = -1e4  # what is added below this hides an entry from a softmax


def hides(constant: Tensor | float) -> bool:
    """Whether a constant holds entries so low that they are there to be hidden from a softmax."""
    if isinstance(constant, Tensor):
        return bool(constant.numel()) and float(constant.min()) <= MASKED
    return constant <= MASKED


def pending(call: Call, value: Value, probe: Probe | None = None) -> Value:
    """What is only known where it goes on: its skeleton is the flow that it is computed from."""
    probe = probe or call.probe
    flow = spread(value.flow, probe)
    base = None if value.reduced else spread(based(value), probe)
    root = base if value.root is None or base is None else spread(value.root, probe)
    return Value(flow, value.sheet, probe, linear=False, settled=False, base=base, root=root, reduced=value.reduced)


def based(value: Value) -> Tensor:
    """The flow that a value is computed from, entry by entry."""
    return value.flow if value.settled or value.base is None else value.base


def spread(flow: Tensor, probe: Probe) -> Tensor:
    """The flow in the shape of what its probe shows."""
    return flow.expand(probe(1.0).shape)


def added(mode: PositiveFlow, call: Call) -> Value:
    """A + b."""
    if len(call.values) == 1:
        return _added_constant(mode, call, call.values[0])

    a, b = call.operands
    if a.sheet == b.sheet and not (a.settled and b.settled):
        return pending(call, b if a.reduced else a)

    flow = mode.computed(call, lambda: call.run(lambda v: mode.settled(v, call)))
    if a.sheet != b.sheet:
        return mode.fresh(flow, ("add", frozenset((a.sheet, b.sheet))))
    rectifies = Growth.of(call.probe).rectifies
    if rectifies and mode.paths:
        flow = torch.maximum(a.flow, b.flow)  # x + |x| is one path, as 2 x is
    flow = mode.gated(flow, based(a), rectifies)
    return _same_kind(mode, call, a if b.reduced else b, flow, both=a.linear and b.linear)


def _same_kind(mode: PositiveFlow, call: Call, value: Value, flow: Tensor, *, both: bool = True) -> Value:
    """A flow stays one whatever constants it meets; what is measured against it keeps its own size."""
    linear, probe = value.linear and both, call.probe
    scales = call.name in ("mul", "div")
    tensors = [constant for constant in call.constants if isinstance(constant, Tensor)]
    if linear and not value.reduced and (scales or tensors or len(call.values) > 1):
        signed = any(bool((tensor < 0).any()) for tensor in tensors)
        probe = uniform(flow) if signed else one_sided(uniform(flow), probe)
    by_numbers = len(call.values) == 1 and not tensors
    root = spread(value.flow if value.root is None else value.root, probe) if by_numbers else None
    return replace(value, flow=flow, probe=probe, linear=linear, settled=True, base=None, root=root)


def one_sided(positive: Probe, negative: Probe) -> Probe:
    """One probe where the flow is positive, another where it is not."""

    def probe(t: float) -> Tensor:
        return positive(t) if t > 0 else negative(t)

    return probe


def _added_constant(mode: PositiveFlow, call: Call, value: Value) -> Value:
    if any(hides(constant) for constant in call.constants) or not value.settled:
        return pending(call, value)

    flow = mode.computed(call, lambda: call.run(lambda v: v.flow, mode.shift))
    return _same_kind(mode, call, value, flow)


def subtracted(mode: PositiveFlow, call: Call) -> Value:
    """A - b: what centres is dropped."""
    a, b = call.operands
    if not isinstance(a, Value):
        return pending(call, b)

    if not isinstance(b, Value):
        if not a.settled or any(hides(-constant) for constant in call.constants):
            return pending(call, a)
        return _same_kind(mode, call, a, mode.computed(call, lambda: spread(a.flow, call.probe)))

    if a.sheet == b.sheet and b.reduced and (not a.reduced or _cancel(a, call)):
        return replace(a, flow=mode.computed(call, lambda: spread(a.flow, call.probe)))
    if a.sheet == b.sheet and not (a.settled and b.settled):
        return pending(call, a)
    raise call.refused("subtracts one flow from another")


def _cancel(value: Value, call: Call) -> bool:
    """Whether the difference grows less than what is subtracted from, as mean(x^2) - mean(x)^2 does."""
    return not Growth.of(call.probe).order > Growth.of(value.probe).order - NEAR


def multiplied(mode: PositiveFlow, call: Call) -> Value:
    """A * b."""
    if len(call.values) == 1:
        return _scaled(mode, call, call.values[0])

    a, b = call.operands
    if a.sheet != b.sheet:
        flow = mode.computed(call, lambda: call.run(lambda v: mode.settled(v, call)))
        return mode.fresh(flow, ("mul", frozenset((a.sheet, b.sheet))))

    growths = [Growth.of(a.probe), Growth.of(b.probe)]
    if any(growth.bounded for growth in growths):
        return _gated(mode, call, b if growths[0].order < growths[1].order else a)
    if not (a.settled and b.settled):
        return pending(call, a)

    flow = mode.computed(call, lambda: call.run(lambda v: v.flow))
    reduced = a.reduced and b.reduced
    return Value(flow, a.sheet, call.probe, linear=False, reduced=reduced)


def _scaled(mode: PositiveFlow, call: Call, value: Value) -> Value:
    """A * constant, or a / constant; constants are positive, as weights are."""
    flow = mode.computed(call, lambda: call.run(lambda v: v.flow, mode.factor))
    if all(mode.is_negative(constant) for constant in call.constants):
        return replace(pending(call, value), flow=flow)
    if value.settled:
        return _same_kind(mode, call, value, flow)
    return replace(pending(call, value), flow=flow)


def divided(mode: PositiveFlow, call: Call) -> Value:
    """A / b."""
    a, b = call.operands
    if not isinstance(b, Value):
        return _scaled(mode, call, a)
    if not isinstance(a, Value):
        return pending(call, b)
    if a.sheet != b.sheet:
        raise call.refused("divides by a flow that comes through other weights")
    return _gated(mode, call, a)


def _gated(mode: PositiveFlow, call: Call, value: Value) -> Value:
    """A flow times what does not grow with it, which stands for the constant to which it tends."""
    growth, own = Growth.of(call.probe), Growth.of(value.probe)
    limit = growth.coefficient.abs()
    if growth.order == -math.inf or math.isinf(growth.order) or not bool(limit.isfinite().all()):
        raise call.refused("multiplies a flow by what closes it, or tends to nothing known, as the flow grows")

    if value.settled:
        size = own.coefficient.abs()
        limit = torch.where(size > 0, limit / size, 0.0)
    source = value.flow if value.settled else based(value)
    flow = mode.computed(call, lambda: mode.times(source, limit))
    flow = mode.gated(flow, source, growth.rectifies)
    if value.linear and not value.reduced:
        return Value(flow, value.sheet, uniform(flow))
    return Value(flow, value.sheet, call.probe, linear=False, base=flow, root=source, reduced=value.reduced)


RULES: dict[str, Any] = {
    "add": added, "sub": subtracted, "mul": multiplied, "div": divided,
}  # fmt: skip
