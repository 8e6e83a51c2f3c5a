"""ProsPr: score weights by how the loss after the first training steps depends on them (Alizadeh et al. 2022).

Formula: w_0 = m * w, w_{i+1} = w_i - lr v_i with v_i = momentum v_{i-1} + dL(w_i, D_i)/dw_i for i < steps, every
parameter being trained; S(m) = |dL(w_steps, D_steps) / dm|, the meta-gradient through all steps. It needs second
derivatives and the memory of steps + 1 graphs; `first_order` takes the steps for constants, so that
S = |w dL/dw_steps|, with the memory of one.

Defaults: one round, three steps (paper); lr 0.1 and no momentum (the authors' command line; their README has 0.5 and
0.9). D_0, ..., D_steps are the batches in the order given, from the first again when there are fewer: give steps + 1
for new data in every step, which is the default of the authors' package, or one batch for their command line, whose
steps all see the same 128 samples.

Numerics: on deep networks take float64 (`model.double()`). After three steps at lr 0.1, float32 is .34 away from it on
ResNet-20 in relative norm, here and in the authors' code alike.

`structure="channels"` has one mask entry an output channel: meta-gradients are summed over its weights before the
absolute value. See `channels` for what the budget means. Without steps this is 0 where BatchNorm takes a channel's
scale out, and is refused there.

Run beside the authors' code, scores are equal to 1e-10 in float64. Departures: the first momentum buffer is
differentiated like the others; theirs is a detached copy, as torch's SGD makes it, so that the first step counts as a
constant. At their README's momentum of 0.9 this changes half of the mask (kept sets overlap by .54 / .36 / .47 on
ResNet-20 at densities 0.5 / 0.1 / 0.02), and `detach_first_buffer=True` gives theirs; without momentum there is no
buffer. Weights that earlier rounds pruned stay zero in the steps (the paper has one round); dropout is off. Processes
that score together each train on their own batches, and their signed meta-gradients are summed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Batch, Data
from sapwood.criteria.channels import check_structure, refuse_without_scale, structured
from sapwood.criteria.derivatives import twice_differentiable
from sapwood.errors import ConfigError
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks


@dataclass(frozen=True)
class ProsPr:
    """|dL after training / dm|.

    Attributes:
        steps: Training steps before the loss is taken; with 0 this is SNIP on one batch, whose channels cannot be
            scored behind BatchNorm.
        lr: Learning rate of the steps.
        momentum: Momentum of the steps.
        first_order: Do not differentiate through the steps.
        detach_first_buffer: With momentum, take the first step for a constant, as the authors' code does.
        structure: What falls together: "weights" or whole output "channels".
        batch_statistics: BatchNorm normalises with each batch's statistics (else with the running ones).
    """

    steps: int = 3
    lr: float = 0.1
    momentum: float = 0.0
    first_order: bool = False
    detach_first_buffer: bool = False
    structure: str = "weights"
    batch_statistics: bool = True

    def __post_init__(self) -> None:
        check_structure(self.structure)
        if self.steps < 0:
            raise ConfigError(f"steps is {self.steps}; it must be 0 or more.")
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}; it must be above 0.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum}; it must be 0 or more, below 1.")

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight; pruned ones get 0."""
        batches = itertools.cycle(data.labelled())
        gates = {name: masks[name].to(weight.dtype).requires_grad_() for name, weight in net.weights.items()}
        with twice_differentiable(net, data.labelled()[0]):
            start = {name: weight * gates[name] for name, weight in net.weights.items()}
            trained = self._trained(net, masks, start, [next(batches) for _ in range(self.steps)])
            loss = net.loss(trained, next(batches), train=self.batch_statistics)
            gradient = net.differentiate_again(loss, gates)
        kept = net.summed({name: gradient[name] * masks[name] for name in gates})
        if self.structure == "channels" and not self.steps:
            refuse_without_scale(net, kept)
        return {name: score.abs() for name, score in structured(net, kept, self.structure).items()}

    def _trained(self, net: FunctionalModel, masks: Masks, start: Params, batches: list[Batch]) -> Params:
        """All trained parameters after one step a batch, as functions of `start` unless `first_order`."""
        fixed = {n: p.clone().requires_grad_() for n, p in net.params.items() if p.is_floating_point()}
        params = {**fixed, **start}
        velocity: Params = {}
        for batch in batches:
            loss = net.loss(params, batch, train=self.batch_statistics)
            gradient = masks.apply(net.differentiate(loss, params, create_graph=not self.first_order))
            velocity = self._velocity(velocity, gradient)
            params = {name: parameter - self.lr * velocity[name] for name, parameter in params.items()}
        return params

    def _velocity(self, before: Params, gradient: Params) -> Params:
        if before:
            return {name: self.momentum * before[name] + g for name, g in gradient.items()}
        if self.momentum and self.detach_first_buffer:
            return {name: g.detach() for name, g in gradient.items()}
        return gradient
