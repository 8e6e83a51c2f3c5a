r"""Scaled dot-product attention, and multi-head attention built on it.

For one query, the logits over N keys are taken as independent Gaussians. Their common part (what keys share, their
pair moment) drops out of the softmax, and their variance is

    s2 = d scale^2 E q^2 (E k^2 - pair_k),         d features a head, E q^2 etc. averaged over the head and positions.

The softmax p is taken as independent of the values, whose fresh weights make them zero-mean given the tokens. Then

    E out^2           = f E v^2 + (1 - f) pair_v          f = E sum p^2 (`softmax_moments`, no limit taken)
    E out(i) out(i')  = c E v^2 + (1 - c) pair_v          c = f^r N^(r-1) for queries of correlation r, 1/N to f
    E D_out^2         = f td_v + (1 - f) to_v + g T (E v^2 - pair_v)

where the last term is the change of the softmax: T = d scale^2 [td_q (E k^2 - pair_k) + E q^2 (td_k - to_k)] is the
variance of the logits' changes that keys do not share, and g its `response`. At finite epsilon the perturbed network
has its own f and c, and the change is gated by the clean one's.

What is not covered: masks (causal, padding), and keys that repeat each other.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.moments.layers import linear
from sapwood.moments.registry import Call, rule
from sapwood.moments.shapes import channels_after
from sapwood.moments.softmax import softmax_moments
from sapwood.moments.state import Moments, Side, Weight, plus, times


@rule(F.scaled_dot_product_attention)
def attention(  # noqa: PLR0913  # torch's own signature
    call: Call,
    query: Moments,
    key: Moments,
    value: Moments,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Moments:
    """Attention over (batch, heads, tokens, features)."""
    if attn_mask is not None or is_causal or enable_gqa:
        raise call.refuse("attention with a mask or with grouped heads has no moment rule")
    if len(query.shape) != 4 or any(x.channels != (1, 3) and x.shape[1] > 1 for x in (query, key, value)):
        raise call.refuse("attention over anything but (batch, heads, tokens, features) has no moment rule")
    if call.flat:
        raise call.refuse("attention has no flat rule (positions='full' has one)")
    head = _Head(query, key, value, scale or 1 / math.sqrt(query.shape[3]))
    clean, focus, overlap = head.side(query.clean, key.clean, value.clean)
    noisy = head.side(query.noisy, key.noisy, value.noisy)[0] if value.finite else clean
    td, to = head.change(focus, overlap)
    cross = None
    if value.finite and value.crossed() is not None:
        cross = plus(overlap * ((value.clean.raw + value.noisy.raw) / 2).mean(2, keepdim=True), times(
            value.crossed(), 1 - overlap))  # fmt: skip
    shape = (*query.shape[:3], value.shape[3])
    cross, td, to = (None if m is None else m.expand(shape) for m in (cross, td, to))
    whole = _spread(clean, shape)
    return Moments(call.shape, (1, 3), whole, _spread(noisy, shape) if value.finite else whole, cross, td, to)


class _Head:
    """The moments of every head: (1, heads, 1, 1), averaged over tokens and features."""

    def __init__(self, query: Moments, key: Moments, value: Moments, scale: float) -> None:
        self.query, self.key, self.value = query, key, value
        self.keys = key.shape[2]
        self.weight = query.shape[3] * scale * scale

    def side(self, query: Side, key: Side, value: Side) -> tuple[Side, Any, Tensor]:
        """One network's output, with its softmax moments and their overlap between two queries."""
        asked = _mean(query.raw)
        softmax = softmax_moments(self.weight * asked * self._own(self.key, key), self.keys)
        alike = _mean_or_zero(self.query.pair(query), asked) / asked.clamp_min(1e-30)
        overlap = (softmax.focus * self.keys).clamp_min(1) ** alike.clamp(0, 1) / self.keys
        raw, pair = value.raw.mean(2, keepdim=True), self.value.pair(value)
        between = torch.zeros_like(raw) if pair is None else pair.mean(2, keepdim=True)
        mean = None if value.mean is None else value.mean.mean(2, keepdim=True)
        out = Side(softmax.focus * raw + (1 - softmax.focus) * between, mean, overlap * raw + (1 - overlap) * between)
        return out, softmax, overlap

    def change(self, softmax: Any, overlap: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the perturbation does to the output, at one query and between two."""
        value, key, query = self.value, self.key, self.query
        if value.td is None:
            return None, None
        asked, own = _mean(query.clean.raw), self._own(key, key.clean)
        alike = _mean_or_zero(query.pair(query.clean), asked)
        td, to = value.td.mean(2, keepdim=True), _mean_tokens(value.to, value.td)
        key_own = (_mean_or_zero(key.td, asked) - _mean_or_zero(key.to, asked)).clamp_min(0)
        moved = self.weight * (_mean_or_zero(query.td, asked) * own + asked * key_own)
        both = self.weight * (_mean_or_zero(query.to, asked) * own + alike * key_own)
        spread = value.clean.raw.mean(2, keepdim=True)
        pair = value.pair(value.clean)
        spread = spread if pair is None else (spread - pair.mean(2, keepdim=True)).clamp_min(0)
        share = overlap / softmax.focus.clamp_min(1e-30)
        here = softmax.focus * td + (1 - softmax.focus) * to + softmax.response * moved * spread
        there = overlap * td + (1 - overlap) * to + softmax.response * share * both * spread
        return here, there

    def _own(self, x: Moments, side: Side) -> Tensor:
        """The part of the keys' second moment that they do not share."""
        pair = x.pair(side)
        return _mean(side.raw) if pair is None else (_mean(side.raw) - _mean(pair)).clamp_min(0)


def _mean(moment: Tensor) -> Tensor:
    return moment.mean((2, 3), keepdim=True)


def _mean_or_zero(moment: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if moment is None else _mean(moment)


def _mean_tokens(moment: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like).mean(2, keepdim=True) if moment is None else moment.mean(2, keepdim=True)


def _spread(side: Side, shape: tuple[int, ...]) -> Side:
    mean, pair = (None if m is None else m.expand(shape) for m in (side.mean, side.pair))
    return Side(side.raw.expand(shape), mean, pair)


@rule(F.multi_head_attention_forward)
def multi_head_attention(  # noqa: PLR0913  # torch's own signature
    call: Call,
    query: Moments,
    key: Moments,
    value: Moments,
    width: int,
    heads: int,
    in_proj_weight: Weight | None,
    in_proj_bias: Tensor | None,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Weight,
    out_proj_bias: Tensor | None,
    **options: Any,
) -> tuple[Moments, None]:
    """`nn.MultiheadAttention` on (tokens, batch, width), or (tokens, width)."""
    refused = [options.get(name) is not None for name in ("key_padding_mask", "attn_mask", "static_k", "static_v")]
    if any(refused) or options.get("is_causal") or bias_k is not None or bias_v is not None or add_zero_attn:
        raise call.refuse("attention with masks or with extra keys has no moment rule")
    if any(x.channels != (len(x.shape) - 1,) for x in (query, key, value)):
        raise call.refuse("attention over anything but (tokens, batch, features) has no moment rule")
    biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))
    projected = [
        linear(dataclasses.replace(call, shapes=(torch.Size((*x.shape[:-1], width)),)), x, weight, bias)
        for x, weight, bias in zip((query, key, value), _projections(in_proj_weight, options), biases, strict=True)
    ]
    size = width // heads

    def split(x: Moments) -> Moments:
        def heads_apart(moment: Tensor) -> Tensor:
            return moment.expand(x.shape).reshape(x.shape[0], -1, heads, size).permute(1, 2, 0, 3)

        return x.map(heads_apart, torch.Size((1, heads, x.shape[0], size)), (1, 3))

    inner = dataclasses.replace(call, shapes=(torch.Size((1, heads, query.shape[0], size)),))
    mixed = attention(inner, *(split(x) for x in projected))  # type: ignore[arg-type]

    def together(moment: Tensor) -> Tensor:
        return moment.permute(2, 0, 1, 3).reshape(query.shape)

    joined = mixed.map(together, query.shape, channels_after(mixed, together))
    out = linear(dataclasses.replace(call, shapes=(query.shape,)), joined, out_proj_weight, out_proj_bias)
    return out, None


def _projections(packed: Weight | None, options: dict[str, Any]) -> list[Weight]:
    if options.get("use_separate_proj_weight"):
        return [options[f"{part}_proj_weight"] for part in "qkv"]
    assert packed is not None
    return [dataclasses.replace(packed, v=v) for v in packed.v.chunk(3)]
