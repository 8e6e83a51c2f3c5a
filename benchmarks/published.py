"""NTK-SAP as its authors' procedure goes, written straightforwardly: what Sapwood's estimator is timed against.

Layers multiply weight and mask in every forward pass; a deep copy of the network holds the perturbed weights. For each
mini-batch all weights are drawn anew; one train-mode pass with BatchNorm momentum 1 sets the running statistics; both
networks run in eval mode with them; one backward pass goes through both graphs. Between rounds the lowest scores are
cut off at the k-th smallest. Draws come in Sapwood's order, so that equal generators give equal scores.

Written from the paper and from a description of the authors' program; no line of that program is here.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

Masks = dict[str, Tensor]


class Masked(nn.Module):
    """weight -> weight * mask, for weights that no layer's own forward multiplies (attention's)."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight."""
        return weight * self.mask


def search(  # noqa: PLR0913  # the budget of a search
    model: nn.Module,
    names: list[str],
    density: float,
    *,
    rounds: int,
    resamples: int,
    samples: int,
    batch_size: int,
    input_shape: tuple[int, ...],
    epsilon: float = 1e-4,
    seed: int = 0,
) -> Masks:
    """Masks of the parameters `names`: `rounds` times score and cut, with an exponential schedule.

    Returns:
        Tensors of zeros and ones by name.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(batch_size, samples - start) for start in range(0, samples, batch_size)] * resamples
    masks = {name: torch.ones_like(model.get_parameter(name)) for name in names}
    for index in range(1, rounds + 1):
        signed = scores(model, masks, sizes, input_shape, generator, epsilon)
        masks = _cut(masks, {name: (signed[name] * masks[name]).abs() for name in masks}, density ** (index / rounds))
    return masks


def scores(
    model: nn.Module,
    masks: Masks,
    sizes: list[int],
    input_shape: tuple[int, ...],
    generator: torch.Generator,
    epsilon: float = 1e-4,
) -> dict[str, Tensor]:
    """Signed gradients with respect to the masks, summed over mini-batches of the given sizes."""
    leaves = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
    clean, perturbed = copy.deepcopy(model), copy.deepcopy(model)
    weights, moved = ({name: network.get_parameter(name) for name in masks} for network in (clean, perturbed))
    norms = [_norms(network) for network in (clean, perturbed)]
    for network in (clean, perturbed):
        network.requires_grad_(False)
        for name, mask in leaves.items():
            _mask(network, name, mask)
    for samples in sizes:
        with torch.no_grad():
            for weight in weights.values():
                weight.copy_(_normal(weight.shape, weight, generator) * (2 / weight[0].numel()) ** 0.5)
            inputs = _normal((samples, *input_shape), next(iter(weights.values())), generator)
            for name, weight in weights.items():
                moved[name].copy_(weight + _normal(weight.shape, weight, generator) * epsilon**0.5)
            _statistics_mode(clean)
            clean(inputs)
        for ours, theirs in zip(*norms, strict=True):
            theirs.load_state_dict(ours.state_dict())
        change = (clean.eval()(inputs) - perturbed.eval()(inputs)).square().sum()
        change.backward()
    return {name: mask.grad for name, mask in leaves.items()}


def _norms(network: nn.Module) -> list[nn.Module]:
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    return norms


def _statistics_mode(network: nn.Module) -> None:
    network.eval()
    for norm in _norms(network):
        norm.train()


def _mask(network: nn.Module, name: str, mask: Tensor) -> None:
    """Multiplies a weight with its mask wherever the network uses it."""
    owner, _, leaf = name.rpartition(".")
    layer = network.get_submodule(owner)
    if type(layer) is nn.Conv2d:
        layer.forward = lambda x: layer._conv_forward(x, layer.weight * mask, layer.bias)
    elif type(layer) is nn.Linear:
        layer.forward = lambda x: F.linear(x, layer.weight * mask, layer.bias)
    else:
        parametrize.register_parametrization(layer, leaf, Masked(mask), unsafe=True)


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype)


def _cut(masks: Masks, found: dict[str, Tensor], density: float) -> Masks:
    flat = torch.cat([score.flatten() for score in found.values()])
    remove = int((1 - density) * flat.numel())
    if not remove:
        return masks
    threshold = torch.kthvalue(flat, remove).values
    return {name: mask * (found[name] > threshold) for name, mask in masks.items()}
