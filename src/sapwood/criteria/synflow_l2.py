"""SynFlow-L2: SynFlow with squared weights (Gebhart, Saxena, Schrater 2021, "A Unified Paths Perspective").

Formula: R = sum of the outputs of the network with all weights replaced by their squares, on an input of ones;
S_j = w_j^2 dR/d(w_j^2). On a bias-free network of positively homogeneous layers R is the sum over all paths of the
squared products of their weights, and S_j the part that passes through j. It is the closest kin of NTK-SAP: on a
fully connected network without normalisation, the expectation of NTK-SAP's score over weight draws is, up to one
factor, this score with every w^2 replaced by its variance.

Defaults: 100 exponential rounds, as for SynFlow. Needs only the input's shape. Numerics, BatchNorm (running variances
are squared, so that a scale 1/std becomes 1/var) and what is made a positive flow: as for SynFlow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Data
from sapwood.criteria.synflow import flow_scores
from sapwood.functional import FunctionalModel
from sapwood.masks import Masks


@dataclass(frozen=True)
class SynFlowL2:
    """w^2 dR/d(w^2)."""

    needs_data = False

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight; pruned ones get 0 through the mask."""
        return flow_scores(net, masks, data, torch.square)
