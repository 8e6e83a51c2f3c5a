"""Image data sets as uint8 tensors, and batches of them: `load("cifar10")`, then `batches(...)`."""

from sapwood.data.augmentation import Augmentation
from sapwood.data.batches import Batches, batches, pruning_batches
from sapwood.data.images import Dataset, Images, split
from sapwood.data.table import load, names

__all__ = ["Augmentation", "Batches", "Dataset", "Images", "batches", "load", "names", "pruning_batches", "split"]
