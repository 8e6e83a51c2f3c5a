"""Runs the rules over a trace: from a white Gaussian input to the moments of the network's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sapwood.errors import UnsupportedModelError
from sapwood.moments.registry import RULES, WAY_OUT, Call, name_of
from sapwood.moments.state import Moments, Side, Weight
from sapwood.moments.trace import Operation, Parameter, Trace, Value


def propagate(
    trace: Trace,
    weights: Mapping[str, Weight],
    constants: Mapping[str, Tensor],
    *,
    epsilon: float = 0.0,
    flat: bool = False,
) -> Moments:
    """Moments of the output of a traced network.

    Args:
        trace: See `sapwood.moments.trace.traced`.
        weights: Layer weights under fresh draws, by parameter name; each may serve one layer only.
        constants: All other parameters and the buffers, by name, which keep their values.
        epsilon: Variance of the perturbation of every perturbed weight; 0 is the limit.
        flat: Take all positions as alike, which is exact under circular padding and cheap.

    Raises:
        UnsupportedModelError: an operation has no rule, or its rule does not cover this use of it.
    """
    first = next(iter(weights.values())).v
    values: dict[int, Any] = {0: _white(trace.input_shape, first, epsilon, flat)}
    last, used = _last_uses(trace), _users(trace)
    _refuse_shared(trace, weights)
    for number, operation in enumerate(trace.operations):
        args, kwargs = pytree.tree_map(
            lambda leaf: _resolved(leaf, values, weights, constants), (operation.args, operation.kwargs)
        )
        normed = all(used.get(index) == {F.batch_norm} for index in operation.results)
        result = _apply(operation, args, kwargs, (epsilon, flat, normed))
        leaves = operation.structure.flatten_up_to(result)
        for index, leaf in zip(operation.results, leaves, strict=True):
            values[index] = leaf
        for index in last.get(number, ()):
            values.pop(index, None)
    output = values[trace.output.index]
    if not isinstance(output, Moments) or output.td is None:
        raise UnsupportedModelError(f"The model's output does not depend on its input and weights together; {WAY_OUT}.")
    return output


def _apply(operation: Operation, args: Any, kwargs: Any, setting: tuple[float, bool, bool]) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    if not any(isinstance(leaf, Moments | Weight) for leaf in leaves):
        with torch.no_grad():
            return operation.function(*args, **kwargs)
    name = name_of(operation.function)
    found = RULES.get(operation.function)
    if found is None:
        raise UnsupportedModelError(
            f"The closed form has no moment rule for {name} ({operation.where}): {WAY_OUT}, or register one with "
            "sapwood.moments.rule."
        )
    call = Call(name, operation.where, operation.shapes, *setting)
    try:
        return found(call, *args, **kwargs)
    except (TypeError, AttributeError) as error:
        raise call.refuse(f"the moment rule does not cover this use of it ({error})") from error


def _resolved(leaf: Any, values: dict[int, Any], weights: Mapping[str, Weight], constants: Mapping[str, Tensor]) -> Any:
    if isinstance(leaf, Value):
        return values[leaf.index]
    if isinstance(leaf, Parameter):
        return weights[leaf.name] if leaf.name in weights else constants[leaf.name]
    return leaf


def _white(shape: torch.Size, like: Tensor, epsilon: float, flat: bool) -> Moments:
    """The input: mean 0, variance 1, independent over channels, positions and samples."""
    channels = (min(1, len(shape) - 1),)
    size = [n if axis in channels or not flat else 1 for axis, n in enumerate(shape)]
    ones = torch.ones(size, dtype=like.dtype, device=like.device)
    clean = Side(ones)
    return Moments(shape, channels, clean, Side(ones) if epsilon else clean)


def _last_uses(trace: Trace) -> dict[int, list[int]]:
    """Which results are used for the last time by which operation, so that their memory can go."""
    last: dict[int, int] = {}
    for number, operation in enumerate(trace.operations):
        for leaf in pytree.tree_leaves((operation.args, operation.kwargs)):
            if isinstance(leaf, Value):
                last[leaf.index] = number
    last.pop(trace.output.index, None)
    uses: dict[int, list[int]] = {}
    for index, number in last.items():
        uses.setdefault(number, []).append(index)
    return uses


def _users(trace: Trace) -> dict[int, set[Any]]:
    """The functions that take a result in."""
    users: dict[int, set[Any]] = {}
    for operation in trace.operations:
        for leaf in pytree.tree_leaves((operation.args, operation.kwargs)):
            if isinstance(leaf, Value):
                users.setdefault(leaf.index, set()).add(operation.function)
    return users


def _refuse_shared(trace: Trace, weights: Mapping[str, Weight]) -> None:
    seen: set[str] = set()
    for operation in trace.operations:
        for leaf in pytree.tree_leaves((operation.args, operation.kwargs)):
            if isinstance(leaf, Parameter) and leaf.name in weights:
                if leaf.name in seen:
                    raise UnsupportedModelError(
                        f"{leaf.name!r} serves several layers ({operation.where}), whose values the closed form would "
                        f"wrongly take as independent; {WAY_OUT}."
                    )
                seen.add(leaf.name)
