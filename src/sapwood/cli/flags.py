"""Flags that several commands share."""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Suppress, arg

from sapwood.training import TrainConfig, fabric_for

if TYPE_CHECKING:  # imported late, as it is slow to import
    from lightning_fabric import Fabric

Model = Annotated[str, arg(metavar="MODEL")]
File = Annotated[Path, arg(metavar="FILE")]
Folder = Annotated[Path, arg(metavar="DIR")]
OptionalFolder = Annotated[Path | None, arg(metavar="DIR")]  # tyro looks at the outermost annotation


@dataclass(frozen=True)
class Training(TrainConfig):
    """How the networks are trained, by SGD."""

    seed: Suppress[int] = 0  # follows from the seed of the run
    start_epoch: Suppress[int] = 0  # follows from how a network is retrained

    def __post_init__(self) -> None:
        """Leaves the checks to the TrainConfig that is made of this, whose errors reach `main`."""


@dataclass(frozen=True)
class Together:
    """Devices that share every batch, one process each; `torchrun --nproc-per-node 2 -m sapwood ...` starts them too.

    Attributes:
        devices: How many of them; with --device cpu, how many processes. The default is one, or as many as torchrun
            started. BatchNorm normalises with the statistics of each process's share of a batch.
        strategy: ddp (each holds the model), fsdp (each holds a shard of it), or auto: ddp for several.
    """

    devices: int | None = None
    strategy: str = "auto"

    def fabric(self, device: str, precision: str) -> Fabric | None:
        """The processes, started; None where there is one, which needs no others.

        Raises:
            ConfigError: a wrong name, devices that are not there, or a precision that they cannot compute in.
        """
        started = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
        devices = started if self.devices is None else self.devices
        if (devices, self.strategy) == (1, "auto"):
            return None
        importlib.import_module("lightning_fabric")  # which sets the level that the next line changes
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        return fabric_for(device, devices, self.strategy, precision)
