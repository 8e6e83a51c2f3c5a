"""Training of dense and masked networks: one SGD loop, its settings, and the measurement of a model."""

from sapwood.training.checkpoint import Epoch, history_in
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
    "evaluate",
    "fabric_for",
    "history_in",
    "train",
]
