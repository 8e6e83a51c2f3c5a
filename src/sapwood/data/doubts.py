"""What is legal in a data set and yet makes an accuracy on it mean little: said in a warning each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from sapwood.data.files import ImageFiles
from sapwood.data.images import Images
from sapwood.errors import SapwoodWarning

SHOWN = 5  # names in a sentence
LOOKED_AT = 1000  # test images on disk that are compared with the training image of the same name


def tell(train: Images, test: Images, classes: Sequence[str], where: Path) -> None:
    """Warns of one class only, of classes that are missing in the test part, and of test images seen in training.

    Args:
        train: The training part.
        test: The test part.
        classes: Names of the classes, by label.
        where: Folder of the test part, for the sentences.
    """
    if len(classes) == 1:
        _warn(f"There is one class only, {classes[0]!r}: every network is right on all images.")

    there = set(test.labels.tolist())
    missing = [name for label, name in enumerate(classes) if label not in there]
    if missing:
        names = ", ".join(map(repr, missing[:SHOWN]))
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        _warn(f"{where} has no images of {names}{more}: the accuracy says nothing of them.")

    if seen := _seen(train.images, test.images):
        count = f"{seen} of the {len(test)} test images in {where}"
        _warn(f"{count} are training images too: the accuracy is too high.")


def _seen(train: Tensor | ImageFiles, test: Tensor | ImageFiles) -> int:
    """Test images that are equal to a training image; on disk, of a sample, those that have its name too."""
    if isinstance(train, ImageFiles) or isinstance(test, ImageFiles):
        return _seen_on_disk(train, test)
    known = set(_prints(train))
    return sum(found in known for found in _prints(test))


def _prints(images: Tensor) -> Iterator[int]:
    """A number for every image, which equal images have in common and others, but for one in 2^64, do not."""
    return (hash(image.tobytes()) for image in images.contiguous().numpy())


def _seen_on_disk(train: Tensor | ImageFiles, test: Tensor | ImageFiles) -> int:
    if not isinstance(train, ImageFiles) or not isinstance(test, ImageFiles):
        return 0
    by_name = {(file.parent.name, file.name): file for file in train.files}
    sample = test.files[:: max(1, len(test.files) // LOOKED_AT)]
    pairs = [(file, by_name.get((file.parent.name, file.name))) for file in sample]
    equal = sum(_equal(file, twin) for file, twin in pairs if twin is not None)
    return equal * len(test.files) // len(sample)


def _equal(file: Path, twin: Path) -> bool:
    return file.stat().st_size == twin.stat().st_size and file.read_bytes() == twin.read_bytes()


def _warn(sentence: str) -> None:
    warnings.warn(sentence, SapwoodWarning, stacklevel=5)
