"""Taylor importance, first order: the squared change of the loss when weights are removed (Molchanov et al. 2019).

Formula: I_j = sum over mini-batches b of (w_j g_bj)^2, with g_b the gradient of the mean loss of batch b: the square of
the change that removing w_j makes to first order. For `structure="channels"` the contributions are added over
the weights of an output channel and then squared, sum_b (sum_j w_j g_bj)^2, which is the paper's gate behind the
layer: its gradient is that sum.

Made for trained networks, in steps between which training goes on; on one batch, I is the square of SNIP's score and
ranks weights alike. Squares are summed over mini-batches, as the paper averages them, so the result depends on how
samples are batched: inside a batch gradients of samples cancel, with `per="sample"` (one forward and backward pass a
sample, BatchNorm held at its batch's statistics) they do not.

Departure: a sum instead of a running average over batches, since nothing is trained between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Batch, Data
from sapwood.criteria.channels import check_structure, structured
from sapwood.criteria.derivatives import sample_gradients
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
        """Scores every weight; pruned ones get 0, or the score of their channel."""
        effective = masks.apply(net.weights)
        total = {name: torch.zeros_like(weight) for name, weight in effective.items()}
        for batch in data.labelled():
            for gradient in self._gradients(net, masks, batch):
                change = {name: weight * gradient[name] for name, weight in effective.items()}
                for name, removed in structured(net, change, self.structure).items():
                    total[name] += removed.square()
        return net.summed(total)

    def _gradients(self, net: FunctionalModel, masks: Masks, batch: Batch) -> Iterator[Params]:
        if self.per == "sample":
            yield from sample_gradients(net, masks, batch, batch_statistics=self.batch_statistics)
        else:
            leaves = net.leaves(masks)
            yield net.differentiate(net.loss(leaves, batch, train=self.batch_statistics), leaves)
