"""A fully connected network with ReLU; its default widths are those of LeNet-300-100 (LeCun et al. 1998)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from sapwood.models.initialise import kaiming_normal


class Mlp(nn.Module):
    """Flattens, then linear layers with ReLU between them.

    Args:
        widths: Units of each hidden layer; empty gives a linear classifier.
        num_classes: Outputs.
        in_channels: Input channels.
        image_size: Height and width of the input, in pixels.
    """

    def __init__(
        self, *, widths: Sequence[int] = (300, 100), num_classes: int = 10, in_channels: int = 3, image_size: int = 32
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((in_channels * image_size**2, *widths, num_classes)):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(nn.Flatten(), *layers[:-1])
        kaiming_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, in_channels, image_size, image_size) to logits (n, num_classes)."""
        logits: Tensor = self.layers(x)
        return logits
