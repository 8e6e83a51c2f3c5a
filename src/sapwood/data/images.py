"""What a data set is here: uint8 images, integer labels, and the numbers that training on them needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sapwood.data.augmentation import Augmentation
from sapwood.data.files import ImageFiles
from sapwood.errors import DataError


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels.

    Attributes:
        images: uint8, n x channels x height x width: a tensor, or `ImageFiles` that decodes what it is asked for.
        labels: int64, n.
    """

    images: Tensor | ImageFiles
    labels: Tensor

    def __post_init__(self) -> None:
        count = self.images.shape[0]
        if count == 0 or count != len(self.labels):
            raise DataError(
                f"Images need one label each and at least one of them, not {count} with {len(self.labels)}."
            )
        if isinstance(self.images, Tensor) and (self.images.dtype != torch.uint8 or self.images.ndim != 4):
            raise DataError(
                "Images must be uint8 of shape n x channels x height x width, "
                f"not {self.images.dtype} of shape {tuple(self.images.shape)}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Tensor:
        """The pixels of the images at these positions: uint8, len(indices) x channels x height x width."""
        if isinstance(self.images, Tensor):
            return self.images.index_select(0, indices)  # eight times as fast as images[indices]
        return self.images[indices]

    def subset(self, indices: Tensor) -> Images:
        """The images at these positions, in this order."""
        images = self.take(indices) if isinstance(self.images, Tensor) else self.images.subset(indices)
        return Images(images, self.labels[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set in two parts.

    Attributes:
        name: As in `load`.
        train: For pruning and training.
        test: For the figures that are reported.
        num_classes: Labels are 0 .. num_classes - 1.
        mean: Of each channel, of pixels scaled to 0 .. 1.
        std: Of each channel, likewise.
        augmentation: The usual one for training on this set.
    """

    name: str
    train: Images
    test: Images
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.input_shape[0]:
            raise DataError(f"{self.name}: mean and std need one value for each of the {self.input_shape[0]} channels.")
        if self.test.images.shape[1:] != self.train.images.shape[1:]:
            raise DataError(
                f"{self.name}: training images are {self.input_shape}, but test images "
                f"{tuple(self.test.images.shape[1:])}: give a resolution."
            )
        for part in (self.train, self.test):
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= self.num_classes:
                raise DataError(f"{self.name}: labels must be 0 .. {self.num_classes - 1}, but are {low} .. {high}.")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """One sample's shape, (channels, height, width)."""
        return tuple(self.train.images.shape[1:])


def split(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Sets a share of every class aside, for validation.

    Args:
        images: What to split, usually `dataset.train`.
        fraction: The share of the second part, between 0 and 1.
        seed: The same seed gives the same split.

    Returns:
        (rest, validation), both in the original order.

    Raises:
        DataError: If a part would be left without one image of each class.
    """
    from sklearn.model_selection import train_test_split  # here, because scikit-learn takes a second to import

    try:
        parts = train_test_split(
            np.arange(len(images)), test_size=fraction, random_state=seed, stratify=images.labels.numpy()
        )
    except ValueError as error:
        raise DataError(f"{len(images)} images cannot be split by class with fraction={fraction}: {error}") from error
    rest, validation = (images.subset(torch.from_numpy(np.sort(part))) for part in parts)
    return rest, validation


def channel_statistics(images: Images, at_most: int = 2_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in 0 .. 1, over at most so many evenly spaced images.

    Fewer where they are so large that they would take more than 4 GiB.
    """
    at_most = max(1, min(at_most, 2**32 // math.prod(images.images.shape[1:])))
    chosen = torch.arange(0, len(images), max(1, len(images) // at_most))
    pixels = images.take(chosen).transpose(0, 1).flatten(1)
    # Counting the 256 values takes a hundredth of the memory that a float copy of the pixels would.
    counts = torch.stack([channel.bincount(minlength=256) for channel in pixels]).double()
    values = torch.arange(256, dtype=torch.double) / 255
    mean = counts @ values / pixels.shape[1]
    std = (counts @ values.square() / pixels.shape[1] - mean.square()).clamp_min(1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
