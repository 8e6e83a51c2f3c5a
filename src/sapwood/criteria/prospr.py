"""ProsPr: score weights by how the loss after the first training steps depends on them (Alizadeh et al. 2022).

Formula: w_0 = m * w, w_{i+1} = w_i - lr v_i with v_i = momentum v_{i-1} + dL(w_i, D_i)/dw_i for i < steps, every
parameter being trained; S(m) = |dL(w_steps, D_steps) / dm|, the meta-gradient through all steps. It needs second
derivatives and the memory of steps + 1 graphs; `first_order` takes the steps for constants, so that
S = |w dL/dw_steps|, with the memory of one.

Defaults: one round, three steps (paper); lr 0.1 and no momentum (the authors' command line; their README has 0.5 and
0.9). D_0, ..., D_steps are the batches in the order given, from the first again when there are fewer: give steps + 1,
or every step sees the same data.

`structure="channels"` has one mask entry an output channel: meta-gradients are summed over its weights before the
absolute value. See `channels` for what the budget means.

Departures from the authors' code: the first momentum buffer is differentiated like the others (theirs is detached);
weights that earlier rounds pruned stay zero in the steps (the paper has one round); dropout is off. Processes that
score together each train on their own batches, and their signed meta-gradients are summed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Batch, Data
from sapwood.criteria.channels import check_structure, structured
from sapwood.criteria.derivatives import twice_differentiable
from sapwood.errors import ConfigError
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks


@dataclass(frozen=True)
class ProsPr:
    """|dL after training / dm|.

    Attributes:
        steps: Training steps before the loss is taken; with 0 this is SNIP on one batch.
        lr: Learning rate of the steps.
        momentum: Momentum of the steps.
        first_order: Do not differentiate through the steps.
        structure: What falls together: "weights" or whole output "channels".
        batch_statistics: BatchNorm normalises with each batch's statistics (else with the running ones).
    """

    steps: int = 3
    lr: float = 0.1
    momentum: float = 0.0
    first_order: bool = False
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
        kept = {name: gradient[name] * masks[name] for name in gates}
        return {name: score.abs() for name, score in structured(net, net.summed(kept), self.structure).items()}

    def _trained(self, net: FunctionalModel, masks: Masks, start: Params, batches: list[Batch]) -> Params:
        """All trained parameters after one step a batch, as functions of `start` unless `first_order`."""
        fixed = {n: p.clone().requires_grad_() for n, p in net.params.items() if p.is_floating_point()}
        params = {**fixed, **start}
        velocity: Params = {}
        for batch in batches:
            loss = net.loss(params, batch, train=self.batch_statistics)
            gradient = masks.apply(net.differentiate(loss, params, create_graph=not self.first_order))
            velocity = {n: self.momentum * velocity[n] + g if velocity else g for n, g in gradient.items()}
            params = {name: parameter - self.lr * velocity[name] for name, parameter in params.items()}
        return params
