"""SynFlow: synaptic flow, conserved layer by layer (Tanaka, Kunin, Yamins, Ganguli 2020).

Formula (eq. 5): R = sum of the outputs of the network with all weights replaced by their absolute values, on an input
of ones; S_j = |w_j| dR/d|w_j|. On a bias-free network of positively homogeneous layers the sum of S over a layer is R
for every layer, which is why it never empties one while another still has weights to spare.

Defaults: 100 exponential rounds (paper). Needs only the input's shape.

Numerics: float64 throughout, because R grows like width^depth; the scores are not rescaled, so rankings are exact.
BatchNorm normalises with its running statistics (in train mode the law fails).

Departures from the authors' code: nothing is written into the model (the code takes `abs_` of its whole state dict
and multiplies signs back); running means are taken as zero (a trained network's would turn the flow negative); and
what is not a positive linear flow is made one, or refused, see `sapwood.flow.positive`. On an untrained ReLU network
with BatchNorm the scores are the code's, to the bit in float64. The premise is checked on what was computed, see
`sapwood.flow.premise`. The code rounds the number of kept weights up, ours is the nearest: `rounding="up"` keeps its
masks through all rounds (see `allocation`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sapwood.batches import Data, filled
from sapwood.flow.premise import flow_gradient
from sapwood.flow.state import non_negative, statistics
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks
from sapwood.witness.rows import shortened


@dataclass(frozen=True)
class SynFlow:
    """|w| dR/d|w|."""

    needs_data = False

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight; pruned ones get 0 through the mask."""
        return flow_scores(net, masks, data, torch.abs)


def flow_scores(net: FunctionalModel, masks: Masks, data: Data, positive: Callable[[Tensor], Tensor]) -> Params:
    """P dR/dp for p = positive(w), R being the sum of the outputs of the network with weights p on an input of ones.

    On a bias-free ReLU network this is the sum of the products of p over all paths through the weight.

    Args:
        net: The model.
        masks: Masks of its weights; pruned ones get 0.
        data: What the shape of an input is read from.
        positive: Makes weights and BatchNorm's variances positive; its result is in float64.
    """
    template = shortened(net, data.templates()[0], 1)
    ones = filled(template, lambda t: torch.ones_like(t, device=net.device, dtype=torch.float64), data.draw)
    params = {name: non_negative(p, positive) for name, p in net.params.items()}
    kept = masks.apply({name: params[name] for name in net.prunable})
    leaves = {name: weight.requires_grad_() for name, weight in kept.items()}
    gradient = flow_gradient(net, params, leaves, ones, partial(statistics, net, positive), draw=data.draw)
    return {name: (leaf.detach() * gradient[name]).abs() for name, leaf in leaves.items()}
