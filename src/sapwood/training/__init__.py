"""Training of dense and masked networks: one SGD loop, its settings, and the measurement of a model."""

from sapwood.training.checkpoint import Epoch
from sapwood.training.config import TrainConfig
from sapwood.training.evaluate import evaluate
from sapwood.training.loop import Batches, TrainingData, TrainResult, train

__all__ = ["Batches", "Epoch", "TrainConfig", "TrainResult", "TrainingData", "evaluate", "train"]
