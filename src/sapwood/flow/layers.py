"""Layers that torch computes in one call, written out: norms, softmax, attention, gated units.

A norm of torch's passes its affine part. The others are written in the operations that a hand would use, and run under
the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    pass


def _scale(input: Tensor, weight: Tensor | None, bias: Tensor | None, channel_axis: int | None = None) -> Tensor:
    """The affine part of a norm; channels along `channel_axis`, or the last dimensions."""

    def spread(vector: Tensor) -> Tensor:
        if channel_axis is None:
            return vector
        return vector.reshape([-1] + [1] * (input.dim() - channel_axis - 1))

    output = input.view_as(input) if weight is None else input * spread(weight)
    return output if bias is None else output + spread(bias)


def _layer_norm(input: Tensor, shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> Tensor:
    return _scale(input, weight, bias)


def _rms_norm(input: Tensor, shape: Any, weight: Any = None, *_: Any, **__: Any) -> Tensor:
    return _scale(input, weight, None)


def _group_norm(input: Tensor, groups: int, weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> Tensor:
    return _scale(input, weight, bias, channel_axis=1)


def _instance_norm(
    input: Tensor, mean: Any = None, var: Any = None, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Tensor:
    return _scale(input, weight, bias, channel_axis=1)


def _torch_instance_norm(input: Tensor, weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> Tensor:
    return _scale(input, weight, bias, channel_axis=1)


def _batch_norm(
    input: Tensor,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """With the batch's own statistics it is a norm like the others; with running ones a constant scale."""
    if training:
        return _scale(input, weight, bias, channel_axis=1)
    output: Tensor = torch.batch_norm(input, weight, bias, mean, var, False, momentum, eps, False)
    return output


def _softmax(input: Tensor, dim: int | None = None, *_: Any, dtype: Any = None, **__: Any) -> Tensor:
    rising = torch.exp(input)
    return rising / rising.sum(-1 if dim is None else dim, keepdim=True)


def _log_softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    return input - torch.logsumexp(input, -1 if dim is None else dim, keepdim=True)


def _softmin(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    return _softmax(-input, dim)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    first, second = input.chunk(2, dim)
    return first * torch.sigmoid(second)


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Tensor:
    normed: Tensor = input / input.norm(p, dim, keepdim=True).clamp_min(eps)
    return normed


def _cosine(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    return (_normalize(x1, dim=dim) * _normalize(x2, dim=dim)).sum(dim)


def _local_response(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    squares = (input * input).flatten(2).unsqueeze(1)  # (batch, 1, channels, positions)
    around = F.avg_pool2d(F.pad(squares, (0, 0, size // 2, (size - 1) // 2)), (size, 1), stride=1)
    return input / (k + alpha * around.squeeze(1).view(input.shape)) ** beta


def _mean_square(input: Tensor, dim: Any, correction: float, keepdim: bool) -> Tensor:
    squares = input * input
    mean = squares.mean() if dim is None else squares.mean(dim, keepdim=keepdim)
    count = input.numel() / mean.numel()
    return mean * (count / max(count - correction, 1.0))


def _variance(input: Tensor, dim: Any = None, *args: Any, keepdim: bool = False, **options: Any) -> Tensor:
    """Of a flow, which is not centred: the mean of its squares."""
    if isinstance(dim, bool):
        dim, args = None, (dim, *args)
    unbiased = options.get("unbiased", args[0] if args else True)
    correction = options.get("correction")
    keepdim = args[1] if len(args) > 1 else keepdim
    return _mean_square(input, dim, float(unbiased) if correction is None else correction, keepdim)


def _deviation(input: Tensor, *args: Any, **options: Any) -> Tensor:
    return _variance(input, *args, **options).sqrt()


def _mean_of(input: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    dim = options.get("dim", args[0] if args and not isinstance(args[0], bool) else None)
    if dim is None:
        return input.mean()
    return input.mean(dim, keepdim=options.get("keepdim", args[2] if len(args) > 2 else False))


def _variance_and_mean(input: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _variance(input, *args, **options), _mean_of(input, args, options)


def _deviation_and_mean(input: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _deviation(input, *args, **options), _mean_of(input, args, options)


def _with_addend(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`baddbmm` and its kin."""

    def added(input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        scaled = alpha * product(first, second)
        return beta * input + scaled if beta else scaled

    return added


def _addcmul(input: Tensor, first: Tensor, second: Tensor, *, value: float = 1) -> Tensor:
    return input + first * second * value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k / sqrt d + mask) v."""
    if enable_gqa:
        copies = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(copies, -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    return _softmax(_hidden(scores, attn_mask)) @ value


def _hidden(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores under a mask that is True where they count, or is added to them."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return scores + mask


HEADS = (
    "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight",
    "out_proj_bias", "training", "key_padding_mask", "need_weights", "attn_mask",
)  # fmt: skip


def _multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *args: Any, **options: Any
) -> Any:
    """`F.multi_head_attention_forward` on (length, batch, width), packed or separate projections."""
    options = dict(zip(HEADS, args, strict=False)) | options
    if options.get("use_separate_proj_weight"):
        weights = [options[f"{part}_proj_weight"] for part in "qkv"]
    else:
        weights = options["in_proj_weight"].chunk(3)
    biases = options["in_proj_bias"].chunk(3) if options["in_proj_bias"] is not None else (None,) * 3

    parts = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    split = [x.unflatten(-1, (heads, width // heads)).movedim(-2, 0).movedim(1, -2) for x in parts]
    mask = _head_mask(options, split[0], heads)
    queries, keys, values = split
    mixed = (
        _attention(queries, keys, values, mask).movedim(-2, 1).movedim(0, -2).flatten(-2)
    )  # (heads, ..., length, width)
    return F.linear(mixed, options["out_proj_weight"], options["out_proj_bias"]), None


def _head_mask(options: dict[str, Any], queries: Tensor, heads: int) -> Tensor | None:
    """One added mask of both, in a shape that goes with (heads, batch, queries, keys)."""
    total = None
    for key in ("attn_mask", "key_padding_mask"):
        mask = options.get(key)
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=queries.dtype, device=mask.device).masked_fill(mask, -math.inf)
        if key == "key_padding_mask":
            mask = mask[..., None, :]
        elif mask.dim() == 3:
            mask = mask.unflatten(0, (-1, heads)).movedim(1, 0)
        total = mask if total is None else total + mask
    return total


WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    F.instance_norm: _instance_norm, torch.instance_norm: _torch_instance_norm, F.batch_norm: _batch_norm,
}  # fmt: skip
"""Functions of torch whose namesakes take their arguments in another order."""

BY_NAME: dict[str, Callable[..., Any]] = {
    "layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm, "softmax": _softmax,
    "log_softmax": _log_softmax, "softmin": _softmin, "glu": _glu, "normalize": _normalize,
    "cosine_similarity": _cosine, "local_response_norm": _local_response, "var": _variance, "std": _deviation,
    "var_mean": _variance_and_mean, "std_mean": _deviation_and_mean, "addmm": _with_addend(torch.mm),
    "baddbmm": _with_addend(torch.bmm), "addmv": _with_addend(torch.mv), "addcmul": _addcmul,
    "scaled_dot_product_attention": _attention, "multi_head_attention_forward": _multi_head_attention,
}  # fmt: skip
