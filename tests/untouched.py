"""What scoring has no right to touch: everything of a model, and what surrounds it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Luck:
    """The state of every generator at one moment."""

    torch: Tensor
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> Luck:
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def same(self, other: Luck) -> bool:
        numpy = all(np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True))
        return torch.equal(self.torch, other.torch) and numpy and self.python == other.python


class Untouched:
    """Looks at a model and at the generators now, and again when it is asked to."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before, self.luck, self.around = snapshot(model), Luck.now(), surroundings()

    def check(self) -> None:
        after = snapshot(self.model)
        assert after.keys() == self.before.keys()
        for name, value in self.before.items():
            assert after[name] == value, f"{name} was touched"
        assert self.luck.same(Luck.now()), "a global generator has moved"
        assert self.around == surroundings()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that scoring has no right to: values by copy, things by identity."""
    seen: dict[str, Any] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        seen[f"{prefix}: class"] = (id(module), type(module), module.training)
        for key, value in vars(module).items():
            where = f"{prefix}.{key}"
            seen[where] = kept(value)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            seen[f"{prefix}/{key}"] = kept(tensor)
    return seen


def kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        grad = None if value.grad is None else (id(value.grad), value.grad.tolist())
        bits = value.detach().double().contiguous().numpy().tobytes()  # which holds all narrower ones
        return id(value), value._version, value.requires_grad, value.data_ptr(), grad, value.dtype, bits
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().tolist()
    if isinstance(value, dict):
        return {key: kept(entry) for key, entry in value.items()}
    return (id(value), value) if isinstance(value, int | float | str | bool | None) else id(value)


def surroundings() -> tuple:
    return (
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.backends.mha.get_fastpath_enabled(),
        torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
        torch.overrides._get_current_function_mode_stack() == [],
    )  # fmt: skip
