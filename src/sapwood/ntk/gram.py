"""The fixed-weight (empirical) tangent kernel as a matrix (Jacot et al. 2018; Wang, Li, Sun 2023, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from sapwood.batches import Batch
from sapwood.errors import ConfigError
from sapwood.isolation import device_of, isolated
from sapwood.masks import Masks
from sapwood.ntk.jacobian import gib, row_bytes, rows
from sapwood.ntk.options import Keywords
from sapwood.ntk.outputs import Outputs, Parameters

COLUMNS = 8192  # summed in the derivatives' precision; the blocks are then summed in float64
Progress = Callable[[int, int], None]


def kernel(
    model: nn.Module,
    x: Batch,
    masks: Masks | None = None,
    parameters: Parameters = None,
    *,
    on_rows: Progress = lambda done, total: None,
    **options: Unpack[Keywords],
) -> Tensor:
    """The Gram matrix J J^T of the Jacobian of all outputs with respect to the named parameters.

    Samples vary slowest and outputs fastest: entry (i * k + c, j * k + d) belongs to output c of sample i and output d
    of sample j. Its trace is the squared Frobenius norm of J, and its nuclear norm.

    Args:
        model: Any `nn.Module`; it is not changed.
        x: Inputs, n samples: a tensor, a mapping of keyword arguments, or a pair whose first is taken.
        masks: Masks of some or all weights: the kernel of f(x; w * m) with respect to the kept weights.
        parameters: Names, globs, module types or modules; "*" takes all; None takes the prunable weights.
        on_rows: Called with the rows that are done, and all of them, as often as some are.
        **options: batchnorm, batch_size, dropout, parametrization, dtype, forward, memory: see `Options`.

    Returns:
        (n * k, n * k), symmetric, float64, on the model's device.

    Raises:
        ConfigError: an unknown parameter or option, BatchNorm without `batchnorm`, or a kernel larger than `memory`.
        DataError: the inputs are complex, or there are none.
        MaskError: the masks are another model's.
        UnsupportedModelError: the model is random, or cannot be run.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> kernel(model, torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[5.0, 2.0], [2.0, 1.0]]
    """
    with isolated(0, device_of(model)):
        return gram(Outputs.of(model, x, masks, parameters, **options), on_rows)


def gram(outputs: Outputs, on_rows: Progress = lambda done, total: None) -> Tensor:
    """The kernel of these outputs; call it under `isolated`.

    Where the Jacobian does not fit into memory beside the kernel, it is computed block by block, and the rows after a
    block once more for each: with b blocks the work is (b + 1) / 2 times as much.
    """
    total = outputs.size
    result = _room_for_kernel(outputs)
    held = _rows_held(outputs)
    step = total if held >= total else max(1, held // 2)
    done, work = 0, sum(total - low for low in range(0, total, step))
    for low in range(0, total, step):
        block = torch.empty(min(step, total - low), outputs.width, dtype=outputs.dtype, device=outputs.net.device)
        budget = outputs.options.memory - 8 * total**2 - block.numel() * block.element_size()
        for part in rows(outputs, first=low, memory=budget):
            inside = min(part.count, max(0, low + step - part.start))
            joined = part.joined()
            if inside:
                block[part.start - low : part.start - low + inside] = joined[:inside]
            if inside < part.count:
                start, stop = part.start + inside, part.start + part.count
                cross = _product(joined[inside:], block)
                result[start:stop, low : low + len(block)] = cross
                result[low : low + len(block), start:stop] = cross.T
            done += part.count
            on_rows(done, work)
        result[low : low + len(block), low : low + len(block)] = _product(block, block)
    return result


def _room_for_kernel(outputs: Outputs) -> Tensor:
    total = outputs.size
    if 8 * total**2 + 4 * row_bytes(outputs) > outputs.options.memory:
        raise ConfigError(
            f"The kernel of {outputs.samples} samples with {outputs.per_sample} outputs each is {total:,} x {total:,}, "
            f"{gib(8 * total**2)} GiB, and does not fit into memory={gib(outputs.options.memory)} GiB beside the "
            f"Jacobian's rows of {gib(row_bytes(outputs))} GiB: take fewer samples, raise memory=, or use "
            "sapwood.ntk.products(...), which multiplies with the kernel without forming it."
        )
    return torch.zeros(total, total, dtype=torch.float64, device=outputs.net.device)


def _rows_held(outputs: Outputs) -> int:
    """Rows that fit beside the kernel, with a quarter of the memory left to the backward passes."""
    free = 0.75 * outputs.options.memory - 8 * outputs.size**2
    return int(max(free, 0) // row_bytes(outputs))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product a b^T in float64, whose terms are rounded to the precision of a and b."""
    result = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for low in range(0, a.shape[1], COLUMNS):
        result += a[:, low : low + COLUMNS] @ b[:, low : low + COLUMNS].T
    return result
