"""Fresh weights: a draw from the distribution that a network's initial weights come from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sapwood.functional import FunctionalModel, Params

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def fresh_parameters(net: FunctionalModel, generator: torch.Generator) -> Params:
    """One draw from the initial distribution: N(0, 2 / fan-in) for every layer weight (He et al. 2015), norms reset.

    All other parameters (biases, embeddings) stay as they are.
    """
    drawn = {name: math.sqrt(2 / fan_in) * normal(net.params[name], generator) for name, fan_in in net.fan_in.items()}
    return {**net.params, **reset_norms(net), **drawn}


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) in the shape, precision and place of a tensor."""
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def reset_norms(net: FunctionalModel) -> Params:
    """Scale 1 and shift 0, as a fresh network has them."""
    reset: Params = {}
    for prefix, module in net.module.names.modules.items():
        if isinstance(module, NORMS):
            for leaf, fill in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
                name = f"{prefix}.{leaf}" if prefix else leaf
                if name in net.params:
                    reset[name] = fill(net.params[name])
    return reset
