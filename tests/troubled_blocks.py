"""Blocks that have given wrong numbers without a word: the troubled half of `random_models`.

A module with an attribute `reference` computes, where that is True, the same function in a way that has no trouble.
`REFUSED` names those whose masks or tensors cannot be what is promised; all others may come out right.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from model_blocks import WIDTH, Block


class Layer(nn.Linear):
    """A linear layer that makes something of its weight first."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__(WIDTH, WIDTH)
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.made(self.weight), self.bias)


class LowRank(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.down, self.up = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


class Shift(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.1


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Renormalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(x)


class ByData(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.05, 0.05)
        return super().forward(x)


class Reader(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = weakref.ref(layer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer()(x)


def standardised(weight: Tensor) -> Tensor:
    return (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-5)


def rounded(offset: float) -> Callable[[Tensor], Tensor]:
    def quantised(weight: Tensor) -> Tensor:
        grid = (weight / 0.1 - offset).round() * 0.1 + 0.1 * offset
        return weight + (grid - weight).detach()

    return quantised


def parametrised(module: nn.Module) -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", module)
    return layer


def closure() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    plain = layer.forward
    layer.forward = lambda x: plain(x)
    return layer


def weak() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(layer, nn.Tanh(), Reader(layer))


def hooked() -> nn.Module:
    layer, other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    layer.other = other
    layer.register_forward_hook(lambda module, inputs, output: output + other(output))
    return layer


def bound() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    weight = layer.weight
    layer.forward = lambda x: F.linear(x, weight)
    return layer


class Square(torch.autograd.Function):
    """Right, with a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Once(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Detached(Square):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * g


class ByNumpy(Square):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        product = 2 * ctx.saved_tensors[0].detach().numpy() * g.detach().numpy()
        return torch.from_numpy(product)


class Squared(Block):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__(lambda block, x: x + block.square(block.a(x)))
        self.function, self.reference = function, False

    def square(self, x: Tensor) -> Tensor:
        return x * x if self.reference else self.function.apply(x)


class Recomputed(Block):
    def __init__(self, reentrant: bool) -> None:
        super().__init__(lambda block, x: block.recomputed(x))
        self.reentrant, self.reference = reentrant, False

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x))

    def recomputed(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.reference else checkpoint(self.inner, x, use_reentrant=self.reentrant)


class OwnNoise(Block):
    def __init__(self) -> None:
        super().__init__(lambda block, x: block.noisy(x))
        self.generator = torch.Generator().manual_seed(3)

    def noisy(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator).to(x)
        return self.a(x + 0.5 * noise)


class Auxiliary(Block):
    """A branch in training mode only."""

    def __init__(self) -> None:
        super().__init__(lambda block, x: block.a(x) + block.b(x) if block.training else block.a(x), 2)


def numpy_noise(block: Block, x: Tensor) -> Tensor:
    return block.a(x * torch.from_numpy(0.5 + np.random.rand(*x.shape)).to(x))


def dead(residual: bool) -> nn.Module:
    block = Block(lambda block, x: torch.relu(block.a(x)) + (block.b(x) if residual else 0), 1 + residual)
    nn.init.constant_(block.a.bias, -1000.0)
    return block


TROUBLES: dict[str, Callable[[], nn.Module]] = {
    "standardised": lambda: Layer(standardised),
    "low-rank delta": LowRank,
    "binary": lambda: Layer(lambda w: torch.where(w >= 0, 1.0, -1.0).to(w) + 0 * w),
    "quantised with an offset": lambda: Layer(rounded(0.5)),
    "quantised": lambda: Layer(rounded(0.0)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "shifted": lambda: parametrised(Shift()),
    "doubled": lambda: parametrised(Double()),
    "closure": closure,
    "bound parameter": bound,
    "weak reference": weak,
    "hook on another": hooked,
    "written in place": lambda: Renormalised(WIDTH, WIDTH),
    "written by .data": lambda: ByData(WIDTH, WIDTH),
    "function": lambda: Squared(Square),
    "function, once": lambda: Squared(Once),
    "function, detached": lambda: Squared(Detached),
    "function, numpy": lambda: Squared(ByNumpy),
    "checkpoint": lambda: Recomputed(False),
    "checkpoint, reentrant": lambda: Recomputed(True),
    "dropout as a function": lambda: Block(lambda block, x: block.a(F.dropout(x, 0.3))),
    "noise": lambda: Block(lambda block, x: block.a(x + 0.5 * torch.randn_like(x))),
    "noise by numpy": lambda: Block(numpy_noise),
    "noise of its own": OwnNoise,
    "detached branch": lambda: Block(lambda block, x: block.a(x) + block.b(x).detach(), 2),
    "detached": lambda: Block(lambda block, x: block.a(x).detach()),
    "training only": Auxiliary,
    "dead branch": lambda: dead(True),
    "dead": lambda: dead(False),
    "one logit": lambda: Block(lambda block, x: block.a(x)),
    "zero head": lambda: Block(lambda block, x: block.a(x)),
}

LOST = frozenset((
    "standardised", "low-rank delta", "binary", "quantised with an offset", "orthogonal", "weight_norm", "shifted",
))  # fmt: skip
"""A pruned parameter is not a weight that is gone."""

OUTSIDE = frozenset(("closure", "bound parameter", "weak reference", "hook on another"))
"""The forward runs on the user's own tensors."""

WRITING = frozenset(("written in place", "written by .data"))
"""The forward writes into a weight."""

REFUSED = LOST | OUTSIDE | WRITING
NOISY = frozenset(("dropout as a function", "noise", "noise by numpy", "noise of its own"))
