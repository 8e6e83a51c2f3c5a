"""SNIP, Iterative SNIP and FORCE: |w dL/dw|, the loss's sensitivity to a connection.

Formula (Lee, Ajanthan, Torr 2019, eq. 3): S_j = |w_j g_j|, g = gradient of the loss summed over all samples, at the
effective weights w*m, with respect to them. The absolute value is taken after the sum. The three differ only in use:

* SNIP: one round.
* Iterative SNIP (Verdenius et al. 2020; de Jorge et al. 2021): many rounds, pruned weights stay pruned.
* FORCE (de Jorge et al. 2021): many rounds; pruned weights are scored with their original values and may return.

Defaults: 60 exponential rounds for the iterative forms, as the README of FORCE's code says (its command line has 10).
BatchNorm uses batch statistics, as in the NTK-SAP authors' runs; Synaptic-Flow's SNIP uses the running ones unless told
otherwise (`batch_statistics=False`).

Run beside the authors' code (Synaptic-Flow, NTK-SAP, and PyTorch ports of SNIP and FORCE), scores are equal to 1e-10
in float64. Departures:

* Loss. FORCE's code takes `nll_loss` of raw logits, which for want of a log_softmax in its networks is minus the mean
  logit of the true class. `loss=torch.nn.functional.nll_loss` gives its saliencies to the bit; with the paper's
  cross-entropy, which is the default, kept sets overlap (intersection over union) by .63 / .37 / .28 on a plain
  convolutional network and .79 / .74 / .73 on a ResNet-18 at densities 0.5 / 0.1 / 0.02.
* Budgets. SNIP's and FORCE's code round the number of kept weights down (`rounding="down"`), ours to the nearest: one
  weight a round, which over many rounds leads elsewhere (see `allocation`).
* Ties. Once all saliencies are 0, FORCE's threshold keeps every weight; here a budget is exact.
* The weights that will be trained are scored, not a re-initialised copy (SNIP's code draws Xavier weights).
* Every batch given is used in every round, each weighted by its number of samples (FORCE's code takes one batch a
  round); dropout is off; scores are not normalised, which changes no ranking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Data
from sapwood.functional import FunctionalModel
from sapwood.masks import Masks


@dataclass(frozen=True)
class Snip:
    """|w dL/dw|.

    Attributes:
        batch_statistics: BatchNorm normalises with each batch's statistics (else with the running ones).
    """

    batch_statistics: bool = True

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight, pruned ones too."""
        gradient = net.gradient(masks, data.labelled(), train=self.batch_statistics)
        return {name: (weight * gradient[name]).abs() for name, weight in net.weights.items()}
