"""What scoring must not touch: the caller's random state, autograd and autocast modes, and the module itself."""

from __future__ import annotations

import copy
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sapwood.errors import UnsupportedModelError
from sapwood.names import Passing, wrapped

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
    surrounds the call), tensors that are made without a device have values, attention takes its ordinary path, which
    autograd can differentiate twice, and what torch says of functions of its own that it is about to drop stays unsaid:
    nobody outside of torch can act on it.

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
        if torch.empty(0).is_meta:  # made without a device, within `torch.device("meta")`: it would hold no values
            stack.enter_context(device)
        stack.enter_context(warnings.catch_warnings())
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch\b")
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


@dataclass(frozen=True, eq=False)
class RandomState:
    """The state of every global generator that a forward may draw from: torch's, numpy's and Python's.

    Attributes:
        device: The device whose generator is among them.
        cpu: State of torch's CPU generator.
        cuda: State of the device's own generator, if it has one.
        numpy: State of numpy's.
        python: State of Python's.
    """

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None
    numpy: Any
    python: Any

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present state."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Puts every generator back."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState):
            return NotImplemented
        pairs = ((self.cpu, other.cpu), (self.cuda, other.cuda))
        same = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
        numpy_same = all(np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True))
        return same and numpy_same and self.python == other.python

    __hash__ = None  # type: ignore[assignment]  # equality by content


def _seed(seed: int, device: torch.device) -> None:
    """Seeds the CPU's and the model's device's generators only: `torch.manual_seed` would seed every GPU."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


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
    for module in reversed(list(model.modules())):  # the innermost wrapper first
        if (attribute := wrapped(module)) is not None:
            memo[id(module)] = Passing(attribute, copied(module.get_submodule(attribute), memo), module)
    return copied(model, memo)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; `memo` says what stands for which object in it, by id.

    Raises:
        UnsupportedModelError: the module cannot be copied.
    """
    try:
        result = copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied, which is needed so as to leave it untouched: {error}. "
            "Keep locks, files and process groups out of the module's attributes, and wrap it (FSDP) afterwards."
        ) from error
    _refuse_shared(model, result)
    return result


def _refuse_shared(model: nn.Module, copied: nn.Module) -> None:
    """Where a module copies itself in a way of its own, the copy may hold the user's modules and tensors."""
    own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for named in (copied.named_modules(), copied.named_parameters(), copied.named_buffers()):
        for name, part in named:
            if id(part) in own:
                raise UnsupportedModelError(
                    f"{name!r} ({type(part).__name__}) is its own copy under copy.deepcopy, so that scoring would "
                    "write into the model: let its __deepcopy__ copy it, or leave the method out."
                )
