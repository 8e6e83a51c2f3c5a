"""Image files: decoded into one tensor, or on demand where the tensor would be too large for memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sapwood.errors import DataError
from sapwood.text import one_line


@dataclass(frozen=True)
class ImageFiles:
    """Images on disk, decoded when they are indexed.

    Attributes:
        files: One image each.
        size: (height, width) after decoding, in pixels.
        fit: Whether to resize the short side and cut the centre out; else another size is an error.
    """

    files: tuple[Path, ...]
    size: tuple[int, int]
    fit: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Images x 3 x height x width."""
        return (len(self.files), 3, *self.size)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The images at these positions: uint8, len(indices) x 3 x height x width.

        Raises:
            DataError: If a file is no image, or of another size where `fit` is not set.
        """
        chosen = [self.files[i] for i in indices.tolist()]
        pixels = torch.empty((len(chosen), 3, *self.size), dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
            for i, image in enumerate(pool.map(partial(_pixels, size=self.size, fit=self.fit), chosen)):
                pixels[i] = torch.from_numpy(image).permute(2, 0, 1)
        return pixels

    def subset(self, indices: Tensor) -> ImageFiles:
        """The files at these positions, in this order."""
        return ImageFiles(tuple(self.files[i] for i in indices.tolist()), self.size, self.fit)


def _decode(file: Path) -> Image.Image:
    """The image in RGB, 8 bits a channel, as torchvision's ImageFolder has it: no rotation by EXIF, alpha dropped.

    Only 16-bit grey differs, which Pillow clips at 255: it is scaled.
    """
    try:
        with Image.open(file) as opened:
            return _rgb(opened)
    except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
        raise DataError(f"{file} cannot be decoded ({one_line(error)}): replace it or remove it.") from error


def _rgb(image: Image.Image) -> Image.Image:
    """In RGB.

    Raises:
        ValueError: its pixels are numbers whose range is not known.
    """
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if deep:
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers of no known range, mode {image.mode!r}: save it with 8 or 16 bits"
        )
    elif "transparency" in image.info:  # RGBA on the way, because Pillow warns otherwise; the colours are the same
        image = image.convert("RGBA")
    return image.convert("RGB")


def _pixels(file: Path, size: tuple[int, int], fit: bool) -> np.ndarray:
    image, (height, width) = _decode(file), size
    if fit:
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.BILINEAR)
    elif image.size != (width, height):
        raise DataError(
            f"{file} has {image.height}x{image.width} pixels where the first image has {height}x{width}: "
            "give a resolution, to which all of them are resized and cropped."
        )
    return np.array(image)


def read(files: list[Path], resolution: int | None, memory_limit: int) -> Tensor | ImageFiles:
    """All files as one tensor, or as `ImageFiles` where that would take more than `memory_limit` bytes.

    Without a resolution, the images must all have the size of the first.

    Raises:
        DataError: there are no files, or one cannot be decoded or has another size.
    """
    if not files:
        raise DataError("There are no images to read: the list of files is empty.")
    if resolution is None:
        first = _decode(files[0])
        size = (first.height, first.width)
    else:
        size = (resolution, resolution)
    images = ImageFiles(tuple(files), size, fit=resolution is not None)
    needed = len(files) * 3 * size[0] * size[1]
    if needed <= memory_limit:
        return images[torch.arange(len(files))]
    if resolution is None:
        raise DataError(
            f"The {len(files)} images below {files[0].parent.parent} need {needed / 2**30:.1f} GiB of memory, more "
            f"than the limit of {memory_limit / 2**30:.1f} GiB: give a resolution, or raise memory_limit."
        )
    return images
