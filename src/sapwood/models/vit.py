"""A small vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) for 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sapwood.errors import ConfigError


class VisionTransformer(nn.Module):
    """Patch embedding, learned positions, pre-norm encoder layers, mean over the patches, one linear layer.

    The defaults are ViT-Tiny's with patches of 4. The mean instead of a class token follows Beyer et al. 2022
    (arXiv 2205.01580). Weights start as PyTorch's layers draw them.

    Args:
        patch: Side of a patch in pixels; divides `image_size`.
        width: Features of a token.
        depth: Encoder layers.
        heads: Attention heads; divides `width`.
        num_classes: Outputs.
        in_channels: Input channels.
        image_size: Height and width of the input, in pixels.
    """

    def __init__(
        self,
        *,
        patch: int = 4,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if image_size % patch or width % heads:
            raise ConfigError(
                f"patch ({patch}) must divide image_size ({image_size}), and heads ({heads}) width ({width})."
            )
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty((image_size // patch) ** 2, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        # Not nn.TransformerEncoder: it copies one layer, so that all would start with the same weights.
        self.encoder = nn.Sequential(*(_encoder_layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, in_channels, image_size, image_size) to logits (n, num_classes)."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.fc(self.norm(self.encoder(tokens)).mean(dim=1))
        return logits


def _encoder_layer(width: int, heads: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
