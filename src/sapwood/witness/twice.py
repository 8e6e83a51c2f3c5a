"""Are a model's second derivatives what autograd says they are?

torch's own functions have them, or say that they have not. A custom function may return a gradient that autograd cannot
follow (numpy, a detach, no_grad in its backward): first derivatives are right then, second ones miss a part, and
nothing raises. So a model that runs custom functions is held against differences of its first derivatives, on one
sample, in float64; on the whole batch where it does not take a single sample, and in its own precision where it does
not run in float64. Where two step sizes do not agree on the difference (kinks in between, exploding activations),
nothing is concluded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from sapwood.batches import Batch, first, inputs_of, target_of
from sapwood.errors import SapwoodError, UnsupportedModelError
from sapwood.functional import FunctionalModel, Params
from sapwood.witness.graph import nodes
from sapwood.witness.rows import takes_rows


class Precision(NamedTuple):
    """How finely derivatives are compared.

    Attributes:
        steps: Relative steps in the weights.
        rounding: Part of the gradient's norm below which a difference is rounding.
    """

    steps: tuple[float, ...]
    rounding: float


FINE = Precision((1e-5, 1e-6, 1e-7), 1e-6)  # float64
COARSE = Precision((1e-2, 3e-3, 1e-3), 1e-3)  # float32

TOLERANCE = 0.1
"""Largest part of a layer's Hessian-vector product that may be missing; a term that is missing is most of it."""


def look_at_second_derivatives(net: FunctionalModel, batch: Batch, temperature: float = 1.0) -> None:
    """Looks once at every model; call it under `isolated`.

    Args:
        net: The model.
        batch: A batch; with targets its loss is differentiated, without them its outputs.
        temperature: What logits are divided by before the loss.

    Raises:
        UnsupportedModelError: second derivatives with respect to a prunable weight are not those of the gradient.
    """
    if net.derivatives.second:
        return
    net.derivatives.second = True
    held = net.held()
    models = ((_in_double(held), FINE), (held, COARSE))
    few = first(batch) if takes_rows(net, inputs_of(batch)) else batch
    for (model, precision), piece in itertools.product(models, (few, batch)):
        value = partial(_value, model, piece, temperature)
        custom = _runs_custom_functions(model, value)
        if custom is None:
            continue

        if custom and (missing := _missing(model, value, precision)):
            raise UnsupportedModelError(
                f"Second derivatives with respect to {missing[0]!r} are not those of the gradient: a custom function "
                "of the model computes its gradient where autograd does not see it (numpy, detach or no_grad in its "
                "backward). Write it in torch operations, or take a method without second derivatives, such as 'snip' "
                "or 'ntk-sap'."
            )
        return


def _value(net: FunctionalModel, batch: Batch, temperature: float, leaves: Params) -> Tensor:
    """What is differentiated: the loss, or without targets a sum of the outputs."""
    if target_of(batch) is not None:
        return net.loss(leaves, batch, train=False, temperature=temperature)
    outputs = net.outputs(leaves, batch)
    probe = torch.arange(outputs.numel(), device=outputs.device, dtype=outputs.dtype).cos()
    return (outputs.flatten() * probe).sum()


def _in_double(net: FunctionalModel) -> FunctionalModel:
    def double(tensors: Params) -> Params:
        return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}

    return replace(net, params=double(net.params), buffers=double(net.buffers))


def _runs_custom_functions(net: FunctionalModel, value: Callable[[Params], Tensor]) -> bool | None:
    """Whether it does; None where it does not run in this precision or on so few samples."""
    try:
        result = value(_moved(net.weights, net.weights, 0.0))
    except SapwoodError:
        return None
    return any(isinstance(node, BackwardCFunction) or "Cpp" in node.name() for node in nodes([result]))


def _missing(net: FunctionalModel, value: Callable[[Params], Tensor], precision: Precision) -> list[str]:
    """Names of the weights for which Hessian times a random vector is not the difference of two gradients."""
    generator = torch.Generator(net.device).manual_seed(0)
    weights = net.weights
    vector = {}
    for name, weight in weights.items():
        size = float(weight.square().mean().sqrt()) or 1.0
        vector[name] = size * torch.randn(weight.shape, generator=generator, device=net.device, dtype=weight.dtype)

    leaves = _moved(weights, vector, 0.0)
    gradient = net.differentiate(value(leaves), leaves, create_graph=True)
    slope = torch.stack([(gradient[name] * vector[name]).sum() for name in leaves]).sum()
    product = net.differentiate_again(slope, leaves)

    differences = []
    for step in precision.steps:
        ahead, behind = (_moved(weights, vector, side * step) for side in (1, -1))
        ahead, behind = (net.differentiate(value(point), point) for point in (ahead, behind))
        differences.append({name: (ahead[name] - behind[name]) / (2 * step) for name in leaves})

    least = precision.rounding * math.sqrt(sum(float(part.detach().square().sum()) for part in gradient.values()))

    def alike(one: Tensor, other: Tensor) -> bool:
        return float((one - other).norm()) <= TOLERANCE * float(one.norm()) + least

    return [
        name
        for name in leaves
        if any(
            alike(one[name], other[name]) and not alike(one[name], product[name])
            for one, other in itertools.pairwise(differences)
        )
    ]


def _moved(weights: Params, vector: Params, step: float) -> Params:
    return {name: (weight + step * vector[name]).requires_grad_() for name, weight in weights.items()}
