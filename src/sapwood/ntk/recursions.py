"""The rules of the analytic kernel: how the covariance and the tangent kernel of a unit pass each operation.

The recursions are those of `sapwood.ntk.analytic`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.errors import ConfigError, UnsupportedModelError
from sapwood.ntk.jacobian import gib
from sapwood.ntk.options import MEMORY

VARIANCE = 2.0
"""Of a fresh weight, times fan-in."""
HELD = 6
"""Tensors as large as a covariance that a rule holds at a time."""


@dataclass(frozen=True)
class Unit:
    """What is known of a unit of a layer at infinite width.

    Attributes:
        covariance: S, (n, n), or (n, n, h, w, h, w) with the pixels of the first and of the second input.
        tangent: T, likewise.
        gaussian: Whether it is a Gaussian over draws of the weights.
        fresh: Whether it comes straight from a weight layer, and so is independent of all that went into that.
    """

    covariance: Tensor
    tangent: Tensor
    gaussian: bool = False
    fresh: bool = False

    @property
    def spatial(self) -> bool:
        """Whether it has pixels."""
        return self.covariance.dim() == 6


@dataclass(frozen=True)
class Limit:
    """What the rules need to know besides the unit.

    Attributes:
        trained: Names of the parameters that the kernel is with respect to.
        densities: Share of the weights kept, by name; dense where there is none.
        standard: Whether the derivatives are with respect to the weights themselves.
        memory: Bytes that may be taken.
    """

    trained: frozenset[str]
    densities: dict[str, float] = field(default_factory=dict)
    standard: bool = False
    memory: int = MEMORY


def no_rule(what: str, where: str) -> UnsupportedModelError:
    """The refusal of an operation."""
    return UnsupportedModelError(
        f"The analytic kernel has no rule for {what} ({where!r}); it has rules for Linear, Conv2d, ReLU, Flatten, "
        "average pooling and sums of weight layers. expected_kernel averages over draws of any model."
    )


# Weight layers.


def _linear(unit: Unit, layer: nn.Module, name: str, limit: Limit) -> Unit:
    if unit.spatial:
        raise UnsupportedModelError(f"{name!r} is a Linear on images: flatten or pool them first.")
    return _weight_layer(unit, layer, name, limit, lambda t: t)


def _convolution(unit: Unit, layer: nn.Module, name: str, limit: Limit) -> Unit:
    assert isinstance(layer, nn.Conv2d)
    if not unit.spatial or layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UnsupportedModelError(
            f"{name!r}: the analytic kernel has a rule for Conv2d on images with one group and zero padding given in "
            f"pixels; this is {layer}."
        )
    need = HELD * unit.covariance.numel() * 8
    if need > limit.memory:
        raise ConfigError(
            f"The covariance of all pairs of pixels at {name!r} takes about {gib(need)} GiB, more than memory="
            f"{gib(limit.memory)} GiB: take fewer or smaller images, or raise memory=."
        )
    return _weight_layer(unit, layer, name, limit, lambda t: _window_mean(t, layer))


def _weight_layer(unit: Unit, layer: nn.Module, name: str, limit: Limit, average: Callable[[Tensor], Tensor]) -> Unit:
    prefix = f"{name}." if name else ""
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    density = limit.densities.get(f"{prefix}weight", 1.0)
    inputs = average(unit.covariance)
    tangent = VARIANCE * density * average(unit.tangent)
    if f"{prefix}weight" in limit.trained:
        tangent = tangent + density * inputs * (weight[0].numel() if limit.standard else VARIANCE)
    covariance = VARIANCE * density * inputs
    if bias is not None:
        covariance = covariance + float(bias.detach().double().square().mean())
        if f"{prefix}bias" in limit.trained:
            tangent = tangent + 1
    return Unit(covariance, tangent, gaussian=True, fresh=True)


def _window_mean(t: Tensor, layer: nn.Conv2d) -> Tensor:
    """Mean over the window, which slides over both images of a pair together."""
    (top, left), (down, right) = _pair(layer.padding), _pair(layer.stride)
    rows, columns = (range(0, d * k, d) for d, k in zip(_pair(layer.dilation), _pair(layer.kernel_size), strict=True))
    padded = F.pad(t, (left, left, top, top) * 2)
    high = (padded.shape[2] - rows[-1] - 1) // down + 1
    wide = (padded.shape[3] - columns[-1] - 1) // right + 1
    total = None
    for i in rows:
        for j in columns:
            y, z = slice(i, i + down * high, down), slice(j, j + right * wide, right)
            part = padded[:, :, y, z, y, z]
            total = part.clone() if total is None else total.add_(part)
    assert total is not None
    return total / (len(rows) * len(columns))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


# What has no weights.


def _relu(unit: Unit, *_: Any, **__: Any) -> Unit:
    """The arc-cosine kernels of degrees 1 and 0."""
    if not unit.gaussian:
        raise UnsupportedModelError(
            "A ReLU follows something that is no Gaussian at infinite width (the input, another ReLU, or a sum with "
            "one, as in a post-activation residual block): the analytic kernel has no rule for that; use "
            "expected_kernel."
        )
    s = unit.covariance
    if unit.spatial:
        variance = torch.einsum("iihwhw->ihw", s)
        left, right = variance[:, None, :, :, None, None], variance[None, :, None, None]
    else:
        variance = s.diagonal()
        left, right = variance[:, None], variance[None, :]
    scale = (left * right).clamp_min(0).sqrt()
    cosine = (s / scale.clamp_min(torch.finfo(s.dtype).tiny)).clamp(-1, 1)
    angle = cosine.acos()
    k0 = (torch.pi - angle) / (2 * torch.pi)
    k1 = scale / (2 * torch.pi) * (angle.sin() + (torch.pi - angle) * cosine)
    return Unit(k1, unit.tangent * k0)


def _flatten(unit: Unit, start: int = 1, end: int = -1, *, start_dim: int = 1, end_dim: int = -1) -> Unit:
    """The layer after it sums over pixels with independent weights: only equal pixels of a pair meet."""
    if (start, end, start_dim, end_dim) != (1, -1, 1, -1):
        raise UnsupportedModelError("The analytic kernel flattens all but the samples: Flatten(1).")
    return _each(unit, lambda t: torch.einsum("ijhwhw->ij", t) / (t.shape[2] * t.shape[3])) if unit.spatial else unit


def _global_average(unit: Unit, *_: Any, **__: Any) -> Unit:
    """Over all pixels, which stay as one."""
    return _each(unit, lambda t: t.mean((2, 3, 4, 5), keepdim=True))


def _average(unit: Unit, size: Any, stride: Any = None) -> Unit:
    def pooled(t: Tensor) -> Tensor:
        n, m, h, w, u, v = t.shape
        second = F.avg_pool2d(t.reshape(n * m, h * w, u, v), size, stride)
        turned = second.reshape(n * m, h, w, -1).permute(0, 3, 1, 2)
        first = F.avg_pool2d(turned, size, stride)
        high, wide = first.shape[-2:]
        return first.permute(0, 2, 3, 1).reshape(n, m, high, wide, *second.shape[-2:])

    return _each(unit, pooled)


def _each(unit: Unit, function: Callable[[Tensor], Tensor]) -> Unit:
    return replace(unit, covariance=function(unit.covariance), tangent=function(unit.tangent), fresh=False)


def added(first: Unit, second: Unit, where: str) -> Unit:
    """A sum of independent Gaussians."""
    if not (first.gaussian and second.gaussian and (first.fresh or second.fresh)):
        raise no_rule("a sum in which no part is fresh from a weight layer, or one is no Gaussian", where)
    return Unit(first.covariance + second.covariance, first.tangent + second.tangent, gaussian=True)


def _pool_module(unit: Unit, layer: nn.Module, name: str, limit: Limit) -> Unit:
    assert isinstance(layer, nn.AvgPool2d)
    if _pair(layer.padding) != (0, 0) or layer.ceil_mode or layer.divisor_override:
        raise no_rule("AvgPool2d with padding, ceil_mode or a divisor", name)
    return _average(unit, layer.kernel_size, layer.stride)


def _global_pool_module(unit: Unit, layer: nn.Module, name: str, limit: Limit) -> Unit:
    if getattr(layer, "output_size", None) not in (1, (1, 1)):
        raise no_rule("AdaptiveAvgPool2d to more than one pixel", name)
    return _global_average(unit)


def _mean(unit: Unit, dim: Any = None, keepdim: bool = False) -> Unit:
    if not unit.spatial or tuple(dim or ()) not in ((2, 3), (-2, -1)):
        raise no_rule("a mean that is not over height and width", "mean")
    pooled = _global_average(unit)
    return pooled if keepdim else _flatten(pooled)


Rule = Callable[[Unit, nn.Module, str, Limit], Unit]

MODULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.ReLU: lambda unit, *_: _relu(unit),
    nn.Flatten: lambda unit, layer, *_: _flatten(unit, layer.start_dim, layer.end_dim),
    nn.Identity: lambda unit, *_: unit,
    nn.modules.dropout._DropoutNd: lambda unit, *_: unit,
    nn.AvgPool2d: _pool_module,
    nn.AdaptiveAvgPool2d: _global_pool_module,
}
FUNCTIONS: dict[Any, Callable[..., Unit]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu"), _relu),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.mean, "mean"), _mean),
}
SUMS = (operator.add, torch.add, "add", operator.iadd, "add_")
