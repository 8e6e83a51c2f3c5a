"""A model as a function of its weights: the only place that runs the user's module while scoring."""

from sapwood.functional.derivatives import Derivatives, differentiating
from sapwood.functional.kinds import BatchNorm, Forward, Loss, Noise, Params, precisions
from sapwood.functional.model import FunctionalModel

__all__ = [
    "BatchNorm",
    "Derivatives",
    "Forward",
    "FunctionalModel",
    "Loss",
    "Noise",
    "Params",
    "differentiating",
    "precisions",
]
