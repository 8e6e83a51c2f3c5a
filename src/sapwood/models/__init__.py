"""Models by name: `create("resnet20", num_classes=10)`. Everything here is plain PyTorch."""

from sapwood.models.table import create, input_shape, names

__all__ = ["create", "input_shape", "names"]
