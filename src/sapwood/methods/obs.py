r"""OBS, Optimal Brain Surgeon: delete the weight that costs least, and let the others make up for it.

Formula (Hassibi & Stork 1992, eq. 5): deleting weight q of a network at a minimum raises the loss by
L_q = w_q^2 / (2 [H^-1]_qq), when all others move by dw = -(w_q / [H^-1]_qq) H^-1 e_q. H is the Hessian of the mean
loss; after a deletion, its row and column leave it, which for the inverse is one rank-one update. A weight's score is
the L_q at which its turn comes (at least that of the one before it), so that a budget ends a sequence of deletions.
Weights deleted in one round are made up for together: dw = -H^-1 E (E' H^-1 E)^-1 E' w, the sum of the single steps.

Two curvatures:

* "fisher": the empirical Fisher information, damped, (1/N) sum_n g_n g_n' + damping I, g_n the gradient of one sample's
  loss; its inverse by the recursion of Woodbury's identity, one sample at a time (the paper's own way; with the loss's
  gradient in place of the output's, as in Singh & Alistarh's WoodFisher 2020). Kept in diagonal blocks of `block`
  consecutive weights, so memory is 8 x block bytes a weight and one backward pass a sample.
* "exact": the Hessian itself by differentiating twice, plus damping I, over all weights at once: small networks only.

For trained networks: at random weights the Hessian is no measure of anything, and need not even be positive.

Defaults: damping as the paper's alpha (1e-8 to 1e-4), its upper end because float gradients are noisy; one round, that
is, the curvature at the weights as they come. With more rounds it is computed anew at the moved weights.

Departures: the paper interleaves single deletions with new Hessians, here rounds do that; the inverse is blocked, and a
block may run over the border of two layers; BatchNorm uses its running statistics; biases stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.allocation import Allocation, allocation
from sapwood.batches import Data
from sapwood.errors import ConfigError, ScoreError, unknown_name
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks
from sapwood.methods.curvature import by_name, hessian, in_blocks, inverse_fisher, inverted
from sapwood.pruning import Found, OnRound, Round, stages, starting_masks, warn_of_collapse

CURVATURES = ("fisher", "exact")
EXACT = 5_000  # weights, beyond which as many backward passes and the cube of it in operations are out of reach
MEMORY = 8 * 2**30  # bytes of inverse blocks
AT_ONCE = 2**24  # numbers of the blocks that are worked on at a time


@dataclass(frozen=True)
class Obs:
    """Optimal Brain Surgeon; returns new weights.

    Attributes:
        curvature: "fisher" or "exact".
        block: Consecutive weights whose interaction the Fisher information keeps; 0: all.
        damping: Added to the curvature's diagonal.
        rounds: Times that the curvature is computed.
        schedule: Densities after each round: "exponential", "linear" or "cubic".
        allocation: Which weights a budget keeps, as in `Method`.
    """

    curvature: str = "fisher"
    block: int = 64
    damping: float = 1e-4
    rounds: int = 1
    schedule: str = "exponential"
    allocation: str | Masks | Mapping[str, float] | Allocation = "global"

    def __post_init__(self) -> None:
        if self.curvature not in CURVATURES:
            raise unknown_name("curvature", self.curvature, CURVATURES)
        if self.block < 0 or self.damping < 0 or (self.curvature == "fisher" and self.damping == 0):
            raise ConfigError(
                f"block is {self.block} and damping {self.damping}; expected 0 or more, damping above 0 with 'fisher'."
            )

    def run(
        self,
        net: FunctionalModel,
        data: Data,
        density: float,
        generator: torch.Generator,
        *,
        min_per_layer: int = 0,
        on_round: OnRound | None = None,
        within: Masks | None = None,
    ) -> Found:
        """Deletes weights down to a density, and moves those that are left.

        Raises:
            ConfigError: the network is too large for these fields, or several processes are to score together.
            DataError: there are no labelled batches.
            ScoreError: the exact Hessian is not positive definite.
        """
        if net.group is not None:
            raise ConfigError(
                "Optimal Brain Surgeon takes one sample after the other, in one process: leave group out."
            )
        masks = starting_masks(net, within)
        plan = stages(self.schedule, density, self.rounds, masks)
        if plan[-1][1] == masks.kept:
            return Found(masks, ())
        allocate, history = allocation(self.allocation, min_per_layer), list[Round]()
        for index, (target, keep) in enumerate(plan, start=1):
            begin = time.perf_counter()
            masks, moved = self._round(net, masks, data, allocate, keep)
            net = dataclasses.replace(net, params=net.params | moved)
            history.append(Round(index, target, keep, time.perf_counter() - begin, masks.collapsed))
            if on_round:
                on_round(history[-1], masks)
        warn_of_collapse(masks)
        return Found(masks, tuple(history), net.weights)

    def _round(
        self, net: FunctionalModel, masks: Masks, data: Data, allocate: Allocation, keep: int
    ) -> tuple[Masks, Params]:
        inverse = self.inverse(net, masks, data)
        width = inverse.shape[-1]
        weights, alive = in_blocks(masks.apply(net.weights), width), in_blocks(dict(masks), width) > 0
        some = max(1, AT_ONCE // width**2)
        parts = list(zip(*(torch.split(t, some) for t in (inverse, weights, alive)), strict=True))
        scores = torch.cat([deletion_costs(*part) for part in parts])
        if not bool(scores.isfinite().all()):
            raise ScoreError("Optimal Brain Surgeon gave NaN or infinite scores: raise damping, or look at the loss.")
        left = allocate(by_name(scores, net.weights), masks, keep)
        pruned = alive & (in_blocks(dict(left), width) == 0)
        moved = [surgery(i, w, p) for (i, w, _), p in zip(parts, torch.split(pruned, some), strict=True)]
        return left, {n: w.to(net.dtype) for n, w in left.apply(by_name(torch.cat(moved), net.weights)).items()}

    def inverse(self, net: FunctionalModel, masks: Masks, data: Data) -> Tensor:
        """The inverse curvature at the masked weights, float64, (blocks, width, width); pruned weights stand apart."""
        total = masks.total
        width = total if self.curvature == "exact" else min(self.block or total, total)
        if self.curvature == "exact" and total > EXACT:
            raise ConfigError(
                f"The exact Hessian of {total:,} weights is out of reach (at most {EXACT:,}): take curvature='fisher'."
            )
        if (need := math.ceil(total / width) * width**2 * 8) > MEMORY:
            raise ConfigError(
                f"block={self.block} needs {need / 2**30:,.0f} GiB for {total:,} weights (at most "
                f"{MEMORY / 2**30:.0f}): take smaller blocks."
            )
        if self.curvature == "exact":
            return inverted(hessian(net, masks, data), self.damping)
        return inverse_fisher(net, masks, data, width, self.damping)


def deletion_costs(inverse: Tensor, weights: Tensor, alive: Tensor) -> Tensor:
    """L_q of every weight when its turn comes, deleting one after the other in each block; 0 for those not alive.

    Args:
        inverse: Inverse curvature (blocks, width, width).
        weights: (blocks, width).
        alive: Which of them there are (blocks, width), bool.
    """
    inverse, weights, alive = inverse.clone(), weights.clone(), alive.clone()
    costs, rows = torch.zeros_like(weights), torch.arange(len(weights), device=weights.device)
    last = torch.full_like(weights[:, 0], -1.0)
    tiny = torch.finfo(weights.dtype).tiny
    for _ in range(int(alive.sum(1).max())):
        pivots = inverse.diagonal(dim1=1, dim2=2).clamp(min=tiny)
        cost, q = (weights.square() / (2 * pivots)).masked_fill(~alive, math.inf).min(1)
        here = alive[rows, q]  # False in blocks of which nothing is left
        last = torch.maximum(cost, last.nextafter(torch.full_like(last, math.inf)))  # the order, even among equals
        costs[rows[here], q[here]] = last[here]
        column = inverse[rows, :, q] * here.unsqueeze(1)
        share = column / pivots[rows, q].unsqueeze(1)
        weights -= share * weights[rows, q].unsqueeze(1)
        inverse.baddbmm_(share.unsqueeze(2), column.unsqueeze(1), alpha=-1)
        alive[rows, q] = False
    return costs


def surgery(inverse: Tensor, weights: Tensor, pruned: Tensor) -> Tensor:
    """The weights after those in `pruned` are gone and the others have made up for them; shapes as `deletion_costs`."""
    gone = pruned.to(inverse.dtype)
    among = inverse * gone.unsqueeze(1) * gone.unsqueeze(2) + torch.diag_embed(1 - gone)
    pull = torch.linalg.solve(among, (weights * gone).unsqueeze(2))
    moved: Tensor = weights - (inverse @ pull).squeeze(2)
    return moved.masked_fill(pruned, 0.0)
