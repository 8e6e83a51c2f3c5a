"""Optimal Brain Damage: the second-order change of the loss at a minimum (LeCun, Denker, Solla 1989).

Formula: s_j = h_jj w_j^2 / 2, with h_jj the diagonal of the Hessian of the loss summed over all samples, at the
effective weights: what removing w_j adds to the loss where the gradient vanishes and weights do not interact.

Three diagonals:

* `"fisher"`, the default: sum over samples of the squared gradient, the empirical Fisher information. Positive, as the
  paper's Levenberg-Marquardt approximation is on purpose, and near it for a log-likelihood at a good fit. One forward
  and backward pass a sample.
* `"hutchinson"`: z * (H z), averaged over `probes` draws of random signs z (Bekas, Kokiopoulou, Saad 2007). Unbiased,
  with a variance of sum_{k != j} h_jk^2 / probes. One Hessian-vector product a probe and batch.
* `"exact"`: one backward pass a weight and batch, so for small networks only.

The last two may be negative away from a minimum; the sign is kept, and what lowers the loss goes first. Made for
trained networks, in steps between which training goes on.

Departure: the paper finds its diagonal by a backward recursion of its own, layer by layer; here autograd does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Batch, Data
from sapwood.criteria.derivatives import sample_gradients, twice_differentiable
from sapwood.errors import ConfigError, UnsupportedModelError, unknown_name
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks

DIAGONALS = ("fisher", "hutchinson", "exact")
EXACT_LIMIT = 10_000  # weights: a few seconds on one core for a small network


@dataclass(frozen=True)
class OptimalBrainDamage:
    """h_jj w^2 / 2.

    Attributes:
        diagonal: How h_jj is found: "fisher", "hutchinson" or "exact".
        probes: Random vectors of "hutchinson".
        batch_statistics: BatchNorm normalises with each batch's statistics (else with the running ones).
    """

    diagonal: str = "fisher"
    probes: int = 32
    batch_statistics: bool = True

    def __post_init__(self) -> None:
        if self.diagonal not in DIAGONALS:
            raise unknown_name("diagonal", self.diagonal, DIAGONALS)
        if self.probes < 1:
            raise ConfigError(f"probes is {self.probes}; it must be 1 or more.")

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight; pruned ones get 0."""
        weights = masks.apply(net.weights)
        curvature = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        find = {"fisher": self._fisher, "hutchinson": self._hutchinson, "exact": self._exact}[self.diagonal]
        draws = generator.get_state()
        for batch, count in net.counted(data.labelled()):
            generator.set_state(draws)  # the same probes for all batches, so that they probe the sum of their Hessians
            for name, part in find(net, masks, batch, count, generator).items():
                curvature[name] += part
        return {name: h * weights[name].square() / 2 for name, h in net.summed(curvature).items()}

    def _fisher(
        self, net: FunctionalModel, masks: Masks, batch: Batch, count: float, generator: torch.Generator
    ) -> Params:
        total = {name: torch.zeros_like(weight) for name, weight in net.weights.items()}
        for gradient in sample_gradients(net, masks, batch, batch_statistics=self.batch_statistics):
            for name, g in gradient.items():
                total[name] += g.square()
        return total

    def _hutchinson(
        self, net: FunctionalModel, masks: Masks, batch: Batch, count: float, generator: torch.Generator
    ) -> Params:
        total = {name: torch.zeros_like(weight) for name, weight in net.weights.items()}
        with twice_differentiable(net, batch):
            leaves, gradient = self._gradient(net, masks, batch, count)
            for _ in range(self.probes):
                signs = {name: _signs(leaf, generator) for name, leaf in leaves.items()}
                for name, product in _vector_product(net, gradient, leaves, signs).items():
                    total[name] += signs[name] * product / self.probes
        return total

    def _exact(
        self, net: FunctionalModel, masks: Masks, batch: Batch, count: float, generator: torch.Generator
    ) -> Params:
        weights = sum(weight.numel() for weight in net.weights.values())
        if weights > EXACT_LIMIT:
            raise UnsupportedModelError(
                f"The exact diagonal takes one backward pass a weight and batch, and the model has {weights:,} "
                f"prunable weights; the limit is {EXACT_LIMIT:,}. Use diagonal='fisher' or 'hutchinson', or exclude "
                "layers."
            )
        total = {name: torch.zeros_like(weight) for name, weight in net.weights.items()}
        with twice_differentiable(net, batch):
            leaves, gradient = self._gradient(net, masks, batch, count)
            for name, leaf in leaves.items():
                flat = total[name].view(-1)
                for j, g in enumerate(gradient[name].flatten()):
                    flat[j] = _vector_product(net, {name: g}, {name: leaf})[name].flatten()[j]
        return total

    def _gradient(self, net: FunctionalModel, masks: Masks, batch: Batch, count: float) -> tuple[Params, Params]:
        """Leaves and the gradient of the summed loss in them, with its graph."""
        leaves = net.leaves(masks)
        loss = net.loss(leaves, batch, train=self.batch_statistics) * count
        return leaves, net.differentiate(loss, leaves, create_graph=True)


def _vector_product(net: FunctionalModel, gradient: Params, leaves: Params, vector: Params | None = None) -> Params:
    """The Hessian times a vector (of ones); zero where the gradient depends on no leaf, as for a linear loss."""
    products = [g if vector is None else (g * vector[name]).sum() for name, g in gradient.items() if g.requires_grad]
    if not products:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return net.differentiate_again(torch.stack(products).sum(), leaves)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Minus or plus one with equal probability."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)
