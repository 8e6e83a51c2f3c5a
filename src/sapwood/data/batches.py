"""From images to normalised batches, for training, for evaluation and for pruning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapwood.data.augmentation import Augmentation
from sapwood.data.images import Dataset, Images
from sapwood.errors import ConfigError, DataError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Batches:
    """Iterates over (input, target) pairs as often as asked; `batches` makes one."""

    images: Images
    mean: Tensor  # channels x 1 x 1, of pixels in 0 .. 255
    std: Tensor
    batch_size: int
    generator: torch.Generator | None
    augmentation: Augmentation | None
    device: torch.device
    drop_last: bool

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        if self.generator is None:
            order = torch.arange(len(self.images))
        else:
            order = torch.randperm(len(self.images), generator=self.generator, device=self.generator.device)
        order = order.to(self.images.labels.device)
        for i in range(len(self)):
            yield self._batch(order[i * self.batch_size : (i + 1) * self.batch_size])

    def _batch(self, chosen: Tensor) -> Batch:
        pixels = self.images.take(chosen).to(self.device)
        if self.augmentation is not None and self.generator is not None:
            pixels = self.augmentation(pixels, self.generator)
        # the conversion first: arithmetic on mixed types is ten times slower
        return pixels.float().sub(self.mean).div_(self.std), self.images.labels[chosen]


def batches(
    images: Images,
    dataset: Dataset,
    *,
    batch_size: int,
    generator: torch.Generator | None = None,
    augment: bool = False,
    device: str | torch.device = "cpu",
    drop_last: bool = False,
) -> Batches:
    """Normalised batches of images, as an iterable that can be walked again and again.

    Args:
        images: What to walk over: a part of the data set, or of a `split` of it.
        dataset: Gives the statistics and the augmentation.
        batch_size: Images a batch; the last batch may be smaller.
        generator: Shuffles anew in each walk; None keeps the order. The same state gives the same batches.
        augment: Whether to apply the data set's augmentation, with draws from the generator.
        device: Where the images are kept and the batches are made.
        drop_last: Whether to leave a smaller last batch out.

    Returns:
        An iterable of (input, target): float32 n x channels x height x width, and int64 n.

    Raises:
        ConfigError: For a batch size below 1, or augmentation without a generator.
        DataError: If no batch would be left.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
    if augment and generator is None:
        raise ConfigError("augment=True needs a generator, from which its random draws come.")
    if drop_last and len(images) < batch_size:
        raise DataError(f"drop_last leaves no batch: there are {len(images)} images and batch_size is {batch_size}.")
    device = torch.device(device)
    pixels = images.images.to(device) if isinstance(images.images, Tensor) else images.images
    return Batches(
        images=replace(images, images=pixels, labels=images.labels.to(device)),
        mean=255 * torch.tensor(dataset.mean, device=device, dtype=torch.float32).view(-1, 1, 1),
        std=255 * torch.tensor(dataset.std, device=device, dtype=torch.float32).view(-1, 1, 1),
        batch_size=batch_size,
        generator=generator,
        augmentation=dataset.augmentation if augment else None,
        device=device,
        drop_last=drop_last,
    )


def pruning_batches(dataset: Dataset, *, per_class: int = 10, batch_size: int = 256, seed: int) -> list[Batch]:
    """The balanced sample of training images on which SNIP, GraSP and their like score.

    The images are not augmented (the authors of NTK-SAP augment them), and every walk over the list sees the same.

    Args:
        dataset: Images come from its training part.
        per_class: Images of each class; the default 10 is that of Lee et al. 2019 (SNIP) and Wang et al. 2020 (GraSP).
        batch_size: Images a batch; the classes are mixed.
        seed: The same seed gives the same sample.

    Returns:
        (input, target) pairs as from `batches`, on the CPU.

    Raises:
        DataError: If a class has fewer images than asked for.
    """
    labels = dataset.train.labels
    counts = labels.bincount(minlength=dataset.num_classes)
    rarest = int(counts.argmin())
    if per_class < 1 or counts[rarest] < per_class:
        raise DataError(
            f"A sample of {per_class} images a class was asked for, but class {rarest} of {dataset.name} has "
            f"{int(counts[rarest])} training images: ask for between 1 and that many a class, or add images."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    chosen = [order[labels[order] == label][:per_class] for label in range(dataset.num_classes)]
    mixed = torch.cat(chosen)[torch.randperm(per_class * dataset.num_classes, generator=generator)]
    return list(batches(dataset.train.subset(mixed), dataset, batch_size=batch_size))
