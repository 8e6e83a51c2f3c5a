"""What a kernel depends on besides the model, the inputs, the masks and the parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch

from sapwood.checks import Count, check
from sapwood.errors import ConfigError, unknown_name
from sapwood.functional import Forward

BATCHNORM = ("train", "eval", "calibrated")
PARAMETRIZATIONS = ("standard", "ntk")
DROPOUT = ("refuse", "off")
MEMORY = 2 * 2**30


@dataclass(frozen=True)
class Options:
    """How the outputs are computed, and in how much memory.

    Attributes:
        batchnorm: What BatchNorm does; has to be said if the model has any, since spectra differ by orders of
            magnitude. "train": it normalises with the statistics of its batch, and the gradient goes through them, so
            that the outputs of one sample depend on the others. "eval": it uses the running statistics. "calibrated":
            it uses those of its batch as constants (the mode in which NTK-SAP scores).
        batch_size: Samples whose statistics are shared, in the order of the inputs; None: all of them. Without effect
            in "eval".
        dropout: "refuse" refuses a model whose dropout is active (`model.eval()` turns it off); "off" turns it off.
        parametrization: "standard" takes derivatives with respect to the weights themselves; "ntk" with respect to
            weights in units of their initial standard deviation, sqrt(2 / fan-in), in which wide networks have a limit.
        dtype: Precision of the derivatives; None: the weights' own (float32 for half-precision weights).
        forward: `forward(model, inputs)`, for models that are not simply called.
        memory: Bytes that the derivatives and the kernel may take together; what is left over is computed anew.
    """

    batchnorm: str | None = None
    batch_size: int | None = None
    dropout: str = "refuse"
    parametrization: str = "standard"
    dtype: torch.dtype | None = None
    forward: Forward | None = None
    memory: Count = MEMORY

    def __post_init__(self) -> None:
        for name, legal in (("dropout", DROPOUT), ("parametrization", PARAMETRIZATIONS), ("batchnorm", BATCHNORM)):
            value = getattr(self, name)
            if value not in legal and not (name == "batchnorm" and value is None):
                raise unknown_name(name, str(value), legal)
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1, or None for all samples.")
        if self.dtype not in (None, torch.float32, torch.float64):
            raise ConfigError(f"dtype is {self.dtype}; a kernel is computed in torch.float32 or torch.float64.")
        check(self)


class Keywords(TypedDict, total=False):
    """The fields of `Options`, as keyword arguments."""

    batchnorm: str | None
    batch_size: int | None
    dropout: str
    parametrization: str
    dtype: torch.dtype | None
    forward: Forward | None
    memory: int
