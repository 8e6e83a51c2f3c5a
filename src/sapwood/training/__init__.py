"""Training of dense and masked networks: one SGD loop, its settings, and the measurement of a model."""

from sapwood.training.checkpoint import Epoch, epochs_in, intact
from sapwood.training.config import TrainConfig
from sapwood.training.devices import Device, fabric_for
from sapwood.training.evaluate import evaluate
from sapwood.training.loop import Batches, TrainingData, TrainResult, train

__all__ = [
    "Batches",
    "Device",
    "Epoch",
    "TrainConfig",
    "TrainResult",
    "TrainingData",
    "epochs_in",
    "evaluate",
    "fabric_for",
    "intact",
    "train",
]
