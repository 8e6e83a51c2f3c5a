"""PX, Path eXclusion: keep what bounds the trace of the NTK on the data (Iurada, Ciccone, Tommasi, CVPR 2024).

Formula. An output k is a sum over paths p: the product v_p of the weights on the path, times the input at its
beginning, if all its rectifiers are open. Through the chain rule the trace of the NTK is at most the product of two
squared norms, one of the outputs' dependence on the paths, one of the paths' dependence on the weights. Both are read
off auxiliary networks without non-linearities:

* activated paths J_k = sum over samples x and paths p to k of a_p(x) x_p^2: all weights one, inputs squared, every
  rectifier multiplied by the gate a that it has in the real network on x (eval mode, running statistics);
* path values K_k = sum over paths p to k of v_p^2: all weights squared, an input of ones, all rectifiers open.

R = sum_k J_k K_k, and S_j = w_j^2 dR/d(w_j^2), J being a constant. All three networks are under the masks. Scores are
positive, and conserved layer by layer on networks without biases, as SynFlow's are.

The data enter through how much each output counts, and only there. With J = 1 it is SynFlow-L2, and under a dense last
layer all J_k are alike, whatever the data: the two part from the round on in which outputs lose weights unevenly.

Defaults: 100 exponential rounds. Needs inputs, no labels. Cost: two forward passes over all inputs a round, one of them
in float64.

Choices of ours, beyond plain networks: paths begin at inputs, so biases are zero in the auxiliary networks; all other
parameters (norm scales, tokens, positions) are weights like any other; BatchNorm's scale 1/std is one in the first
network and 1/var in the second; GELU, SiLU and their like have the gates of a ReLU; tanh and sigmoid are always open,
attention is bilinear (see `sapwood.flow.positive`), and of a max-pool the larger flow passes; recurrent layers' fused
non-linearities are left as they are.

Run beside the authors' code on networks without BatchNorm whose last layer is not called `fc`, scores are equal to
1e-14 in float64; on others the mask is not that of the released code (kept sets overlap by .68 / .51 / .41 on ResNet-20
in one round, at densities 0.5 / 0.1 / 0.02), which departs from its formula in three ways:

* both auxiliary networks run in train mode, so that BatchNorm centres the flow with batch statistics (in eval mode the
  network of ones overflows float32 on ResNet-20); here running statistics are constants;
* parameters with `bn` or `fc` in their names are left as they are, so that the classifier enters with its signed,
  unsquared weights in both networks; here what is a weight goes by type, and all are squared;
* a BatchNorm of another name (that of a shortcut) and the biases of convolutions are squared in one network and ones,
  shift included, in the other; here biases are 0.

With its file changed in the first two, scores are equal to 1e-14 on networks with BatchNorm too.
`as_released=True` takes the first two (see `px_released`). Further departures: functions are intercepted in a context
(there `F.relu` is patched for everybody, and `x.relu()` is not seen); float64; of the number of kept weights the
nearest (there rounded up). The same code's SynFlow-L2 lacks a factor |w|, so that it is not our `synflow-l2`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sapwood.batches import Batch, Data, Draw, filled
from sapwood.criteria.px_released import released_scores
from sapwood.flow.gates import Record, Replay
from sapwood.flow.premise import flow_gradient
from sapwood.flow.state import is_constant, statistics
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks
from sapwood.witness.rows import shortened, takes_rows


@dataclass(frozen=True)
class PX:
    """w^2 d(sum_k J_k K_k)/d(w^2).

    Attributes:
        as_released: Score as the authors' code does: on networks with BatchNorm, or whose classifier it spares, that is
            not the formula.
        spare_classifier: With `as_released`, the last linear layer keeps its signed weights, as in the authors' code
            where it is called `fc`.
    """

    as_released: bool = False
    spare_classifier: bool = True

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight; pruned ones get 0 through the mask."""
        if self.as_released:
            return released_scores(net, masks, data, spare_classifier=self.spare_classifier)
        squares = _auxiliary(net, masks, torch.square)
        ones = _auxiliary(net, masks, torch.ones_like)
        squared = partial(statistics, net, torch.square)
        total = {name: torch.zeros_like(squares[name]) for name in net.prunable}
        for batch in data.inputs():
            paths = self.activated(net, masks, ones, batch, data.draw)
            leaves = {name: squares[name].detach().requires_grad_() for name in net.prunable}
            start = filled(shortened(net, batch, 1), _ones, data.draw)
            found = flow_gradient(net, squares, leaves, start, squared, partial(_weighted, paths), data.draw)
            for name, gradient in found.items():
                total[name] += gradient
        return {name: squares[name] * gradient for name, gradient in net.summed(total).items()}

    def activated(self, net: FunctionalModel, masks: Masks, ones: Params, batch: Batch, draw: Draw = None) -> Tensor:
        """Activated paths to every output, weighted with the squared inputs: the outputs' shape with a batch of one.

        Of a batch that is one whole, it has the outputs' own shape.
        """
        net = net.held()
        with torch.no_grad():
            inputs = filled(batch, lambda t: t.to(net.dtype), draw)
            kept, own = masks.apply(net.weights), net.own_buffers()
            with Record(inputs, {**net.params, **kept, **own}) as record:
                net.outputs(kept, inputs, buffers=own)
            squared = filled(batch, lambda t: t.double().square(), draw)
            state = statistics(net, lambda buffer: (buffer != 0).double())
            with Replay(record.gates, squared, {**ones, **state}) as replay:
                paths: Tensor = replay.arrived(net.outputs(ones, squared, buffers=state))
        return paths.sum(0, keepdim=True) if takes_rows(net, batch) else paths


def _ones(tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor, dtype=torch.float64)


def _weighted(paths: Tensor, values: Tensor) -> Tensor:
    """sum_k J_k K_k."""
    return (paths * values).sum()


def _auxiliary(net: FunctionalModel, masks: Masks, value: Callable[[Tensor], Tensor]) -> Params:
    """All parameters in float64 as an auxiliary network has them, under the masks."""
    params = {
        name: torch.zeros_like(p, dtype=torch.float64) if is_constant(name) else value(p.double())
        for name, p in net.params.items()
        if p.is_floating_point()
    }
    return masks.apply(params)
