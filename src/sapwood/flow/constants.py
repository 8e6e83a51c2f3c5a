"""What constants are in a positive flow: as non-negative as its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Constants:
    """How a flow takes the constants that it meets.

    Args:
        named: Parameters and buffers by name, which are taken as they are.
        paths: Constants count paths: they are one wherever they are not zero, and add none.
    """

    def __init__(self, named: Mapping[str, Tensor], paths: bool) -> None:
        self.named = {id(tensor): name for name, tensor in named.items()}
        self.kept = list(named.values())  # as long as they live, their ids are theirs
        self.paths = paths

    def is_negative(self, constant: Tensor | float) -> bool:
        """Whether a constant turns a flow round; parameters and buffers do not, they are taken by their size."""
        if not isinstance(constant, Tensor):
            return constant < 0
        if id(constant) in self.named or constant.requires_grad:
            return False
        return bool((constant <= 0).all()) and bool((constant < 0).any())

    def factor(self, constant: Any) -> Any:
        """A constant that scales a flow."""
        if self.paths and not isinstance(constant, bool):
            return self._indicator(constant)
        return abs(constant) if isinstance(constant, float | int) else self.weight(constant)

    def shift(self, constant: Any) -> Any:
        """A constant that is added to a flow."""
        if self.paths and id(constant) not in self.named and isinstance(constant, float | Tensor):
            return constant * 0 if isinstance(constant, float) or constant.is_floating_point() else constant
        return abs(constant) if isinstance(constant, float) else self.weight(constant)

    def weight(self, constant: Any) -> Any:
        """A constant of a linear map: non-negative, as the parameters are; computed weights stay as they are."""
        if not isinstance(constant, Tensor) or not constant.is_floating_point():
            return constant
        if id(constant) in self.named or constant.requires_grad:
            return constant
        return (constant != 0).to(constant.dtype) if self.paths else constant.abs()

    def _indicator(self, constant: Any) -> Any:
        if isinstance(constant, Tensor):
            return (constant != 0).to(torch.float64)
        return type(constant)(constant != 0) if isinstance(constant, float | int) else constant
