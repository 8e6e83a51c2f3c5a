"""Moments by brute force: many draws of weights, inputs and perturbations through the real module, in float64."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from sapwood import FunctionalModel, Masks
from sapwood.moments import Moments


class Frozen(nn.Module):
    """BatchNorm on its batch's statistics, which are constants: forward- and reverse-mode both pass them by."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        mean = x.detach().mean(axes, keepdim=True)
        variance = (x.detach() - mean).square().mean(axes, keepdim=True)
        return (x - mean) / (variance + self.eps).sqrt()


def frozen(model: nn.Module) -> nn.Module:
    """A copy of the model with every BatchNorm replaced."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Frozen(module))
    return model


class Draws:
    """Draws of weights, directions and inputs for a network under masks.

    Args:
        model: The network, float64.
        shape: One sample's shape.
        masks: Masks of its prunable weights.
        draws: Number of weight draws.
        batch: Inputs for each.
        exclude: Patterns of layers that are neither masked nor perturbed.
    """

    def __init__(self, model: nn.Module, shape, masks: Masks, draws: int, batch: int, exclude: Iterable = ()) -> None:
        net = FunctionalModel.of(model, exclude=exclude)
        generator = torch.Generator().manual_seed(11)
        self.model = frozen(model).eval()
        self.masks = {name: mask.double() for name, mask in masks.items()}
        self.chunk = max(1, 1024 // batch)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.weights = {n: normal(draws, *net.params[n].shape) * (2 / fan) ** 0.5 for n, fan in net.fan_in.items()}
        self.directions = {n: normal(draws, *net.params[n].shape) for n in net.prunable}
        self.inputs = normal(draws, batch, *shape)

    def run(self, weights: dict[str, Tensor], inputs: Tensor, masks: dict[str, Tensor]) -> Tensor:
        effective = {n: w * masks[n] if n in masks else w for n, w in weights.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
            return functional_call(self.model, effective, (inputs,))

    def values(self) -> tuple[Tensor, Tensor]:
        """The output and its directional derivative: (draws, batch, ...)."""

        def one(weights: dict[str, Tensor], directions: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
            tangent = {n: directions.get(n, torch.zeros_like(w)) for n, w in weights.items()}
            return jvp(lambda w: self.run(w, inputs, self.masks), (weights,), (tangent,))

        return vmap(one, chunk_size=self.chunk)(self.weights, self.directions, self.inputs)

    def gradients(self) -> dict[str, Tensor]:
        """DF/dm of the limit, for each draw: (draws, *weight)."""

        def objective(masks, weights, directions, inputs) -> Tensor:
            tangent = {n: directions.get(n, torch.zeros_like(w)) for n, w in weights.items()}
            change = jvp(lambda w: self.run(w, inputs, masks), (weights,), (tangent,))[1]
            return change.square().sum() / len(inputs)

        per_draw = vmap(grad(objective), in_dims=(None, 0, 0, 0), chunk_size=self.chunk)
        return per_draw(self.masks, self.weights, self.directions, self.inputs)


def moments(values: Tensor, changes: Tensor, channel: int) -> dict[str, Tensor]:
    """Estimates with positions last: (channels, positions) each. `channel` counts the batch axis, as `Moments` does."""
    # (draws, batch, channels, positions)
    a, d = (t.movedim(channel + 1, 2).reshape(*t.shape[:2], t.shape[channel + 1], -1) for t in (values, changes))
    count = a.shape[3]
    other = a.roll(1, 1).mean(3, keepdim=True)  # another sample of the same draw, averaged over positions
    estimates = {"raw": a.square(), "mean": a, "pair": a * other, "td": d.square()}
    if count > 1:
        estimates["to"] = d * (d.sum(3, keepdim=True) - d) / (count - 1)
    return {name: estimate.mean((0, 1)) for name, estimate in estimates.items()}


def of(x: Moments) -> dict[str, Tensor]:
    """The closed form in the same layout."""
    pair = x.pair(x.clean)
    found = {"raw": x.clean.raw, "mean": x.clean.mean, "pair": pair, "td": x.td, "to": x.to}
    zero = torch.zeros_like(x.clean.raw)
    full = {name: (zero if m is None else m).expand(x.shape) for name, m in found.items()}
    return {name: m.detach().movedim(x.channels[0], 0).reshape(x.shape[x.channels[0]], -1) for name, m in full.items()}
