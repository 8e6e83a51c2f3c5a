"""Gates on channels, moved behind the norms that would undo them.

A gate is a factor on a channel of a layer's output; the gradient in it says what the channel does for the loss. Behind
the layer itself that is the sum of w dL/dw over the channel. But a norm that treats every channel by itself takes its
scale out again, and then the sum is 0, whatever the channel does: there the gate belongs behind the norm.

Which norm channel follows which channel of a layer is found by looking, once, whatever lies between (a reshape, a
concatenation, dropout, a rectifier, pooling, nothing): the model runs with random positive weights, cut behind every
norm, and every channel of a layer is scaled by a number of its own. Where the input of a norm's channel changes, up to
a constant, by one of these numbers times itself, it consists of that channel alone. A norm may follow another one, of
which it undoes the gates in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sapwood.batches import Data, filled
from sapwood.criteria.channels import channel_of, channel_sums, layout_of
from sapwood.criteria.derivatives import plain_kernels
from sapwood.errors import DataError, UnsupportedModelError
from sapwood.functional import FunctionalModel, Params, differentiating
from sapwood.masks import Masks
from sapwood.prunable import Layout
from sapwood.witness.rows import shortened

SAMPLES = 4  # of the look: enough that no two channels are proportional by chance
EACH_CHANNEL = (F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm)
VECTOR = Layout(output=0, groups=1)
GROUPS = (F.group_norm, torch.group_norm)  # each channel by itself if there are as many groups


@dataclass(frozen=True, eq=False)
class Following:
    """A norm whose input consists of the channels of a layer, or of an earlier norm.

    Attributes:
        source: A weight's name, or the number of an earlier norm.
        gates: Channels of the source.
        norm: The norm's number, in the order of the calls of a forward pass.
        channel: For each channel of the norm that of the source, -1 where it follows none.
        shift: The constant in each of the norm's channels that does not scale with it (a bias); 0 where there is none.
    """

    source: str | int
    gates: int
    norm: int
    channel: Tensor
    shift: Tensor


@dataclass(frozen=True)
class NormGates:
    """Where the gates of a model's channels stand.

    Attributes:
        norms: Calls of norms of single channels in a forward pass.
        followings: What they follow.
    """

    norms: int
    followings: tuple[Following, ...]

    @classmethod
    def of(cls, net: FunctionalModel, data: Data, generator: torch.Generator) -> NormGates:
        """Looks at a model, in float64.

        Args:
            net: The model.
            data: Batches, whose first inputs are taken; their values hardly matter.
            generator: Of the random weights.
        """

        def positive(like: Tensor) -> Tensor:
            return torch.rand(like.shape, generator=generator, device=net.device, dtype=torch.float64)

        inputs = shortened(net, data.inputs()[0], SAMPLES)
        with suppress(DataError):  # of several tensors, it is not known which are numbers: they stay
            inputs = filled(inputs, lambda t: t.double().abs() * (1 + positive(t)), data.draw)
        leaves = {}
        for name, weight in net.weights.items():
            fan_in = weight.numel() // weight.shape[layout_of(net, name).output % weight.dim()]
            leaves[name] = (2 / fan_in * positive(weight)).requires_grad_()

        found: list[Following] = []
        with plain_kernels(net), differentiating():
            with _Cut() as cut:
                net.run({**_double(net.params), **leaves}, inputs, buffers=_double(net.own_buffers()), train=True)
            for index, x in enumerate(cut.inputs):
                if x.requires_grad:
                    found += _followed(net, leaves, cut.gates[:index], x, index)
        return cls(cut.calls, tuple(found))

    def gradients(self, net: FunctionalModel, masks: Masks, loss: Callable[[Params], Tensor]) -> tuple[Params, Params]:
        """The gradient of a loss in the gates, one entry a channel, by weight; and w dL/dw, for its size.

        Args:
            net: The model.
            masks: Masks of the effective weights.
            loss: The loss as a function of the effective weights; one forward pass.

        Raises:
            UnsupportedModelError: the forward pass does not call the norms that it called when it was looked at.
        """
        leaves = net.leaves(masks)
        ones = net.weights[net.prunable[0]].new_ones
        gates = {f"gate {i}": ones(f.gates).requires_grad_() for i, f in enumerate(self.followings)}
        with _Moved(self.followings, list(gates.values())) as moved:
            value = loss(leaves)
        if moved.calls != self.norms:
            raise _unsteady()

        gradient = net.differentiate(value, {**leaves, **gates})
        changes = {name: weight.detach() * gradient[name] for name, weight in leaves.items()}
        further = _further(self.followings, [gradient[name] for name in gates])
        sums = {}
        for name, change in changes.items():
            own = channel_sums(change, layout_of(net, name))
            sums[name] = own + further[name] if name in further else own
        return sums, changes


class _AtNorms(TorchFunctionMode):
    """A context that sees the calls of norms of single channels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hands such a call on to `norm`, makes all others."""
        kwargs = kwargs or {}
        if not _normalises_channels(func, args, kwargs):
            return func(*args, **kwargs)
        self.calls += 1
        if args:
            return self.norm(args[0], lambda x: func(x, *args[1:], **kwargs))
        return self.norm(kwargs["input"], lambda x: func(**{**kwargs, "input": x}))

    def norm(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """What the call gives; `self.calls` is its number, from 1."""
        raise NotImplementedError


class _Cut(_AtNorms):
    """Norms hand on gates, one on each channel, times numbers that depend on nothing; their inputs are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.gates: list[Tensor] = []

    def norm(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Cuts."""
        gate = torch.ones(x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        self.inputs.append(x.clone())  # what comes may change x in place
        self.gates.append(gate)
        return x.detach().abs() * _spread(gate, x)


class _Moved(_AtNorms):
    """Every gate stands behind its norm, and, since it would have been there, is taken out in front of it."""

    def __init__(self, followings: Sequence[Following], gates: Sequence[Tensor]) -> None:
        super().__init__()
        self.pairs = list(zip(followings, gates, strict=True))

    def norm(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Makes the call between the two gates, which are ones."""
        behind = torch.ones((), dtype=x.dtype, device=x.device)
        for following, gate in self.pairs:
            if following.norm != self.calls - 1:
                continue
            if len(following.channel) != x.shape[1]:
                raise _unsteady()
            here = torch.where(following.channel >= 0, gate[following.channel.clamp(min=0)], 1.0)
            spread = _spread(here, x)
            x = x - (x - _spread(following.shift.to(x.dtype), x)) * (spread - 1)
            behind = behind * spread
        return call(x) * behind


def _followed(
    net: FunctionalModel, leaves: Params, gates: Sequence[Tensor], x: Tensor, index: int
) -> Iterator[Following]:
    """What the norm with input x follows, of the layers and the norms before it.

    The derivative of x along a scaling of the sources is the derivative, in a dummy, of that of x times the dummy.
    """
    sources: dict[str | int, Tensor] = dict(enumerate(gates))
    sources.update(leaves)
    dummy = torch.zeros_like(x, requires_grad=True)
    gradients = torch.autograd.grad(x, list(sources.values()), dummy, create_graph=True, allow_unused=True)
    for (source, value), gradient in zip(sources.items(), gradients, strict=True):
        if gradient is None or not gradient.requires_grad:
            continue
        channel = channel_of(value, layout_of(net, source) if isinstance(source, str) else VECTOR)
        count = int(channel.max()) + 1
        factors = 1 + torch.arange(count, dtype=x.dtype, device=x.device) / count
        scaled = (factors[channel] * value.detach() * gradient).sum()
        (change,) = torch.autograd.grad(scaled, dummy, retain_graph=True)
        following = _matched(x.detach(), change, factors)
        if bool((following[0] >= 0).any()):
            yield Following(source, count, index, *following)


def _matched(x: Tensor, change: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """For each channel of x the number of the factor that it changes by, or -1; and the constant that does not."""
    rows, changes = x.movedim(1, 0).flatten(1), change.movedim(1, 0).flatten(1)
    mean, drift = rows.mean(1, keepdim=True), changes.mean(1, keepdim=True)
    rows, changes = rows - mean, changes - drift
    power = rows.square().sum(1)
    ratio = (rows * changes).sum(1) / power.clamp(min=torch.finfo(x.dtype).tiny)
    count = len(factors)
    nearest = ((ratio - 1) * count).nan_to_num().round().clamp(0, count - 1).long()
    factor = factors[nearest].unsqueeze(1)
    error = (changes - factor * rows).square().sum(1).sqrt()
    fits = (power > 0) & (error <= min(1e-3, 0.1 / count) * power.sqrt())
    shift = (mean - drift / factor).squeeze(1)
    return torch.where(fits, nearest, -1), torch.where(fits, shift, 0.0)


def _further(followings: Sequence[Following], gradients: Sequence[Tensor]) -> dict[str | int, Tensor]:
    """What the gates behind norms add for each source: those of the norms that follow it, and so on behind these."""
    total: dict[str | int, Tensor] = {}
    for following, gradient in sorted(
        zip(followings, gradients, strict=True), key=lambda pair: pair[0].norm, reverse=True
    ):
        behind = gradient.clone()
        if following.norm in total:
            some = following.channel >= 0
            behind.index_put_((following.channel[some],), total[following.norm][some], accumulate=True)
        total[following.source] = total.get(following.source, torch.zeros_like(behind)) + behind
    return total


def _double(tensors: Params) -> Params:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def _normalises_channels(func: Any, args: Any, kwargs: Any) -> bool:
    if func in EACH_CHANNEL:
        return True
    if func not in GROUPS:
        return False
    x = args[0] if args else kwargs["input"]
    groups = args[1] if len(args) > 1 else kwargs["num_groups"]
    return bool(groups == x.shape[1])


def _spread(vector: Tensor, x: Tensor) -> Tensor:
    """One number a channel, in the shape that multiplies x."""
    return vector.reshape(1, -1, *[1] * (x.dim() - 2))


def _unsteady() -> UnsupportedModelError:
    return UnsupportedModelError(
        "The model does not call the same normalisations in every forward pass (does its forward depend on values, or "
        "on chance?), so that its channels cannot be followed through them: take structure='weights'."
    )
