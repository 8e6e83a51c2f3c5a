"""Random scores: the control that every method must beat.

With the global allocation this is the paper's "Random"; with Erdős-Rényi-Kernel densities it is the much stronger
"ERK-random" (Evci et al. 2020; Liu et al. 2022). Needs no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Data
from sapwood.functional import FunctionalModel
from sapwood.masks import Masks


@dataclass(frozen=True)
class Random:
    """One uniform draw for every weight."""

    needs_data = False

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight."""
        return {
            # float32 whatever the default is: a seed means the same masks everywhere
            name: torch.rand(weight.shape, generator=generator, device=weight.device, dtype=torch.float32)
            for name, weight in net.weights.items()
        }
