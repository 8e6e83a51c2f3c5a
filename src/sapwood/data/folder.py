"""Image folders: anybody's in ImageFolder layout, and Tiny-ImageNet as it comes in its zip."""

from __future__ import annotations

from pathlib import Path

import torch

from sapwood.data import doubts
from sapwood.data.augmentation import Augmentation
from sapwood.data.download import Remote, Source, unpacked
from sapwood.data.files import read
from sapwood.data.images import Dataset, Images, channel_statistics
from sapwood.errors import DataError
from sapwood.text import one_line

TINY_IMAGENET = Remote("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))

Labelled = list[tuple[Path, int]]


def folder(source: Source) -> Dataset:
    """Any images as `root/train/CLASS/*` and `root/test/CLASS/*` (or `val`, if there is no `test`), read as RGB.

    As in torchvision's ImageFolder, classes are the sorted folder names of `train`, orientations in EXIF are not
    applied, and alpha is dropped, so that hidden colours appear. Hidden files and folders are left out, and 16-bit grey
    is scaled to 8 bits. What makes an accuracy meaningless is said in a warning: one class only, a class without test
    images, test images that are training images too. The statistics are measured on up to 2,000 training images.
    Augmentation is the flip and ImageNet's resized crop, taken from the image at its final resolution.
    """
    parts = [source.root / name for name in ("train", "test", "val")]
    found = [part for part in parts if part.is_dir() and _subfolders(part)]
    if len(found) < 2 or found[0] != parts[0]:
        raise DataError(
            f"{source.root} must hold train/CLASS/* and test/CLASS/* (or val/CLASS/*), but of these it has "
            f"{', '.join(part.name for part in found) or 'none'}: move the images of each class into such folders."
        )
    classes = _classes(found[0])
    train, test = (_load(_list(part, classes), source) for part in found[:2])
    mean, std = channel_statistics(train)
    dataset = Dataset(
        name="folder",
        train=train,
        test=test,
        num_classes=len(classes),
        mean=mean,
        std=std,
        augmentation=Augmentation(flip=True, scale=(0.08, 1.0)),
    )
    doubts.tell(train, test, list(classes), found[1])
    return dataset


def tiny_imagenet(source: Source) -> Dataset:
    """Tiny-ImageNet (Stanford CS231n) from `root/tiny-imagenet-200`: 100,000 and 10,000 64x64 images, 200 classes.

    `test` is the official validation part: the labels of the official test part are not published.
    """
    base = unpacked(TINY_IMAGENET, source, "tiny-imagenet-200", ("train", "val"))
    classes = _classes(base / "train")
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


def _classes(part: Path) -> dict[str, int]:
    """Labels by the names of the class folders, which are sorted."""
    names = _subfolders(part)
    if not names:
        raise DataError(f"{part} holds no class folders: {part.name}/CLASS/* was expected.")
    return {name: label for label, name in enumerate(names)}


def _subfolders(part: Path) -> list[str]:
    return sorted(entry.name for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list(part: Path, classes: dict[str, int]) -> Labelled:
    """Every image below part/CLASS, sorted; each class folder must be known and must hold images."""
    labelled: Labelled = []
    for name in _subfolders(part):
        files = _images_below(part / name)
        if not files:
            raise DataError(f"{part / name} holds no images: add some, or remove the folder.")
        if name not in classes:
            raise DataError(f"{part / name} has no counterpart in train: its classes are {', '.join(classes)}.")
        labelled += [(file, classes[name]) for file in files]
    return labelled


def _images_below(folder: Path) -> list[Path]:
    """Files that are called images, sorted, but for hidden ones: macOS puts a ._x.png beside x.png."""
    called = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.is_dir())
    images = [file for file in called if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    for file in images:
        if not file.is_file():  # reading a pipe would wait for ever
            raise DataError(f"{file} is no regular file, but a pipe, a device or a broken link: remove it.")
    return images


def _annotated(annotations: Path, classes: dict[str, int]) -> Labelled:
    """Tiny-ImageNet's list: one image a line, its name and its class first, separated by tabs."""
    labelled: Labelled = []
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{annotations} cannot be read ({one_line(error)}): replace it.") from error
    for number, line in enumerate(lines, start=1):
        name, _, rest = line.partition("\t")
        label = classes.get(rest.partition("\t")[0])
        if label is None or Path(name).name != name:
            raise DataError(f"{annotations}, line {number}: expected NAME<tab>CLASS<tab>..., not {line[:80]!r}.")
        labelled.append((annotations.parent / "images" / name, label))
    if not labelled:
        raise DataError(f"{annotations} names no image: replace it.")
    return labelled


def _load(labelled: Labelled, source: Source) -> Images:
    files, labels = [file for file, _ in labelled], [label for _, label in labelled]
    return Images(read(files, source.resolution, source.memory_limit), torch.tensor(labels))
