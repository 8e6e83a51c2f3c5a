"""What a run costs: floating-point operations by layer and under masks, and the peak of the memory in use."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sapwood.isolation import isolated, skeleton
from sapwood.masks import Count, Masks


def flops(model: nn.Module, masks: Masks, input_shape: Iterable[int]) -> Count | None:
    """FLOPs of a forward pass on one input, in all and those that kept weights take part in.

    Convolutions and matrix products count, two a multiply-add, as PyTorch's counter has them; the FLOPs of a module are
    kept in the proportion of its kept weights. This is arithmetic on masks: dense kernels save none of it.

    Args:
        model: The model; a copy without tensors is run, which takes no time and changes nothing.
        masks: Its masks.
        input_shape: Shape of one sample without the batch.

    Returns:
        Kept and all FLOPs; None for a model that cannot be run without values.
    """
    counter = FlopCounterMode(display=False)
    try:
        with isolated(0, torch.device("cpu")), torch.no_grad(), torch.device("meta"), counter:
            skeleton(model).eval()(torch.empty(1, *input_shape))
    except Exception:  # whatever somebody's forward may need values for
        return None
    root = type(model).__name__
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    own = {name.removeprefix(root).removeprefix("."): _own(name, by_module) for name in by_module if name != "Global"}
    kept = sum(own.values()) - sum(own.get(m, 0) * (1 - count.density) for m, count in _by_module(masks, own).items())
    return Count(round(kept), sum(own.values()))


def _own(module: str, flops: dict[str, int]) -> int:
    """The FLOPs of a module less those of the counted modules inside it."""
    inside = [name for name in flops if name.startswith(f"{module}.")]
    outermost = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
    return flops[module] - sum(flops[name] for name in outermost)


def _by_module(masks: Masks, counted: Iterable[str]) -> dict[str, Count]:
    """Kept weights of every module with FLOPs; a weight counts to the innermost one that it is in."""
    modules: dict[str, Count] = {}
    for name, count in masks.per_layer().items():
        within = [module for module in counted if not module or name.startswith(f"{module}.")]
        module = max(within, key=len, default="")
        before = modules.get(module, Count(0, 0))
        modules[module] = Count(before.kept + count.kept, before.total + count.total)
    return modules


def reset_peak(device: torch.device) -> None:
    """Begins a measurement of `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux only; elsewhere the peak is that of the process so far
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak since `reset_peak`: of tensors on a GPU; on a CPU the whole resident process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
