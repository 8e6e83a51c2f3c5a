"""Random crops and flips of whole batches, on whatever device the batch is on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_ATTEMPTS = 10  # of a resized crop that fits into the image, as in torchvision


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images; the default changes nothing.

    Attributes:
        padding: Zero pixels added at each side, of which a window of the old size is then cut (4 for CIFAR).
        flip: Whether to mirror left and right with probability 1/2.
        scale: Range of the share of the image's area that a resized crop covers, such as (0.08, 1); None: no such
            crop.
        ratio: Range of width / height of a resized crop.
    """

    padding: int = 0
    flip: bool = False
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augments each image for itself.

        Args:
            images: n x channels x height x width, uint8.
            generator: The only source of chance. It may live on another device: one on the CPU gives the same
                pictures everywhere.

        Returns:
            The same shape; float in 0 .. 255 after a resized crop, else uint8.
        """
        count, _, height, width = images.shape
        device = generator.device
        if self.scale is not None:
            boxes = _random_boxes(count, (height, width), self.scale, self.ratio, generator)
            images = resized_crop(images, boxes.to(images.device))
        if self.padding:
            shifts = torch.randint(0, 2 * self.padding + 1, (2, count), generator=generator, device=device)
            images = shifted_crop(images, shifts.to(images.device), self.padding)
        if self.flip:
            mirrored = torch.rand(count, generator=generator, device=device) < 0.5
            images = mirror(images, mirrored.to(images.device))
        return images


def shifted_crop(images: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Pads with zeros and cuts a window of the old size whose top left corner is at shifts[:, i] = (down, right)."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = shifts[0][:, None] + torch.arange(height, device=images.device)
    columns = shifts[1][:, None] + torch.arange(width, device=images.device)
    # One flat index per pixel: gather is twice as fast as indexing rows and columns of a strided view.
    flat = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(count, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, flat).view_as(images)


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Swaps left and right where `mirrored` (n, bool) says so."""
    # Both versions and a choice of whole images: four times as fast as torch.where, pixel by pixel.
    both = torch.cat([images, images.flip(-1)])
    return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * mirrored)


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Cuts boxes[i] = (top, left, height, width), in pixels, and enlarges it to the old size, bilinearly."""
    _, _, height, width = images.shape
    top, left, box_height, box_width = boxes.float()[:, :, None].unbind(1)
    # Where the centre of each new pixel lies in the old image, in grid_sample's units: from -1 to 1 over the image.
    y = (top + (torch.arange(height, device=images.device) + 0.5) / height * box_height) * (2 / height) - 1
    x = (left + (torch.arange(width, device=images.device) + 0.5) / width * box_width) * (2 / width) - 1
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def _random_boxes(
    count: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Boxes with uniform area and log-uniform ratio, the first of ten draws that fits: count x 4, int64.

    As torchvision's RandomResizedCrop, but if none of the ten fits, the first one is cut to the image's size.
    """
    draws = torch.rand(4, _ATTEMPTS, count, generator=generator, device=generator.device)
    bounds = torch.tensor(size, device=generator.device)
    area = size[0] * size[1] * (scale[0] + (scale[1] - scale[0]) * draws[0])
    root = torch.exp((math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[1]) / 2)
    sides = torch.stack([area.sqrt() / root, area.sqrt() * root], dim=2).round().long()  # attempts x count x 2
    first = (sides <= bounds).all(dim=2).int().argmax(dim=0)  # the first of equal maxima; 0 if none fits
    chosen = sides[first, torch.arange(count, device=first.device)].minimum(bounds).clamp_min(1)
    corners = (draws[2:, 0].T * (bounds - chosen + 1)).long().minimum(bounds - chosen)
    return torch.cat([corners, chosen], dim=1)
