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

Of the seven forward-equivalents of a mini-batch (three passes, one backward through two of them) the statistics pass
is one. `merged_statistics=True` saves it: each BatchNorm of the unperturbed pass takes the statistics of its own input.
That is not quite the published score. There the statistics are collected behind BatchNorms that divide by the biased
deviation, while the scored passes divide by the unbiased one, so the two differ by a relative 1/n, n = samples x
positions of a map; each is as good a definition as the other. On one draw gradients differ by 1 % (ResNet-20, 100
inputs; last map 8x8) to 7 % (VGG-16, 32 inputs; last map 2x2), mostly through units near their kink, where two draws
differ by far more than 100 %.

Many small draws say more than few large ones at equal cost, since a draw of weights varies more than its inputs do:
`batch_size=16, samples=16, resamples=25` costs less than the default's 5 x 100. Keep 16 or more inputs in networks that
end in maps of 2x2 pixels; BatchNorm's statistics are biased below.

Defaults: the paper's for CIFAR-10 / ResNet-20: 20 exponential rounds, resamples R = 5, samples = 100 (10 a class),
epsilon = 1e-4. For CIFAR-100 / VGG-16 the paper has rounds=100, resamples=1, samples=1000; for Tiny-ImageNet 100, 1,
2000.

**epsilon is a variance**, as in the paper; the authors' code takes its square root, 0.01, on its command line.

Departures from the authors' code: the number of inputs is a field (there it is 10 x classes, read off the data
loader); dropout is off in the statistics pass; every norm layer, not only BatchNorm, is scored with scale 1 and shift
0 under fresh weights; exactly k weights are kept (the code's threshold over-prunes ties); nothing is left changed in
the model (the code leaves re-drawn weights, BatchNorm statistics and momentum behind).

Order of draws from the generator: see `sapwood.criteria.monte_carlo`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Batch, parts, size
from sapwood.criteria.monte_carlo import MonteCarlo, mask_leaves
from sapwood.errors import ConfigError, UnsupportedModelError
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks
from sapwood.witness.rows import takes_rows


@dataclass(frozen=True)
class NtkSap(MonteCarlo):
    """The published Monte-Carlo estimator.

    Attributes:
        epsilon: Variance of the weight perturbation.
        merged_statistics: Take BatchNorm's statistics in the unperturbed pass itself, without a pass of their own.
        chunk_size: Inputs that are differentiated at once; 0 takes the whole mini-batch. The score is the same, peak
            memory falls in proportion (BatchNorm's statistics, which need the whole mini-batch, are then taken in a
            pass of their own, which keeps no graph).
    """

    epsilon: float = 1e-4
    merged_statistics: bool = False
    chunk_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon > 0:
            raise ConfigError(f"epsilon is {self.epsilon}; it must be above 0.")
        if self.chunk_size < 0:
            raise ConfigError(f"chunk_size is {self.chunk_size}; it must be above 0, or 0 for the whole mini-batch.")

    def mask_gradient(
        self, net: FunctionalModel, masks: Masks, params: Params, direction: Params, batch: Batch
    ) -> Params:
        """That of `output_change` under the perturbation sqrt(epsilon) x direction."""
        net = net.held()
        noise = {name: math.sqrt(self.epsilon) * normal for name, normal in direction.items()}
        chunked = 0 < self.chunk_size < size(batch)
        if self.merged_statistics and not chunked:
            return _merged_gradient(net, masks, params, noise, batch)
        buffers = _statistics(net, masks, params, batch, merged=self.merged_statistics)
        if not chunked:
            return _gradient(net, masks, params, noise, batch, buffers)
        _refuse_batch_dependence(net, batch)
        total: Params = {}
        for part in parts(batch, self.chunk_size):
            gradient = _gradient(net, masks, params, noise, part, buffers)
            total = {name: gradient[name] + total[name] for name in gradient} if total else gradient
        return total


def mask_gradient(net: FunctionalModel, masks: Masks, params: Params, noise: Params, batch: Batch) -> Params:
    """Gradient of `output_change` with respect to the masks, BatchNorm calibrated on the batch under w*m."""
    net = net.held()
    return _gradient(net, masks, params, noise, batch, _statistics(net, masks, params, batch, merged=False))


def output_change(
    net: FunctionalModel,
    masks: Params,
    params: Params,
    noise: Params,
    batch: Batch,
    buffers: Params,
    *,
    record: bool = False,
) -> Tensor:
    """|| f(z; w*m) - f(z; (w+dw)*m) ||^2 summed over the batch and the outputs (eq. 10, times |D|).

    With `record` the unperturbed pass takes its BatchNorms' statistics from the batch and writes them into `buffers`,
    from which the perturbed pass reads them.
    """

    def effective(weights: Params) -> Params:
        return {**params, **{name: weights[name] * mask for name, mask in masks.items()}}

    if record:
        clean = net.calibrating(effective(params), batch, record=buffers)
    else:
        clean = net.outputs(effective(params), batch, buffers=buffers)
    perturbed = {name: params[name] + noise[name] for name in masks}
    return (clean - net.outputs(effective(perturbed), batch, buffers=buffers)).square().sum()


def _gradient(
    net: FunctionalModel, masks: Masks, params: Params, noise: Params, batch: Batch, buffers: Params
) -> Params:
    leaves = mask_leaves(net, masks, params)
    return net.differentiate(output_change(net, leaves, params, noise, batch, buffers), leaves)


def _merged_gradient(net: FunctionalModel, masks: Masks, params: Params, noise: Params, batch: Batch) -> Params:
    leaves, buffers = mask_leaves(net, masks, params), net.own_buffers()
    return net.differentiate(output_change(net, leaves, params, noise, batch, buffers, record=True), leaves)


def _statistics(net: FunctionalModel, masks: Masks, params: Params, batch: Batch, *, merged: bool) -> Params:
    """Buffers with the BatchNorm statistics of a batch under w*m."""
    effective = {**params, **masks.apply({name: params[name] for name in net.prunable})}
    if not merged:
        return net.calibrated(effective, batch)
    buffers = net.own_buffers()
    with torch.no_grad():
        net.calibrating(effective, batch, record=buffers)
    return buffers


def _refuse_batch_dependence(net: FunctionalModel, batch: Batch) -> None:
    if any(norm.running_mean is None for norm in net.norms):
        raise UnsupportedModelError(
            "A BatchNorm without running statistics (track_running_stats=False) normalises with whatever it is given, "
            "so that parts of a batch would not give the score of the whole: set chunk_size=0."
        )
    if not takes_rows(net, batch):
        raise UnsupportedModelError(
            "The model's outputs do not belong to rows of its inputs one by one, so that parts of a batch would not "
            "give the score of the whole: set chunk_size=0."
        )
