"""Flags that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Suppress, arg

from sapwood.training import TrainConfig

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
