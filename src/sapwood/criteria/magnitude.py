"""Magnitude: |w| (LeCun et al. 1989's baseline; Han et al. 2015; at initialisation in the NTK-SAP paper's tables).

It is Janowsky's (1989) rule too, who removes the weakest bonds of a trained network and then applies the learning
algorithm again; the method table has it under both names.

At initialisation this ranks layers by their initial scale (1/sqrt(fan-in) under Kaiming's rule) more than weights;
the allocation "uniform" takes that away. Needs no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Data
from sapwood.functional import FunctionalModel
from sapwood.masks import Masks


@dataclass(frozen=True)
class Magnitude:
    """The absolute value of every weight."""

    needs_data = False

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight."""
        return {name: weight.abs() for name, weight in net.weights.items()}
