"""Derivatives that several criteria need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sapwood.functional import FunctionalModel


@contextmanager
def twice_differentiable(net: FunctionalModel) -> Iterator[None]:
    """Fused attention kernels, and cuDNN's recurrent ones, have no second derivative; the plain ones do."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in net.module.modules())
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=not recurrent):
        yield
