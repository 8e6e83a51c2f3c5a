"""The case table: small networks of every kind that Sapwood promises to prune, with one sample's shape."""

import itertools
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 3


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = cell(6, 8, num_layers=2, batch_first=True)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class TinyViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, norm_first=True, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.encoder(x))[:, 0])


class Residual(nn.Module):
    """A block whose last BatchNorm begins at zero, as torchvision's `zero_init_residual` and timm do it."""

    def __init__(self, zero_gamma: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)
        if zero_gamma:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class Sentence(nn.Module):
    """Hugging Face style: keyword arguments, `labels`, an output object; the head is tied to the embedding."""

    def __init__(self, words: int = 20, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None, labels=None):
        padding = None if attention_mask is None else attention_mask == 0
        logits = self.head(self.layer(self.embed(input_ids), src_key_padding_mask=padding))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def convolutional(dim: int, norm: type[nn.Module] | None) -> nn.Module:
    conv, pool = getattr(nn, f"Conv{dim}d"), getattr(nn, f"AdaptiveAvgPool{dim}d")

    def normed(channels: int) -> list[nn.Module]:
        if norm is None:
            return []
        if norm is nn.GroupNorm:
            return [nn.GroupNorm(2, channels)]
        return [getattr(nn, f"BatchNorm{dim}d")(channels)]

    return nn.Sequential(
        conv(2, 6, 3, padding=1), *normed(6), nn.ReLU(),
        conv(6, 6, 3, padding=1, groups=2), *normed(6), nn.ReLU(),
        pool(1), nn.Flatten(), nn.Linear(6, CLASSES),
    )  # fmt: skip


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU, bias: bool = True, norm: type | None = None) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), *([norm(outputs)] if norm else []), activation()]
    return nn.Sequential(*layers[: -2 if norm else -1])


NETS = {
    "mlp without norm": (lambda: mlp(7, 12, 12, CLASSES), (7,)),
    "mlp with LayerNorm": (lambda: mlp(7, 12, 12, CLASSES, norm=nn.LayerNorm, activation=nn.GELU), (7,)),
    "mlp with BatchNorm1d": (lambda: mlp(7, 12, 12, CLASSES, norm=nn.BatchNorm1d), (7,)),
    "conv1d": (lambda: convolutional(1, nn.BatchNorm1d), (2, 9)),
    "conv2d without norm": (lambda: convolutional(2, None), (2, 6, 6)),
    "conv2d with GroupNorm": (lambda: convolutional(2, nn.GroupNorm), (2, 6, 6)),
    "conv3d": (lambda: convolutional(3, nn.BatchNorm3d), (2, 4, 4, 4)),
    "zero-gamma residual": (Residual, (3, 6, 6)),
    "lstm": (Recurrent, (5, 6)),
    "gru": (lambda: Recurrent(nn.GRU), (5, 6)),
    "vit": (TinyViT, (3, 8, 8)),
}


def labelled(shape: tuple[int, ...], samples: int = 8, dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, *shape, generator=generator, dtype=dtype)
    return [(inputs, torch.arange(samples) % CLASSES)]


def sentences(samples: int = 4, length: int = 5) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 20, (samples, length), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, -1] = 0
    return [{"input_ids": ids, "attention_mask": attention, "labels": ids.flip(1)}]


QUICK = {
    "ntk-sap": {"rounds": 3, "resamples": 2, "samples": 16},
    "ntk-sap-jvp": {"rounds": 3, "resamples": 2, "samples": 8},
    "ntk-sap-analytic": {"rounds": 3},
    "iter-snip": {"rounds": 4},
    "force": {"rounds": 4},
    "synflow": {"rounds": 10},
    "synflow-l2": {"rounds": 10},
    "px": {"rounds": 5},
    "ntt": {"rounds": 2, "interval": 2},
}
"""Fields that make every method quick."""

REFUSED = {("ntk-sap-analytic", "lstm"), ("ntk-sap-analytic", "gru"), ("ntk-sap-analytic", "sentence")}
"""Methods and networks for which they say that they have no rule, and what to use instead."""


def by_magnitude(net, masks, data, generator):
    """A criterion that tests import by path."""
    return {name: weight.abs() for name, weight in net.weights.items()}
