"""The initial weights of the networks with ReLU."""

from __future__ import annotations

from torch import nn


def kaiming_normal(model: nn.Module) -> None:
    """Draws every convolution and linear weight from N(0, 2 / fan_in), in place.

    He et al. 2015 (arXiv 1502.01852), as in the experiments of NTK-SAP. Biases keep PyTorch's draw, BatchNorm its 1
    and 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
