"""Rows of the Jacobian, chunk by chunk, by reverse mode: several rows in one backward pass where torch can do so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import size
from sapwood.errors import ConfigError, UnsupportedModelError
from sapwood.functional import Params, differentiating
from sapwood.ntk.outputs import Column, Outputs

AT_ONCE = (
    64 * 2**20
)  # bytes of the largest gradient of a pass: larger ones leave the processor's caches and gain nothing
LIVE = 6  # tensors as large as the largest saved one that a row's pass holds at a time (measured on ResNet-20: 4)


@dataclass(frozen=True)
class Rows:
    """Some rows of the Jacobian.

    Attributes:
        start: Number of the first row.
        blocks: One tensor a named parameter, rows x its columns.
    """

    start: int
    blocks: list[Tensor]

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.blocks[0].shape[0]

    def joined(self) -> Tensor:
        """Rows x all columns."""
        return torch.cat(self.blocks, dim=1)


def rows(outputs: Outputs, *, first: int = 0, memory: int | None = None) -> Iterator[Rows]:
    """The rows of the Jacobian in order, from row `first` on, in chunks that take no more than `memory` bytes.

    Raises:
        ConfigError: the memory does not hold one row.
        UnsupportedModelError: the outputs do not depend on the named parameters.
    """
    memory = outputs.options.memory if memory is None else memory
    for piece in outputs.pieces(1):
        begin = max(0, first - piece.start)
        if begin >= size(piece.batch) * outputs.per_sample:
            continue
        leaves, largest = outputs.leaves(), _Largest()
        with largest:
            values = outputs.forward(leaves, piece)
        if not values.requires_grad:
            raise UnsupportedModelError(
                "The model's outputs do not depend on the named parameters through autograd (a detach, no_grad or "
                "integer cast in its forward?)."
            )
        step = _chunk(outputs, largest.bytes, memory)
        for low in range(begin, len(values), step):
            high = min(low + step, len(values))
            yield Rows(piece.start + low, _backward(outputs.columns, values, leaves, low, high))


def row_bytes(outputs: Outputs) -> int:
    """Bytes of one row of the Jacobian, without the masked entries."""
    return outputs.width * torch.finfo(outputs.dtype).bits // 8


def _chunk(outputs: Outputs, largest: int, memory: int) -> int:
    full = sum(outputs.params[name].numel() for name in outputs.names) * torch.finfo(outputs.dtype).bits // 8
    one = full + row_bytes(outputs) + LIVE * largest
    if one > memory:
        raise ConfigError(
            f"One row of the Jacobian and its backward pass take about {gib(one)} GiB, more than memory="
            f"{gib(memory)} GiB: raise memory=, name fewer parameters, or use smaller batches."
        )
    return max(1, min(memory // one, AT_ONCE // max(largest, 1)))


def _backward(columns: tuple[Column, ...], values: Tensor, leaves: Params, low: int, high: int) -> list[Tensor]:
    cotangents = torch.zeros(high - low, len(values), dtype=values.dtype, device=values.device)
    cotangents[torch.arange(high - low), torch.arange(low, high)] = 1
    wanted = [leaves[column.name] for column in columns]
    gradients = None
    if high - low > 1:
        gradients = _batched(values, wanted, cotangents)
    if gradients is None:
        with differentiating():
            single = [
                torch.autograd.grad(values, wanted, cotangent, retain_graph=True, materialize_grads=True)
                for cotangent in cotangents
            ]
        gradients = [torch.stack(parts) for parts in zip(*single, strict=True)]
    return [_kept(column, gradient.flatten(1)) for column, gradient in zip(columns, gradients, strict=True)]


def _batched(values: Tensor, wanted: list[Tensor], cotangents: Tensor) -> list[Tensor] | None:
    """Several rows in one pass; None where an operation of the model has no rule for that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        try:
            found = torch.autograd.grad(
                values, wanted, cotangents, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None
    count = len(cotangents)
    return [w.new_zeros(count, *w.shape) if g is None else g for g, w in zip(found, wanted, strict=True)]


def _kept(column: Column, gradient: Tensor) -> Tensor:
    chosen = gradient if column.kept is None else gradient.index_select(1, column.kept)
    return chosen if column.scale == 1 else chosen * column.scale


def gib(count: float) -> str:
    """Bytes in GiB, three digits."""
    return f"{count / 2**30:.3g}"


class _Largest(torch.autograd.graph.saved_tensors_hooks):
    """Notes the largest tensor that the graph keeps: gradients of a pass are about as large."""

    def __init__(self) -> None:
        self.bytes = 0

        def pack(tensor: Tensor) -> Tensor:
            self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
            return tensor

        super().__init__(pack, lambda tensor: tensor)
