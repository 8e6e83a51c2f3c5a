"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.checks import Natural, Resolution, check_arguments
from sapwood.data import bundled, folder
from sapwood.data.download import Source, data_root
from sapwood.data.images import Dataset, Images
from sapwood.errors import ConfigError, DataError, unknown_name

SETS: dict[str, Callable[[Source], Dataset]] = {
    "digits": bundled.digits,
    "cifar10": bundled.cifar10,
    "cifar100": bundled.cifar100,
    "fashion-mnist": bundled.fashion_mnist,
    "tiny-imagenet": folder.tiny_imagenet,
    "folder": folder.folder,
}


def names() -> list[str]:
    """The names that `load` knows, sorted."""
    return sorted(SETS)


def load(
    name: str,
    root: str | Path | None = None,
    *,
    offline: bool = False,
    resolution: Resolution | None = None,
    memory_limit: Natural = 8 * 2**30,
) -> Dataset:
    """Loads a data set; one that is not under `root` in torchvision's layout is downloaded there first.

    Args:
        name: One of `names()`.
        root: The folder of all data sets, by default $SAPWOOD_DATA or else the user's cache; for `folder`, the image
            folder itself.
        offline: Whether downloads are forbidden.
        resolution: Height and width to bring the images to, in pixels; None keeps theirs. Image files are resized on
            the short side and cut to the centre, arrays are interpolated by area.
        memory_limit: Bytes that one part of a data set may take when decoded; larger image folders stay on disk and are
            decoded batch by batch, larger arrays are refused.

    Returns:
        The data set, on the CPU.

    Raises:
        ConfigError: For an unknown name or an illegal resolution.
        DataError: For data that is missing or damaged.
    """
    check_arguments(load, locals())
    if name not in SETS:
        raise unknown_name("data set", name, SETS)
    if name == "folder" and root is None:
        raise ConfigError("The data set 'folder' needs root, the folder that holds train/CLASS/* and test/CLASS/*.")
    dataset = SETS[name](Source(data_root(root), offline, resolution, memory_limit))
    if resolution is None or dataset.input_shape[1:] == (resolution, resolution):
        return dataset
    train, test = (_resized(part, resolution, memory_limit) for part in (dataset.train, dataset.test))
    return replace(dataset, train=train, test=test)


def _resized(images: Images, resolution: int, memory_limit: int) -> Images:
    assert isinstance(images.images, Tensor)  # image files were decoded at this resolution
    needed = len(images) * images.images.shape[1] * resolution**2
    if needed > memory_limit:
        raise DataError(
            f"{len(images)} images at {resolution} pixels need {needed / 2**30:.1f} GiB of memory, more than the limit "
            f"of {memory_limit / 2**30:.1f} GiB: give a lower resolution, or raise memory_limit."
        )
    size = (resolution, resolution)
    parts = [F.interpolate(part.float(), size, mode="area").round().byte() for part in torch.split(images.images, 1000)]
    return Images(torch.cat(parts), images.labels)
