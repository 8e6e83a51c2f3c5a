"""BatchNorm with the statistics of the batch in front of it as constants, in the one pass that needs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sapwood.errors import UnsupportedModelError

_SIGNATURE = inspect.signature(F.batch_norm)


class BatchStatistics(TorchFunctionMode):
    """Inside, train-mode BatchNorm is a fixed affine map: (x - mean) / sqrt(variance + eps), scaled and shifted.

    Mean and *unbiased* variance are those of the map's own input over batch and positions, and constants: neither
    gradients nor tangents pass through them. A BatchNorm without running statistics is left alone.

    Args:
        record: Also write them into the running statistics, so that a later pass in eval mode is the same map.

    Raises:
        UnsupportedModelError: one BatchNorm is called twice in a pass that records.
    """

    def __init__(self, *, record: bool) -> None:
        super().__init__()
        self._record = record
        self._recorded: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replaces `F.batch_norm` in train mode; everything else runs as it is."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            call = _SIGNATURE.bind(*args, **kwargs)
            call.apply_defaults()
            given = call.arguments
            if given["training"] and given["running_mean"] is not None:
                return self._normalised(given)
        return func(*args, **kwargs)

    def _normalised(self, given: dict[str, Any]) -> Tensor:
        x: Tensor = given["input"]
        mean, variance = _statistics(x)
        if self._record:
            self._write(given, mean, variance)
        shape = (1, -1, *(1,) * (x.dim() - 2))
        scale = (variance + given["eps"]).rsqrt()
        if given["weight"] is not None:
            scale = scale * given["weight"]
        shift = -mean * scale
        if given["bias"] is not None:
            shift = shift + given["bias"]
        return torch.addcmul(shift.view(shape), x, scale.view(shape))

    def _write(self, given: dict[str, Any], mean: Tensor, variance: Tensor) -> None:
        if id(given["running_mean"]) in self._recorded:
            raise UnsupportedModelError(
                "A BatchNorm is called more than once in a forward pass, so that one pass cannot give the statistics "
                "for the next: set merged_statistics=False."
            )
        self._recorded.add(id(given["running_mean"]))
        given["running_mean"].copy_(mean)
        given["running_var"].copy_(variance)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of every channel."""
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel for BatchNorm's statistics, got {tuple(x.shape)}")
    with torch.no_grad():
        values = x.detach()
        mean, variance = values.new_zeros(x.shape[1]), values.new_ones(x.shape[1])
        torch.batch_norm_update_stats(values, mean, variance, 1.0)  # several times as fast as torch.var_mean
    return mean, variance
