"""Where a run took place: versions and hardware, and the device a name stands for."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import sapwood
from sapwood.errors import ConfigError

if TYPE_CHECKING:  # imported late, as it is slow to import
    from lightning_fabric import Fabric


def is_device_name(name: str) -> None:
    """Refuses what is the name of a device on no machine.

    Raises:
        ConfigError: it is none.
    """
    try:
        kind = "cpu" if name == "auto" else torch.device(name).type
    except (RuntimeError, ValueError) as error:
        raise _no_device(name, error) from error
    if kind == "meta":
        raise ConfigError(f"On the device {name!r} tensors have no values; legal: auto, cpu, cuda, cuda:0.")


def device_of(name: str) -> torch.device:
    """The device behind "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:0".

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_device_name(name)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA raises an AssertionError
        raise _no_device(name, error) from error
    return device


def environment(device: torch.device, fabric: Fabric | None = None) -> dict[str, str]:
    """Versions and hardware, by name; of several processes as the first one has them."""
    several = {} if fabric is None else {"processes": f"{fabric.world_size} ({type(fabric.strategy).__name__})"}
    return {
        "sapwood": sapwood.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{_processor()}, {cores()} cores",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **several,
    }


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _no_device(name: str, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0]
    return ConfigError(f"There is no device {name!r} here ({reason}); legal: auto, cpu, cuda, cuda:0.")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or "unknown processor"
