r"""NTK-SAP: keep the expected neural tangent kernel's nuclear norm (Wang, Li, Sun, ICLR 2023, eq. 10 and Algorithm 1).

Formula: S(m_j) = | d/dm_j  sum_i || f(z_i; w_i*m) - f(z_i; (w_i + dw_i)*m) ||^2 |, with w_i fresh Kaiming weights,
dw_i ~ N(0, epsilon) and z_i ~ N(0, 1): no data, no labels, no trained weights. To first order the sum is epsilon
times the squared Frobenius norm of the Jacobian, that is, the nuclear norm of the fixed-weight NTK. The finite
difference is part of the method: on ReLU networks its mask gradient does not tend to the exact derivative's (kink
crossings count).

For each of `resamples` x ceil(samples / batch_size) mini-batches, as in the authors' code: draw weights w (one draw
for the whole mini-batch), inputs z and a perturbation dw; one train-mode pass sets every BatchNorm to this batch's
statistics under w*m (unbiased variance, constants from there on); then both networks run in eval mode with these
statistics, and the gradient with respect to the mask flows through both. Signed gradients are summed over everything;
the absolute value comes last.

Defaults: the paper's for CIFAR-10 / ResNet-20: 20 exponential rounds, resamples R = 5, samples = 100 (10 a class),
epsilon = 1e-4. For CIFAR-100 / VGG-16 the paper has rounds=100, resamples=1, samples=1000; for Tiny-ImageNet 100, 1,
2000.

**epsilon is a variance**, as in the paper; the authors' code takes its square root, 0.01, on its command line.

Departures from the authors' code: the number of inputs is a field (there it is 10 x classes, read off the data
loader); dropout is off in the statistics pass; every norm layer, not only BatchNorm, is scored with scale 1 and shift
0 under fresh weights; exactly k weights are kept (the code's threshold over-prunes ties); nothing is left changed in
the model (the code leaves re-drawn weights, BatchNorm statistics and momentum behind).

Order of draws from the generator, for each mini-batch: weights in parameter order, inputs, perturbations in mask
order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Batch, Data, filled, resized, size
from sapwood.errors import ConfigError
from sapwood.fresh import fresh_parameters, normal
from sapwood.functional import FunctionalModel, Params, differentiate
from sapwood.masks import Masks


@dataclass(frozen=True)
class NtkSap:
    """The published Monte-Carlo estimator.

    Attributes:
        resamples: Passes over the inputs, each with fresh draws (R).
        samples: Inputs a pass.
        batch_size: Inputs that share one weight draw; 1 draws weights for every input, as the paper's Algorithm 1 says.
        epsilon: Variance of the weight perturbation.
        fresh_weights: Draw new weights for every mini-batch ("NINW"); False scores the model's own weights.
        random_inputs: Gaussian inputs; False takes the inputs of `batches`.
    """

    resamples: int = 5
    samples: int = 100
    batch_size: int = 256
    epsilon: float = 1e-4
    fresh_weights: bool = True
    random_inputs: bool = True

    def __post_init__(self) -> None:
        for name in ("resamples", "samples", "batch_size", "epsilon"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0.")

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight; pruned ones get a score of no meaning, which the loop ignores."""
        total = {name: torch.zeros_like(weight) for name, weight in net.weights.items()}
        for index, template in enumerate(self._templates(data)):
            params = self._draw(net, generator)
            batch = self._inputs(template, net, generator)
            noise = {name: math.sqrt(self.epsilon) * normal(params[name], generator) for name in net.prunable}
            if net.mine(index):  # every process draws everything, so that they stay in step
                for name, gradient in mask_gradient(net, masks, params, noise, batch).items():
                    total[name] += gradient
        return {name: gradient.abs() for name, gradient in net.summed(total).items()}

    def _templates(self, data: Data) -> Iterator[Batch]:
        """`resamples` times the mini-batches of one pass; real inputs are never repeated within a batch."""
        templates = data.templates() if self.random_inputs else data.inputs()
        for _ in range(self.resamples):
            left = self.samples
            for template in itertools.cycle(templates):
                take = min(left, self.batch_size, self.samples if self.random_inputs else size(template))
                yield resized(template, take)
                left -= take
                if not left:
                    break

    def _draw(self, net: FunctionalModel, generator: torch.Generator) -> Params:
        return fresh_parameters(net, generator) if self.fresh_weights else net.params

    def _inputs(self, template: Batch, net: FunctionalModel, generator: torch.Generator) -> Batch:
        if not self.random_inputs:
            return template
        return filled(template, lambda t: normal(t.to(net.device, net.dtype), generator))


def mask_gradient(net: FunctionalModel, masks: Masks, params: Params, noise: Params, batch: Batch) -> Params:
    """Gradient of `output_change` with respect to the masks, BatchNorm calibrated on the batch under w*m."""
    buffers = net.calibrated({**params, **masks.apply({n: params[n] for n in net.prunable})}, batch)
    leaves = {name: masks[name].to(params[name].dtype).requires_grad_() for name in net.prunable}
    return differentiate(output_change(net, leaves, params, noise, batch, buffers), leaves)


def output_change(
    net: FunctionalModel, masks: Params, params: Params, noise: Params, batch: Batch, buffers: Params
) -> Tensor:
    """|| f(z; w*m) - f(z; (w+dw)*m) ||^2 summed over the batch and the outputs (eq. 10, times |D|)."""

    def outputs(weights: Params) -> Tensor:
        effective = {name: weights[name] * mask for name, mask in masks.items()}
        return net.outputs({**params, **effective}, batch, buffers=buffers)

    perturbed = {name: params[name] + noise[name] for name in masks}
    return (outputs(params) - outputs(perturbed)).square().sum()
