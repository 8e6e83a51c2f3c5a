"""Small models drawn at random: a body for a kind of input, a trunk of blocks, a head, and ways to call it.

A `Recipe` holds plain values, so that a failing example prints as one line from which `build` makes the model again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from model_blocks import ACTIVATIONS, BLOCKS, WIDTH, normed
from troubled_blocks import TROUBLES

CLASSES, SAMPLES = 3, 8
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """What a model is made of.

    Attributes:
        body: What the inputs are: "rows", "images", "series", "recurrent", "cell", "attention", "transformer",
            "tokens" or "bags".
        maps: Blocks on feature maps, for images only.
        trunk: Blocks on vectors, ordinary ones and at most two troubled ones.
        norm: What follows each block.
        activation: And then.
        output: "tensor", "tuple" or "object" (with .logits).
        call: "pairs" (input, target), or "mapping" of two inputs and labels.
        dtype: Of all parameters and inputs.
        train: The mode in which the model comes.
        seed: Of its weights.
    """

    body: str
    maps: tuple[str, ...]
    trunk: tuple[str, ...]
    norm: str
    activation: str
    output: str
    call: str
    dtype: str
    train: bool
    seed: int

    @property
    def troubles(self) -> frozenset[str]:
        return frozenset(self.trunk) & frozenset(TROUBLES)

    @property
    def features(self) -> frozenset[str]:
        """Everything that it has, in words."""
        words = {self.body, f"norm {self.norm}", self.activation, self.output, self.call, self.dtype, *self.trunk}
        return frozenset(words | set(self.maps if self.body == "images" else ()))


class Split(nn.Module):
    """Two ways side by side, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(WIDTH, 2, 3, padding=1), nn.Conv2d(WIDTH, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def twice(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), layer)


MAPS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
    "residual convolution": lambda: Residual(nn.Conv2d(WIDTH, WIDTH, 3, padding=1)),
    "concatenated": Split,
    "grouped": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(WIDTH, 4, 2, stride=2, groups=2), nn.AvgPool2d(2), nn.Conv2d(4, WIDTH, 1)
    ),
    "shared convolution": lambda: twice(nn.Conv2d(WIDTH, WIDTH, 1)),
    "circular": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular"),
    "strided": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 2, stride=2), nn.Upsample(scale_factor=2)),
    "max-pooled": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.MaxPool2d(3, 1, 1)),
}


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(4, WIDTH, batch_first=True, bidirectional=kind is nn.GRU)
        self.out = nn.Linear(WIDTH * (2 if kind is nn.GRU else 1), WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), WIDTH)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


class Attention(nn.Module):
    """Multi-head attention of torch's own, then one written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mha = nn.Linear(4, WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.mha(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.einsum("bqk,bkc->bqc", (q @ k.mT / 2).softmax(-1), v).mean(1)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.embed(x)).mean(1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.embed(x)).mean(1)


def images(recipe: Recipe) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3, padding=1)]
    for name in recipe.maps:
        layers += [MAPS[name](), normed(recipe.norm, 2), ACTIVATIONS[recipe.activation]()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


BODIES: dict[str, tuple[Callable[[Recipe], nn.Module], tuple[int, ...]]] = {
    "rows": (lambda _: nn.Linear(5, WIDTH), (5,)),
    "images": (images, (3, 6, 6)),
    "series": (lambda _: nn.Sequential(nn.Conv1d(3, WIDTH, 3), nn.AdaptiveMaxPool1d(1), nn.Flatten()), (3, 7)),
    "recurrent": (lambda r: Recurrent((nn.LSTM, nn.GRU, nn.RNN)[r.seed % 3]), (5, 4)),
    "cell": (lambda _: Cell(), (3, 4)),
    "attention": (lambda _: Attention(), (5, 4)),
    "transformer": (lambda _: Transformer(), (5, 4)),
    "tokens": (lambda _: Tokens(), (4,)),
    "bags": (lambda r: nn.EmbeddingBag(10, WIDTH, max_norm=1.0 if r.seed % 2 else None), (4,)),
}
INTEGERS = ("tokens", "bags")


class Model(nn.Module):
    """Body, trunk, head; called with one input, or with two and labels."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.body = BODIES[recipe.body][0](recipe)
        layers: list[nn.Module] = []
        for name in recipe.trunk:
            layers += [(BLOCKS | TROUBLES)[name](), normed(recipe.norm, 1), ACTIVATIONS[recipe.activation]()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTH, 1 if "one logit" in recipe.troubles else CLASSES)
        if "zero head" in recipe.troubles:
            nn.init.zeros_(self.head.weight)
        self.second = nn.Linear(2, WIDTH) if recipe.call == "mapping" else None

    def logits(self, x: Tensor, y: Tensor | None) -> Tensor:
        hidden = self.body(x)
        if self.second is not None and y is not None:
            hidden = hidden + self.second(y)
        return self.head(self.trunk(hidden))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.logits(x, y)
        if self.recipe.output == "object":
            return SimpleNamespace(logits=logits)
        return (logits, x) if self.recipe.output == "tuple" else logits


class WithLoss(Model):
    """Hugging Face style."""

    own_loss = True

    def forward(self, x: Tensor, y: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = self.logits(x, y)
        loss = None if labels is None else F.cross_entropy(logits, labels, label_smoothing=0.1)
        return SimpleNamespace(logits=logits, loss=loss)


@dataclass
class Sample:
    """A model and what it is called with."""

    recipe: Recipe
    model: Model
    batches: list[Any]

    @property
    def draw(self) -> tuple[str, ...] | None:
        """What of a mapping are numbers."""
        batch = self.batches[0]
        if not isinstance(batch, dict):
            return None
        return tuple(key for key in ("x", "y") if batch[key].is_floating_point())


def build(recipe: Recipe) -> Sample:
    """The model of a recipe, and two labelled batches of unequal size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        kind = WithLoss if recipe.call == "mapping" and recipe.output == "object" else Model
        model = kind(recipe).to(DTYPES[recipe.dtype]).train(recipe.train)
        return Sample(recipe, model, [_batch(recipe, SAMPLES), _batch(recipe, SAMPLES - 3)])


def _batch(recipe: Recipe, samples: int) -> Any:
    dtype, shape = DTYPES[recipe.dtype], (samples, *BODIES[recipe.body][1])
    x = torch.randint(0, 10, shape) if recipe.body in INTEGERS else torch.randn(shape).to(dtype)
    labels = torch.arange(samples) % (1 if "one logit" in recipe.troubles else CLASSES)
    if recipe.call == "pairs":
        return x, labels
    return {"x": x, "y": torch.randn(samples, 2).to(dtype), "labels": labels}


@st.composite
def recipes(draw: st.DrawFn, troubles: int = 2) -> Recipe:
    """Recipes with at most so many troubled blocks."""
    trunk = draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3))
    trouble = draw(st.lists(st.sampled_from(sorted(TROUBLES)), min_size=0, max_size=troubles, unique=True))
    return Recipe(
        body=draw(st.sampled_from(sorted(BODIES))),
        maps=tuple(draw(st.lists(st.sampled_from(sorted(MAPS)), min_size=1, max_size=2))),
        trunk=tuple(draw(st.permutations(trunk + trouble))),
        norm=draw(st.sampled_from(("none", "batch", "plain batch", "open batch", "group", "layer", "rms"))),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        output=draw(st.sampled_from(("tensor", "tuple", "object"))),
        call=draw(st.sampled_from(("pairs", "mapping"))),
        dtype=draw(st.sampled_from(("float32", "float32", "float64", "float16", "bfloat16"))),
        train=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
