"""Flags that several commands share."""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Suppress, arg

from sapwood import data, models
from sapwood.checks import Known, OneOf, Range, Rule
from sapwood.errors import ConfigError
from sapwood.experiments import trackers
from sapwood.training import TrainConfig, fabric_for
from sapwood.training.devices import STRATEGIES

if TYPE_CHECKING:  # imported late, as it is slow to import
    from lightning_fabric import Fabric


LONGEST = 255  # bytes of a file's name


class WritableFolder(Rule):
    """A folder that is there or can be made."""

    def check(self, name: str, value: Path) -> None:
        """Refuses what is no folder, or may not be written to; makes nothing."""
        if long := [part for part in value.parts if len(os.fsencode(part)) > LONGEST]:
            raise ConfigError(f"{name} has a part of {len(os.fsencode(long[0]))} bytes, where names end at {LONGEST}.")
        there = next(place for place in (value, *value.absolute().parents) if os.path.lexists(place))
        if not there.is_dir():
            raise ConfigError(f"{there} is a file; a folder is expected in its place for {name}: choose another one.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"The folder {there} may not be written to: choose another {name}.")


class WritableFile(Rule):
    """A file in such a folder."""

    def check(self, name: str, value: Path) -> None:
        """Refuses a folder, a pipe or a device, and what `WritableFolder` refuses; writes nothing."""
        if os.path.lexists(value) and not value.is_file():
            raise ConfigError(f"{value} is no regular file that could be replaced: choose another {name}.")
        WritableFolder().check(name, value.absolute().parent)


Model = Annotated[str, arg(metavar="MODEL"), Known(models.check_name)]
DataSet = Annotated[str, OneOf("data set", tuple(data.names()))]
File = Annotated[Path, arg(metavar="FILE")]
NewFile = Annotated[Path | None, arg(metavar="FILE"), WritableFile()]  # tyro looks at the outermost annotation
Tracker = Annotated[str, Known(trackers.find)]
Folder = Annotated[Path, arg(metavar="DIR"), WritableFolder()]
OptionalFolder = Annotated[Path | None, arg(metavar="DIR"), WritableFolder()]


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

    devices: Annotated[int, Range(1), Range(high=1024)] | None = None
    strategy: Annotated[str, OneOf("strategy", STRATEGIES)] = "auto"

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
