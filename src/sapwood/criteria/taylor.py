"""Taylor importance, first order: the squared change of the loss when weights are removed (Molchanov et al. 2019).

Formula: I_j = sum over mini-batches b of (w_j g_bj)^2, with g_b the gradient of the mean loss of batch b: the square of
the change that removing w_j makes to first order. For `structure="channels"` it is the square of the gradient in a gate
of one on an output channel, which is the paper's criterion:

* behind the layer that gradient is the sum of the contributions over the channel, sum_b (sum_j w_j g_bj)^2;
* where a norm that treats every channel by itself follows (batch, instance, or group normalisation of single channels),
  it takes the channel's scale out again and that sum is 0. There the gate stands behind the norm, as in the authors'
  networks: its gradient is gamma dL/dgamma + beta dL/dbeta. See `norm_gates`.

A channel that goes into a norm and elsewhere too (a pre-activation stem) has a gate on every way. A bias of the layer
counts only where a norm takes it up. Where something else makes a layer's scale have no effect, the layer is refused.

Made for trained networks, in steps between which training goes on; on one batch, I is the square of SNIP's score and
ranks weights alike. Squares are summed over mini-batches, as the paper averages them, so the result depends on how
samples are batched: inside a batch gradients of samples cancel, with `per="sample"` (one forward and backward pass a
sample, BatchNorm held at its batch's statistics) they do not.

Run beside the authors' code, scores are equal up to the number of batches: weights (its method 0, summed over a unit),
and channels (its method 22, gates behind BatchNorm) in train and in eval mode. Departure: a sum instead of a running
average over batches, since nothing is trained between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Batch, Data
from sapwood.criteria.channels import channel_of, check_structure, layout_of, refuse_without_scale
from sapwood.criteria.derivatives import sample_losses
from sapwood.criteria.norm_gates import NormGates
from sapwood.errors import unknown_name
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks

PER = ("batch", "sample")


@dataclass(frozen=True)
class Taylor:
    """(w dL/dw)^2, summed over batches or samples.

    Attributes:
        structure: What falls together: "weights" or whole output "channels".
        per: What has a gradient of its own: every "batch" given, or every "sample".
        batch_statistics: BatchNorm normalises with each batch's statistics (else with the running ones).
    """

    structure: str = "weights"
    per: str = "batch"
    batch_statistics: bool = True

    def __post_init__(self) -> None:
        check_structure(self.structure)
        if self.per not in PER:
            raise unknown_name("per", self.per, PER)

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight; pruned ones get 0, or the score of their channel.

        Raises:
            UnsupportedModelError: for channels, where something other than torch's norms undoes their scale.
        """
        batches = data.labelled()
        if self.structure == "weights":
            return net.summed(self._weights(net, masks, batches))
        gates = NormGates.of(net, data, generator)
        return net.summed(self._channels(net, masks, batches, gates))

    def _weights(self, net: FunctionalModel, masks: Masks, batches: tuple[Batch, ...]) -> Params:
        total = {name: torch.zeros_like(weight) for name, weight in net.weights.items()}
        for loss in self._losses(net, masks, batches):
            leaves = net.leaves(masks)
            for name, gradient in net.differentiate(loss(leaves), leaves).items():
                total[name] += (leaves[name].detach() * gradient).square()
        return total

    def _channels(self, net: FunctionalModel, masks: Masks, batches: tuple[Batch, ...], gates: NormGates) -> Params:
        total = {name: torch.zeros_like(weight) for name, weight in net.weights.items()}
        for loss in self._losses(net, masks, batches):
            gradients, changes = gates.gradients(net, masks, loss)
            refuse_without_scale(net, changes, gradients)
            for name, gradient in gradients.items():
                total[name] += gradient.square()[channel_of(total[name], layout_of(net, name))]
        return total

    def _losses(
        self, net: FunctionalModel, masks: Masks, batches: tuple[Batch, ...]
    ) -> Iterator[Callable[[Params], Tensor]]:
        """The mean loss of every batch, or of every sample, as a function of the effective weights."""
        for batch in batches:
            if self.per == "sample":
                yield from sample_losses(net, masks, batch, batch_statistics=self.batch_statistics)
            else:
                yield lambda params, batch=batch: net.loss(params, batch, train=self.batch_statistics)  # type: ignore[misc]
