"""Blocks from vectors to vectors that every method has to score rightly: the ordinary half of `random_models`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 6

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
}


def normed(kind: str, dim: int) -> nn.Module:
    """A norm over vectors (dim 1) or over maps (dim 2)."""
    batch = nn.BatchNorm1d if dim == 1 else nn.BatchNorm2d
    return {
        "none": nn.Identity,
        "batch": lambda: batch(WIDTH),
        "plain batch": lambda: batch(WIDTH, affine=False, momentum=None),
        "open batch": lambda: batch(WIDTH, track_running_stats=False),
        "group": lambda: nn.GroupNorm(2, WIDTH),
        "layer": lambda: nn.LayerNorm(WIDTH) if dim == 1 else nn.GroupNorm(1, WIDTH),
        "rms": lambda: nn.RMSNorm(WIDTH) if dim == 1 else nn.InstanceNorm2d(WIDTH, affine=True),
    }[kind]()


class Block(nn.Module):
    """One or two linear layers, and a function of them."""

    def __init__(self, run: Callable[[Block, Tensor], Tensor], layers: int = 1, **options: Any) -> None:
        super().__init__()
        self.run = run
        self.a = nn.Linear(WIDTH, options.get("width", WIDTH), bias=options.get("bias", True))
        if layers == 2:
            self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Kept(Block):
    """A block with tensors of every kind that its forward reads and writes."""

    def __init__(self) -> None:
        super().__init__(Kept.counted)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
        self.table, self.calls, self.seen = torch.linspace(0.5, 1.5, WIDTH), 0, {}

    def counted(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.calls += 1
        self.seen["last"] = x.detach()
        return self.a(x * self.table.to(x))


class Hooked(Block):
    """Hooks before and after a layer, one of them a method of the block."""

    def __init__(self) -> None:
        super().__init__(lambda block, x: block.a(x))
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.a.register_forward_hook(self.amplify)
        self.a.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))

    def amplify(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.gain + 0.1


class Otherwise(Block):
    """A block in another precision than the rest; it asks its weight for it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(lambda block, x: block.a(x.to(block.a.weight.dtype)).to(x.dtype))
        self.own = dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Keeps its own precision in a `model.to(dtype)`."""
        super()._apply(fn, recurse)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self.own)
        return self


class Tied(nn.Module):
    """One weight in two layers, and once more transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(torch.tanh(self.a(x))), self.a.weight.t())


class TwiceNormed(nn.Module):
    """A BatchNorm that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.b(torch.relu(self.bn(self.a(x)))))


class Scaled(Block):
    """LayerScale, initialised as it is in the field."""

    def __init__(self) -> None:
        super().__init__(lambda block, x: x + block.gamma * block.a(x))
        self.gamma = nn.Parameter(torch.full((WIDTH,), 1e-5))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x, x) + x


def frozen() -> nn.Module:
    return Block(lambda block, x: block.b(torch.tanh(block.a(x))), 2).requires_grad_(False)


def half_frozen() -> nn.Module:
    block = Block(lambda block, x: block.b(torch.tanh(block.a(x))), 2)
    block.a.weight.requires_grad_(False)
    return block


def frozen_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).eval().requires_grad_(False)


def by_value(block: Block, x: Tensor) -> Tensor:
    return block.a(x) if float(x.sum()) > 0 else -block.a(-x)


def in_pieces(block: Block, x: Tensor) -> Tensor:
    rows = [F.linear(x, part) for part in block.a.weight.split(2)]
    return torch.cat(rows, 1) + block.a.bias


def by_columns(block: Block, x: Tensor) -> Tensor:
    return sum(x[:, i : i + 1] * block.a.weight[:, i] for i in range(WIDTH)) + block.a.bias


def by_group(block: Block, x: Tensor) -> Tensor:
    weight = block.a.weight.view(2, 3, WIDTH)
    return torch.bmm(x.expand(2, *x.shape), weight.mT).transpose(0, 1).flatten(1)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Block(lambda block, x: block.a(x), bias=False),
    "residual": lambda: Block(lambda block, x: x + block.b(torch.relu(block.a(x))), 2),
    "concatenated rows": lambda: Block(lambda block, x: torch.cat([block.a(x)[:, :3], block.b(x)[:, 3:]], 1), 2),
    "gated unit": lambda: Block(lambda block, x: F.glu(block.a(x)), width=2 * WIDTH),
    "gate": lambda: Block(lambda block, x: x * torch.sigmoid(block.a(x))),
    "shared": lambda: Block(lambda block, x: block.a(torch.tanh(block.a(x)))),
    "tied": Tied,
    "frozen": frozen,
    "half frozen": half_frozen,
    "frozen norm": frozen_norm,
    "hooked": Hooked,
    "counters": Kept,
    "double": lambda: Otherwise(torch.float64),
    "half": lambda: Otherwise(torch.float16),
    "bfloat": lambda: Otherwise(torch.bfloat16),
    "einsum": lambda: Block(lambda block, x: torch.einsum("bi,oi->bo", x, block.a.weight) + block.a.bias),
    "matrix product": lambda: Block(lambda block, x: torch.addmm(block.a.bias, x, block.a.weight.t())),
    "in pieces": lambda: Block(in_pieces),
    "by columns": lambda: Block(by_columns),
    "by group": lambda: Block(by_group, bias=False),
    "by value": lambda: Block(by_value),
    "normalised twice": TwiceNormed,
    "layer scale": Scaled,
    "bilinear": Bilinear,
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH)),
    "listed": lambda: Block(lambda block, x: torch.stack([block.a(x), block.b(x)]).mean(0), 2),
    "normalised input": lambda: Block(lambda block, x: block.a(F.normalize(x, dim=1))),
}
