"""VGG networks (Simonyan & Zisserman 2014, arXiv 1409.1556) as used on CIFAR: BatchNorm, one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sapwood.models.initialise import kaiming_normal


class Vgg(nn.Module):
    """Five stages of 3x3 convolutions (with bias) and BatchNorm, a max-pool between stages, a global average pool.

    For 32x32 inputs the last map is 2x2, so the global pool is the 2x2 average pool of the NTK-SAP experiments.

    Args:
        depths: Convolutions of each stage.
        widths: Channels of each stage.
        num_classes: Outputs.
        in_channels: Input channels; heights and widths from 16 on will do.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for depth, width in zip(depths, widths, strict=True):
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        kaiming_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, in_channels, h, w) to logits (n, num_classes)."""
        logits: Tensor = self.fc(self.avgpool(self.features(x)).flatten(1))
        return logits
