"""Image folders: anybody's in ImageFolder layout, and Tiny-ImageNet as it comes in its zip."""

from __future__ import annotations

from pathlib import Path

import torch

from sapwood.data.augmentation import Augmentation
from sapwood.data.download import Remote, Source, unpacked
from sapwood.data.files import read
from sapwood.data.images import Dataset, Images, channel_statistics
from sapwood.errors import DataError

TINY_IMAGENET = Remote("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))

Labelled = list[tuple[Path, int]]


def folder(source: Source) -> Dataset:
    """Any images as `root/train/CLASS/*` and `root/test/CLASS/*` (or `val`, if there is no `test`), read as RGB.

    Classes are the sorted folder names of `train`. The statistics are measured on up to 2,000 training images.
    Augmentation is the flip and ImageNet's resized crop, taken from the image at its final resolution.
    """
    parts = [source.root / name for name in ("train", "test", "val")]
    found = [part for part in parts if part.is_dir() and _subfolders(part)]
    if len(found) < 2 or found[0] != parts[0]:
        raise DataError(
            f"{source.root} must hold train/CLASS/* and test/CLASS/* (or val/CLASS/*), but of these it has "
            f"{', '.join(part.name for part in found) or 'none'}: move the images of each class into such folders."
        )
    classes = {name: label for label, name in enumerate(_subfolders(found[0]))}
    train = _load(_list(found[0], classes), source)
    mean, std = channel_statistics(train)
    return Dataset(
        name="folder",
        train=train,
        test=_load(_list(found[1], classes), source),
        num_classes=len(classes),
        mean=mean,
        std=std,
        augmentation=Augmentation(flip=True, scale=(0.08, 1.0)),
    )


def tiny_imagenet(source: Source) -> Dataset:
    """Tiny-ImageNet (Stanford CS231n) from `root/tiny-imagenet-200`: 100,000 and 10,000 64x64 images, 200 classes.

    `test` is the official validation part: the labels of the official test part are not published.
    """
    base = unpacked(TINY_IMAGENET, source, "tiny-imagenet-200", ("train", "val"))
    classes = {name: label for label, name in enumerate(_subfolders(base / "train"))}
    annotations = base / "val" / "val_annotations.txt"
    test = _annotated(annotations, classes) if annotations.is_file() else _list(base / "val", classes)
    return Dataset(
        name="tiny-imagenet",
        train=_load(_list(base / "train", classes), source),
        test=_load(test, source),
        num_classes=len(classes),
        mean=(0.480, 0.448, 0.397),
        std=(0.276, 0.269, 0.282),
        augmentation=Augmentation(flip=True, scale=(0.1, 1.0), ratio=(0.8, 1.25)),
    )


def _subfolders(part: Path) -> list[str]:
    return sorted(entry.name for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list(part: Path, classes: dict[str, int]) -> Labelled:
    """Every image below part/CLASS, sorted; each class folder must be known and must hold images."""
    labelled: Labelled = []
    for name in _subfolders(part):
        files = sorted(file for file in (part / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{part / name} holds no images: add some, or remove the folder.")
        if name not in classes:
            raise DataError(f"{part / name} has no counterpart in train: its classes are {', '.join(classes)}.")
        labelled += [(file, classes[name]) for file in files]
    return labelled


def _annotated(annotations: Path, classes: dict[str, int]) -> Labelled:
    """Tiny-ImageNet's list: one image a line, its name and its class first, separated by tabs."""
    labelled: Labelled = []
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        name, _, rest = line.partition("\t")
        label = classes.get(rest.partition("\t")[0])
        if label is None:
            raise DataError(f"{annotations}, line {number}: expected NAME<tab>CLASS<tab>..., not {line[:80]!r}.")
        labelled.append((annotations.parent / "images" / name, label))
    return labelled


def _load(labelled: Labelled, source: Source) -> Images:
    files, labels = [file for file, _ in labelled], [label for _, label in labelled]
    return Images(read(files, source.resolution, source.memory_limit), torch.tensor(labels))
