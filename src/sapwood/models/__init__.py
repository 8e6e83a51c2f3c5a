"""Models by name: `create("resnet20", num_classes=10)`. Everything here is plain PyTorch."""

from sapwood.models.table import check_name, create, input_shape, names

__all__ = ["check_name", "create", "input_shape", "names"]
