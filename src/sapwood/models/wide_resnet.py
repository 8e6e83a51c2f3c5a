"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146), pre-activation, without dropout."""

from __future__ import annotations

from torch import Tensor, nn

from sapwood.errors import ConfigError
from sapwood.models.initialise import kaiming_normal


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice; a shortcut that changes the shape starts from the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.relu = nn.ReLU()
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        active = self.relu(self.bn1(x))
        out: Tensor = self.conv2(self.relu(self.bn2(self.conv1(active))))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(active)
        return out + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times `width` channels.

    Args:
        depth: Convolutions on the longest path, 6n + 4: 10, 16, 22, 28, 40, ...
        width: Widening factor.
        num_classes: Outputs.
        in_channels: Input channels; any height and width will do.
    """

    def __init__(self, *, depth: int, width: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ConfigError(
                f"A wide ResNet's depth must be 6n + 4 (10, 16, 22, 28, 40, ...) and its width at least 1, "
                f"not depth {depth} and width {width}."
            )
        inputs, blocks = 16, []
        for i, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for j in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(inputs, outputs, stride=2 if i > 0 and j == 0 else 1))
                inputs = outputs
        self.conv1 = _conv3x3(in_channels, 16)
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        kaiming_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, in_channels, h, w) to logits (n, num_classes)."""
        x = self.relu(self.bn(self.blocks(self.conv1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits
