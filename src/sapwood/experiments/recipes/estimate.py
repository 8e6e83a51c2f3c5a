"""What a recipe costs before it is run: images, FLOPs, and hours on this device from a few timed steps."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sapwood.data import Dataset, Images
from sapwood.data.augmentation import Augmentation
from sapwood.errors import unknown_name
from sapwood.experiments import levels
from sapwood.experiments.cost import flops
from sapwood.experiments.environment import cores
from sapwood.experiments.material import Split, create_model
from sapwood.experiments.recipes.recipe import Recipe
from sapwood.masks import Masks
from sapwood.training import TrainConfig, train

BACKWARD = 3  # a training step costs about three forward passes
EPOCHS, STEPS = 3, 2  # of the probe
PROBE_FLOPS = 1e10  # of one of its steps on a CPU, where a smaller batch is as fast by the image


@dataclass(frozen=True)
class Facts:
    """What must be known of a data set to estimate a training: training images, classes, one image's shape."""

    images: int
    classes: int
    shape: tuple[int, int, int]


FACTS = {
    "digits": Facts(1_442, 10, (1, 8, 8)),
    "cifar10": Facts(50_000, 10, (3, 32, 32)),
    "cifar100": Facts(50_000, 100, (3, 32, 32)),
    "fashion-mnist": Facts(60_000, 10, (1, 28, 28)),
    "tiny-imagenet": Facts(100_000, 200, (3, 64, 64)),
    "folder": Facts(1_281_167, 1_000, (3, 224, 224)),  # ImageNet, as a guess
}


@dataclass(frozen=True)
class Estimate:
    """The cost of a recipe's trainings; pruning comes on top (a few percent for NTK-SAP in the paper's settings).

    Attributes:
        runs: Pruned and dense networks that are trained, intermediate levels included.
        images: Training images that pass through networks, over all runs and epochs.
        flops: Of one forward pass of one image, two a multiply-add; None where they cannot be counted.
        hours: Of training, with a run on every CPU core at a time, or one on a GPU; None without a probe.
    """

    runs: int
    images: int
    flops: int | None
    hours: float | None


def estimate(recipe: Recipe, device: torch.device | None) -> Estimate:
    """Counts, and times a few steps on `device`; None times nothing.

    Raises:
        SapwoodError: the recipe names what does not exist.
    """
    configs = recipe.grid.runs(recipe.train)
    every = {each.id: each for config in configs for each in (*levels.chain(config), config)}
    runs = len(every)
    network = (recipe.grid.data, recipe.grid.resolution, recipe.grid.model)
    total = forward_flops(*network)
    epochs = sum(each.train.epochs - each.rewind_epoch for each in every.values())
    trained_on = FACTS[recipe.grid.data].images * recipe.train.share * (1 - recipe.train.validation)
    images = round(epochs * trained_on)
    if device is None:
        return Estimate(runs, images, total, None)
    batch, workers = recipe.train.batch_size, 1
    if device.type == "cpu":
        batch, workers = max(2, min(batch, int(PROBE_FLOPS / (BACKWARD * (total or 1))))), cores()
    config = TrainConfig(
        epochs=EPOCHS,
        batch_size=batch,
        milestones=(),
        precision=recipe.train.precision,
        channels_last=recipe.train.channels_last,
    )
    return Estimate(runs, images, total, images / (3600 * workers * speed(*network, config, device)))


@functools.cache  # recipes have networks in common
def forward_flops(data: str, resolution: int | None, model: str) -> int | None:
    """FLOPs of one forward pass of one image; None where they cannot be counted."""
    dataset = synthetic(data, resolution, images=2)
    with torch.device("meta"):  # no memory, no time
        count = flops(create_model(model, dataset, 0), Masks({}), dataset.input_shape)
    return None if count is None else count.total


@functools.cache
def speed(data: str, resolution: int | None, model: str, config: TrainConfig, device: torch.device) -> float:
    """Training images a second, in one thread of a CPU: the best of a few short epochs on random images."""
    dataset = synthetic(data, resolution, images=STEPS * config.batch_size)
    network = create_model(model, dataset, 0).to(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as runs that are computed side by side have it
    try:
        history = train(network, Split.of(dataset, config, device), config, device=device).history
    finally:
        torch.set_num_threads(threads)
    return max(row["images_per_second"] for row in history)


def synthetic(data: str, resolution: int | None, *, images: int) -> Dataset:
    """Random images in the shape and with the number of classes of a data set; two of them for the test."""
    if data not in FACTS:
        raise unknown_name("data set", data, FACTS)
    facts = FACTS[data]
    size = facts.shape[1:] if resolution is None else (resolution, resolution)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images + 2, facts.shape[0], *size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(images + 2) % facts.classes
    channel = (0.5,) * facts.shape[0]
    parts = Images(pixels[:images], labels[:images]), Images(pixels[images:], labels[images:])
    return Dataset(data, *parts, facts.classes, channel, channel, Augmentation(padding=1, flip=True))
