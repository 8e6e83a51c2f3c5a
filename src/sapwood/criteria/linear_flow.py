"""Makes a forward pass a positive flow: non-linearities pass through, norms only scale, attention is bilinear.

SynFlow needs outputs that rise with every |w| and do not saturate. ReLU on positive values is already the identity;
GELU, SiLU, tanh and sigmoid are replaced by it, softmax becomes a division by the number of keys, LayerNorm and its
kin keep only their affine part. Works on functions, not modules, so that a `F.gelu` inside a forward is caught too.
Fused recurrent cells are left as they are: with non-negative weights they rise already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class LinearFlow(TorchFunctionMode):
    """A context in which torch's non-linear functions are their positive linear stand-ins."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the stand-in, if there is one."""
        return STAND_INS.get(func, func)(*args, **(kwargs or {}))


def _identity(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input


def _mean_over(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    return input / input.shape[-1 if dim is None else dim]


def _scale(input: Tensor, weight: Tensor | None, bias: Tensor | None, channel_axis: int | None = None) -> Tensor:
    """The affine part of a norm; channels along `channel_axis`, or the last dimensions."""

    def spread(vector: Tensor) -> Tensor:
        return vector if channel_axis is None else vector.reshape([-1] + [1] * (input.dim() - channel_axis - 1))

    output = input if weight is None else input * spread(weight)
    return output if bias is None else output + spread(bias)


def _layer_norm(
    input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    return _scale(input, weight, bias)


def _rms_norm(input: Tensor, shape: Any, weight: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return _scale(input, weight, None)


def _group_norm(
    input: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    return _scale(input, weight, bias, channel_axis=1)


def _instance_norm(
    input: Tensor,
    mean: Any = None,
    var: Any = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    return _scale(input, weight, bias, channel_axis=1)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return query @ key.transpose(-2, -1) @ value * (factor / key.shape[-2])


def _multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *args: Any, **options: Any
) -> Any:
    """Bilinear `F.multi_head_attention_forward` on (length, batch, width), packed or separate projections."""
    names = (
        "in_proj_weight",
        "in_proj_bias",
        "bias_k",
        "bias_v",
        "add_zero_attn",
        "dropout_p",
        "out_proj_weight",
        "out_proj_bias",
    )
    options = dict(zip(names, args, strict=False)) | options
    if options.get("use_separate_proj_weight"):
        weights = [options[f"{part}_proj_weight"] for part in "qkv"]
    else:
        weights = options["in_proj_weight"].chunk(3)
    biases = options["in_proj_bias"].chunk(3) if options["in_proj_bias"] is not None else (None,) * 3
    parts = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    split = [
        torch.unflatten(x, -1, (heads, width // heads)).movedim(-2, 0).movedim(1, -2) for x in parts
    ]  # (heads, ..., length, width)
    mixed = _attention(*split).movedim(-2, 1).movedim(0, -2).flatten(-2)
    return F.linear(mixed, options["out_proj_weight"], options["out_proj_bias"]), None


_SATURATING = (
    F.gelu, F.silu, F.mish, F.elu, F.celu, F.selu, F.softplus, F.softsign, F.hardswish, F.hardsigmoid, F.hardtanh,
    F.relu6, F.tanh, F.sigmoid, F.logsigmoid, torch.tanh, torch.sigmoid, torch.celu, torch.selu,
    Tensor.tanh, Tensor.sigmoid,
)  # fmt: skip

STAND_INS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_SATURATING, _identity),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _mean_over),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm),
    **dict.fromkeys((F.group_norm, torch.group_norm), _group_norm),
    F.instance_norm: _instance_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
}
