"""Layers by themselves: what can be seen of a model of which no input is known.

A layer of torch's own class, without hooks, parametrization or a forward of its own, applies its weight as it is. Any
other is run alone, on an input of the shape that its base class takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from sapwood.errors import SapwoodError, SapwoodWarning, ZerosLostError
from sapwood.isolation import RandomState, skeleton
from sapwood.prunable import all_weights
from sapwood.witness.applied import Applied
from sapwood.witness.masking import half_pruned, masked_like, written_into

Inputs = tuple[Tensor, ...]


def look_at_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Runs the layers of the named weights one by one, under masks.

    Warns of those that do not run by themselves, and of weights that are no layer's.

    Raises:
        UnsupportedModelError: zeros of a weight are lost before it is applied, or its layer writes into it.
    """
    unseen: list[str] = []
    for layer, named in _layers(model, names):
        unseen += _unseen(layer, named, {name: half_pruned(tensor) for name, tensor in named.items()})

    if unseen:
        warnings.warn(
            f"It could not be checked that zeros of {unseen[0]!r} ({len(unseen)} such weights) are zeros of what is "
            "applied, because the layer does not run by itself: give input_shape= or batches=.",
            SapwoodWarning,
            stacklevel=5,
        )


def refuse_lost_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuses masks whose zeros a layer loses before it applies its weight; of layers that do not run alone, nothing.

    Args:
        model: The module; nothing of it changes, nor does the random state.
        masks: What is kept, by clean name.

    Raises:
        ZerosLostError: zeros of a weight are lost.
    """
    for layer, named in _layers(model, masks):
        before = RandomState.now(next(iter(named.values())).device)
        try:
            _unseen(layer, named, {name: masks[name].logical_not().to(t.device) for name, t in named.items()})
        except ZerosLostError:
            raise
        except SapwoodError:  # it cannot be copied, runs on tensors elsewhere, or writes into its weight
            continue
        finally:
            before.restore()


def _layers(model: nn.Module, names: Iterable[str]) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """The layers that are not torch's own as it made them, each with those of the named weights that it owns."""
    wanted = set(names)
    found: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}
    for weight in all_weights(model):
        for owner in weight.owners:
            if weight.name in wanted and not _is_plain(owner):
                found.setdefault(id(owner), (owner, {}))[1][weight.name] = weight.tensor
    return list(found.values())


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is torch's own and as torch made it."""
    own = type(layer).__module__.startswith("torch.nn.modules.")
    hooks = layer._forward_pre_hooks or layer._forward_hooks
    return own and "forward" not in vars(layer) and not hooks


def _unseen(layer: nn.Module, named: dict[str, Tensor], pruned: dict[str, Tensor]) -> list[str]:
    """Names of the weights of a layer that did not arrive anywhere when it ran alone."""
    local = {id(tensor): name for name, tensor in layer.named_parameters()}
    weights = {name: _readable(tensor) for name, tensor in named.items()}
    masked = {name: masked_like(weight, pruned[name]) for name, weight in weights.items()}
    copy = skeleton(layer).eval()

    for inputs in _inputs(layer, next(iter(weights.values()))):
        given = {name: weight.clone() for name, weight in masked.items()}
        state = {name: _readable(t).clone() for name, t in (*layer.named_parameters(), *layer.named_buffers())}
        state |= {local[id(named[name])]: weight for name, weight in given.items()}
        watch = Applied(given, pruned, inputs, {id(tensor): local[id(tensor)] for tensor in layer.parameters()})
        try:
            with torch.no_grad(), watch:
                functional_call(copy, state, inputs)
        except SapwoodError:
            raise
        except Exception:  # not its input: the next, or it does not run alone
            continue
        written_into(given, masked, given)
        return [name for name in named if name not in watch.seen]
    return list(named)


def _readable(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.is_floating_point() else tensor.detach()


def _inputs(layer: nn.Module, weight: Tensor) -> list[Inputs]:
    """Inputs that a layer of its kind takes, two samples each; several where its kind does not say."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=weight.device)

    if isinstance(layer, _ConvNd):
        sides = [d * (k - 1) + s + 1 for d, k, s in zip(layer.dilation, layer.kernel_size, layer.stride, strict=True)]
        return [(random(2, layer.in_channels, *sides),)]
    if isinstance(layer, nn.Linear):
        return [(random(2, layer.in_features),)]
    if isinstance(layer, nn.Bilinear):
        return [(random(2, layer.in1_features), random(2, layer.in2_features))]
    if isinstance(layer, nn.MultiheadAttention):
        return [tuple(random(3, 2, width) for width in (layer.embed_dim, layer.kdim, layer.vdim))]
    if isinstance(layer, nn.RNNBase):
        return [(random(3, 2, layer.input_size)[:, :2],)]
    if isinstance(layer, nn.RNNCellBase):
        return [(random(2, layer.input_size),)]
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return [(torch.zeros(2, 3, dtype=torch.long, device=weight.device),)]
    return [(random(2, width),) for width in weight.shape[:2]]
