"""What scoring must not touch: the caller's random state, autograd and autocast modes, and the module itself."""

from __future__ import annotations

import copy
import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sapwood.errors import UnsupportedModelError

_alone = threading.RLock()  # what is changed and put back here belongs to the whole process


def _fresh_lock() -> None:
    """A forked process has none of the threads that might hold the lock."""
    global _alone
    _alone = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fresh_lock)


@contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds every global generator inside and puts them back outside, also after an error.

    Inside, gradients are on, inference mode and autocast are off (scores are computed in float32 or better whatever
    surrounds the call), and attention takes its ordinary path, which autograd can differentiate twice.

    All of these belong to the process, so that one thread at a time is inside, and others wait. It may enter again.
    """
    with _alone:
        yield from _isolated(seed, device)


def _isolated(seed: int, device: torch.device) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it would take a second
            # No recompilation for every new set of weights.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in filter(torch.amp.is_autocast_available, {"cpu", device.type}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            _seed(seed, device)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            random.setstate(python)
            np.random.set_state(numpy)


def _seed(seed: int, device: torch.device) -> None:
    """Seeds the CPU's and the model's device's generators only: `torch.manual_seed` would seed every GPU."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP, `torch.compile` and Fabric wrappers."""
    for attribute in ("_orig_mod", "_forward_module"):
        if isinstance(inner := getattr(model, attribute, None), nn.Module):
            return unwrapped(inner)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module)
    return model


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the module without its tensors (they are on the `meta` device), for `torch.func.functional_call`.

    Scoring runs on this copy, so modes, hooks and settings of the user's module cannot change; it costs no memory.

    Raises:
        UnsupportedModelError: the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for module in model.modules():  # tensors computed from parameters (old weight_norm) refuse deepcopy
        computed = [v for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf]
        memo |= {id(tensor): tensor.detach() for tensor in computed}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied, which scoring needs so as to leave it untouched: {error}. "
            "Keep locks, files and process groups out of the module's attributes."
        ) from error
