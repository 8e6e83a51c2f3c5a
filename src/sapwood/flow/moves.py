"""Rules for what moves, gathers or sums the entries of one flow, and for layers that bring in weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sapwood.flow.calls import Call
from sapwood.flow.values import Probe, Value, uniform

if TYPE_CHECKING:
    from sapwood.flow.positive import PositiveFlow

VIEWS = (
    "view", "reshape", "permute", "transpose", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "contiguous",
    "clone", "detach", "data", "movedim", "moveaxis",
    "swapaxes", "swapdims", "t", "T", "mT", "roll", "flip", "repeat", "repeat_interleave", "tile", "broadcast_to",
    "expand_as", "view_as", "reshape_as", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "native_channel_shuffle", "rot90", "ravel", "atleast_2d", "requires_grad",
    "alias", "cpu", "cuda", "positive", "squeeze_copy",
)  # fmt: skip
REDUCTIONS = (
    "sum", "mean", "nansum", "nanmean", "amax", "amin", "max", "min", "norm", "logsumexp", "median", "quantile",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "sum_to_size", "matrix_norm",
)  # fmt: skip
SPREADS = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch", "fn",
    "lp_pool1d", "lp_pool2d", "interpolate", "upsample", "pad", "unfold", "fold", "cumsum", "tril", "triu", "diagonal",
    "trace", "diag_embed", "grid_sample", "max_unpool2d", "im2col", "col2im", "scatter", "pad_sequence",
)  # fmt: skip
SLICES = (
    "getitem", "chunk", "split", "unbind", "select", "narrow", "index_select", "gather", "take", "tensor_split",
    "unsafe_chunk", "unsafe_split", "split_with_sizes", "hsplit", "vsplit", "dsplit", "take_along_dim", "masked_select",
    "diag", "iter",
)  # fmt: skip
LAYERS = (
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "matmul", "mm",
    "bmm", "mv", "dot", "vdot", "einsum", "bilinear", "tensordot", "inner", "outer", "kron", "cat", "stack", "hstack",
    "vstack", "dstack", "column_stack", "embedding_bag", "chain_matmul", "multi_dot", "copy", "index_add",
    "index_copy", "index_put", "scatter_add", "masked_scatter", "slice_scatter", "select_scatter", "index_fill",
    "scatter_reduce", "index_reduce", "cartesian_prod", "block_diag", "conv_tbc", "batch_norm",
)  # fmt: skip
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")


def moved(mode: PositiveFlow, call: Call) -> Any:
    """Views and copies: the same flow elsewhere."""
    return _mapped(mode, call, call.values[0].sheet, reduces=False)


def recast(mode: PositiveFlow, call: Call) -> Any:
    """Other precisions: a flow stays in float64."""
    value = call.values[0]
    if value.flow.is_floating_point():
        call = replace(call, function=mode.kept_precise(call.function), original=precise(call.original))
    return moved(mode, call)


def precise(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that changes the precision of its first argument, without doing so."""

    def kept(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = function(input, *args, **kwargs)
        return input.to(result.device) if result.is_floating_point() else result

    return kept


def reduced(mode: PositiveFlow, call: Call) -> Any:
    """Sums, means, maxima and norms: smaller, and measured by their own probe."""
    if call.name in ("max", "min") and len(call.values) == 2:
        from sapwood.flow.pointwise import chosen

        return chosen(mode, call)
    return _mapped(mode, call, call.values[0].sheet, reduces=True)


def sliced(mode: PositiveFlow, call: Call) -> Any:
    """Parts: flows of their own, the same ones where the same part is taken twice."""
    return _mapped(mode, call, (call.values[0].sheet, call.name, _static(call)), reduces=False, parts=True)


def _static(call: Call) -> Hashable:
    leaves = pytree.tree_leaves((call.args[1:], call.kwargs))
    return tuple(id(leaf) if isinstance(leaf, Tensor | Value) else repr(leaf) for leaf in leaves)


def _mapped(mode: PositiveFlow, call: Call, sheet: Hashable, *, reduces: bool, parts: bool = False) -> Any:
    value = call.values[0]
    flows, shape = pytree.tree_flatten(mode.computed(call, lambda: call.run(lambda v: v.flow)))
    own = reduces or value.reduced or not value.linear
    bases = _moved(call, value.base, len(flows), reduces)
    roots = _moved(call, value.root, len(flows), reduces)

    def part(index: int, flow: Any) -> Any:
        if not isinstance(flow, Tensor) or not (flow.is_floating_point() or flow.dtype == torch.bool):
            return flow
        probe = _part(call.probe, index) if own else uniform(flow)
        where = (sheet, index) if parts else sheet
        moved = replace(value, flow=flow, sheet=where, probe=probe, base=bases[index], root=roots[index])
        return replace(moved, reduced=value.reduced or reduces)

    return pytree.tree_unflatten([part(index, flow) for index, flow in enumerate(flows)], shape)


def _moved(call: Call, tensor: Tensor | None, count: int, reduces: bool) -> list[Any]:
    if tensor is None or reduces:
        return [None] * count
    return pytree.tree_leaves(call.run(lambda value: tensor if value is call.values[0] else value.flow))


def _part(probe: Probe, index: int) -> Probe:
    def part(t: float) -> Tensor:
        return pytree.tree_leaves(probe(t))[index]  # type: ignore[no-any-return]

    return part


def spread(mode: PositiveFlow, call: Call) -> Any:
    """Pools, padding, interpolation: a flow again, of the same origin."""
    value = call.values[0]
    if not value.settled or not value.linear:
        return _mapped(mode, call, value.sheet, reduces=False)
    result = mode.computed(call, lambda: call.run(lambda v: v.flow, mode.shift))
    return _flows(result, lambda flow, _: Value(flow, value.sheet, uniform(flow)))


def layer(mode: PositiveFlow, call: Call) -> Any:
    """Weights come in, or flows together: what comes out is a flow of its own."""
    result = mode.computed(call, lambda: mode.level(call.run(lambda v: mode.settled(v, call), mode.weight)))
    key = (call.name, *(v.sheet for v in call.values)) if call.name in ("cat", "stack") else object()
    return _flows(result, lambda flow, index: mode.fresh(flow, (key, index)))


def cell(mode: PositiveFlow, call: Call) -> Any:
    """Fused recurrent cells, as they are."""
    mode.checkable = False
    return layer(mode, call)


def tried(mode: PositiveFlow, call: Call) -> Any:
    """An operation of which nothing is known: taken where it proves linear and non-negative on flows."""
    result = mode.computed(call, lambda: call.run(lambda v: mode.settled(v, call)))
    flows = _floating(result)
    if any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in pytree.tree_leaves(result)):
        raise call.refused("gives complex numbers")
    if flows and mode.tries:
        generator = torch.Generator(flows[0].device).manual_seed(0)
        noises = {id(v): _noise(v.flow, generator) for v in call.values}
        with torch.no_grad():
            noise = _floating(call.run(lambda v: noises[id(v)]))
            mixed = _floating(call.run(lambda v: 2 * mode.settled(v, call) - 3 * noises[id(v)]))
        linear = all(torch.allclose(2 * f - 3 * n, m, rtol=1e-9) for f, n, m in zip(flows, noise, mixed, strict=True))
        if not linear or any(bool((flow < 0).any()) for flow in flows):
            raise call.refused("is not known, and when tried is not linear in a non-negative flow")
    return _flows(result, lambda flow, _: mode.fresh(flow, object()))


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=torch.float64, device=like.device)


def _floating(result: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _flows(result: Any, value: Any) -> Any:
    leaves, shape = pytree.tree_flatten(result)
    marked = [
        value(leaf, index) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for index, leaf in enumerate(leaves)
    ]
    return pytree.tree_unflatten(marked, shape)


RULES: dict[str, Any] = {
    **dict.fromkeys(VIEWS, moved),
    **dict.fromkeys(("to", "type", "type_as", "float", "double", "half", "bfloat16"), recast),
    **dict.fromkeys(REDUCTIONS, reduced),
    **dict.fromkeys(SLICES, sliced),
    **dict.fromkeys(SPREADS, spread),
    **dict.fromkeys(LAYERS, layer),
    **dict.fromkeys(CELLS, cell),
}
