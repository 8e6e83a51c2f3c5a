"""What a run works on: the data set in the form that training asks for, and the model at its initial weights."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sapwood import data, models
from sapwood.data import Dataset, Images
from sapwood.data.download import data_root
from sapwood.experiments.config import INIT_SEED, Place
from sapwood.files import stamp
from sapwood.isolation import isolated
from sapwood.training import TrainConfig

CHANGEABLE = {"folder": "", "tiny-imagenet": "tiny-imagenet-200", "fashion-mnist": "FashionMNIST"}
"""Data sets whose files are taken as they are, and where these lie under the root."""
EVALUATION_BATCH = 1000  # no gradients are held, so it may be larger than a training batch


@functools.lru_cache(maxsize=1)
def _load(name: str, root: Path | None, offline: bool, resolution: int | None, state: str) -> Dataset:
    return data.load(name, root, offline=offline, resolution=resolution)


def load_data(name: str, resolution: int | None, place: Place) -> Dataset:
    """The data set, read once a process, and anew where one of its files has changed."""
    return _load(name, place.data_root, place.offline, resolution, _state(name, place.data_root))


def _state(name: str, root: Path | None) -> str:
    """Changes with the files of a data set that may change: those of the others are compared with published sums."""
    if name not in CHANGEABLE:
        return ""
    folder = data_root(root) / CHANGEABLE[name]
    try:
        return stamp(sorted(folder.rglob("*")))
    except OSError:  # a file went away just now, which is for the loader to tell
        return ""


def create_model(name: str, dataset: Dataset, seed: int) -> nn.Module:
    """The model for a data set, at the initial weights of a run's seed; the global random state is left alone."""
    channels, height, width = dataset.input_shape
    size = height if height == width else None
    return initialised(name, seed, num_classes=dataset.num_classes, in_channels=channels, image_size=size)


def initialised(name: str, seed: int, *, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    """A model at the initial weights of a run's seed, whichever generator they are drawn from."""
    with isolated(seed + INIT_SEED, torch.device("cpu")):
        return models.create(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


@dataclass(frozen=True)
class Split:
    """Training, validation and test batches of a data set, kept on the device."""

    dataset: Dataset
    train: Images
    validation: Images | None
    test: Images
    batch_size: int
    device: torch.device

    @classmethod
    def of(cls, dataset: Dataset, config: TrainConfig, device: torch.device) -> Split:
        """The training images that `config.share` leaves, and `config.validation` of them held out."""
        train, validation = dataset.train, None
        if config.share < 1:
            train, _ = data.split(train, 1 - config.share, config.seed)
        if config.validation:
            train, validation = data.split(train, config.validation, config.seed)
            validation = _on(validation, device)
        return cls(dataset, _on(train, device), validation, _on(dataset.test, device), config.batch_size, device)

    def train_batches(self, generator: torch.Generator) -> data.Batches:
        """One epoch, shuffled and augmented."""
        return data.batches(
            self.train,
            self.dataset,
            batch_size=self.batch_size,
            generator=generator,
            augment=True,
            device=self.device,
        )

    def validation_batches(self) -> Iterable[tuple[Tensor, Tensor]] | None:
        """The held-out images, or None."""
        return None if self.validation is None else self._plain(self.validation)

    def test_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The test images."""
        return self._plain(self.test)

    def _plain(self, images: Images) -> data.Batches:
        return data.batches(images, self.dataset, batch_size=EVALUATION_BATCH, device=self.device)


def _on(images: Images, device: torch.device) -> Images:
    """Moves images that are in memory once, and not once an epoch."""
    pixels = images.images
    return replace(images, images=pixels.to(device)) if isinstance(pixels, Tensor) else images
