"""Skeletonization: remove the units that matter least to the error (Mozer and Smolensky 1989).

Formula: every unit's output o_i, as the layers after it read it, is multiplied by an attentional strength alpha_i;
relevance is rho_i = -dE/d alpha_i at alpha = 1, which to first order is the error without the unit minus that with it.
Since alpha_i stands beside the weights w_ji that read the unit, rho_i = -sum_j w_ji dE/dw_ji: it is read off the
gradient, of any model. Units are the input channels of each prunable layer, network inputs included, as in the paper
(`exclude` the first layer to keep them); a unit that several layers read has a relevance in each.

All weights by which a layer reads a unit share its relevance and fall together; budgets count weights (see `channels`).
The score is signed: a unit whose removal lowers the error goes first. A unit that nothing reads any more leaves its
incoming weights on no path, which the effective sparsity counts.

The error is the paper's linear one, E = sum |t - o|, because the derivative of a quadratic error vanishes as it is
learnt: o are softmax probabilities for class indices, raw outputs for real-valued targets. `error="loss"` takes the
loss instead.

Departures: the paper keeps an exponential average of dE/d alpha over presentations while it trains; here the weights
stand still and the derivative is the sum over all samples. Made for trained networks, one unit at a time with training
in between: use many rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Batch, Data, classes_last, target_of
from sapwood.criteria.channels import pooled, refuse_without_scale
from sapwood.errors import DataError, unknown_name
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks

ERRORS = ("linear", "loss")


@dataclass(frozen=True)
class Skeletonization:
    """-dE/d(attention to the unit), at all weights that read the unit.

    Attributes:
        error: E: "linear", the sum of absolute deviations, or "loss".
        batch_statistics: BatchNorm normalises with each batch's statistics (else with the running ones).
    """

    error: str = "linear"
    batch_statistics: bool = True

    def __post_init__(self) -> None:
        if self.error not in ERRORS:
            raise unknown_name("error", self.error, ERRORS)

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight, pruned ones by what is left of their unit.

        Raises:
            UnsupportedModelError: a norm takes out what an attention does, as behind a depthwise convolution.
        """
        effective = masks.apply(net.weights)
        total = {name: torch.zeros_like(weight) for name, weight in effective.items()}
        for batch, count in self._counted(net, data):
            leaves = net.leaves(masks)
            for name, gradient in net.differentiate(self._error(net, leaves, batch) * count, leaves).items():
                total[name] -= effective[name] * gradient
        total = net.summed(total)
        refuse_without_scale(net, total, inputs=True)
        return pooled(net, total, inputs=True)

    def _counted(self, net: FunctionalModel, data: Data) -> Iterable[tuple[Batch, float]]:
        batches = data.labelled()
        return net.counted(batches) if self.error == "loss" else ((batch, 1) for batch in batches)

    def _error(self, net: FunctionalModel, params: Params, batch: Batch) -> Tensor:
        if self.error == "loss":
            return net.loss(params, batch, train=self.batch_statistics)
        return linear_error(net.outputs(params, batch, train=self.batch_statistics), target_of(batch))


def linear_error(output: Tensor, target: Tensor) -> Tensor:
    """Sum of |target - output|; for class indices, of |one-hot - softmax| = 2 (1 - p) with p that of the true class.

    Args:
        output: Any shape for real-valued targets; else logits, classes in dimension 1, or last for targets of every
            position.
        target: Of the output's shape, or class indices; negative ones are ignored.

    Raises:
        DataError: the shapes do not fit, or the classes may be in either dimension.
    """
    if target.is_floating_point():
        if target.shape != output.shape:
            raise DataError(
                f"The linear error compares outputs of shape {tuple(output.shape)} with targets of shape "
                f"{tuple(target.shape)}; they must be the same. error='loss' takes the loss instead."
            )
        return (target - output).abs().sum()
    logits = output if classes_last(output, target) else output.movedim(1, -1)
    if target.shape != logits.shape[:-1]:
        raise DataError(
            f"Class indices of shape {tuple(target.shape)} do not fit outputs of shape {tuple(output.shape)}; "
            "error='loss' takes the loss instead."
        )
    chosen = logits.softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return 2 * (1 - chosen)[target >= 0].sum()
