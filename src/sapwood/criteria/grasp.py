"""GraSP: keep what the gradient flow needs (Wang, Zhang, Grosse 2020).

Formula (eq. 8): S(-w) = -w * (H g), the change of the squared gradient norm when a weight is removed; the *largest*
-w*Hg are pruned, so the score that is kept here is w * (H g), signed. H and g belong to the loss with logits divided by
`temperature`, at the effective weights, summed over all samples.

Defaults: one round, temperature 200 (authors' code). BatchNorm uses batch statistics.

Run beside the authors' code and two ports of it, on the same batches, scores are equal to 1e-10 in float64.
Departures: both passes see the same batches (some ports iterate a shuffled loader twice); the weights that will be
trained are scored, not a re-initialised copy; missing classes are the caller's business. The authors' code sorts the
samples by class and halves them, so that each half of the classes has BatchNorm statistics of its own, which on
ResNet-20 changes a third of the mask at density 0.5 and half of it at 0.02: `batches=[first half of the classes, second
half]` reproduces it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Data
from sapwood.criteria.derivatives import twice_differentiable
from sapwood.functional import FunctionalModel
from sapwood.masks import Masks


@dataclass(frozen=True)
class Grasp:
    """w * (H g).

    Attributes:
        temperature: What logits are divided by before the loss.
        batch_statistics: BatchNorm normalises with each batch's statistics (else with the running ones).
    """

    temperature: float = 200.0
    batch_statistics: bool = True

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight; pruned ones get 0."""
        batches = data.labelled()
        scores = {name: torch.zeros_like(weight) for name, weight in net.weights.items()}
        with twice_differentiable(net, batches[0], temperature=self.temperature):
            net = net.held()
            direction = net.gradient(masks, batches, temperature=self.temperature, train=self.batch_statistics)
            for batch, count in net.counted(batches):
                leaves = net.leaves(masks)
                loss = net.loss(leaves, batch, temperature=self.temperature, train=self.batch_statistics) * count
                gradient = net.differentiate(loss, leaves, create_graph=True)
                slope = torch.stack([(gradient[name] * direction[name]).sum() for name in leaves]).sum()
                for name, product in net.differentiate_again(slope, leaves).items():
                    scores[name] += leaves[name].detach() * product
        return net.summed(scores)
