"""Models by name: one table for our own, three prefixes for everybody else's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from sapwood.checks import Count, Resolution, check_arguments
from sapwood.errors import ConfigError, unknown_name
from sapwood.imports import called
from sapwood.models.external import (
    accepts,
    check_torchvision,
    factory_model,
    importable,
    timm_input_shape,
    timm_model,
    torchvision_model,
)
from sapwood.models.mlp import Mlp
from sapwood.models.resnet import BasicBlock, Bottleneck, ResNet
from sapwood.models.vgg import Vgg
from sapwood.models.vit import VisionTransformer
from sapwood.models.wide_resnet import WideResNet

Builder = Callable[..., nn.Module]

_CIFAR, _TINY, _IMAGENET = (3, 32, 32), (3, 64, 64), (3, 224, 224)

_cifar = partial(ResNet, widths=(16, 32, 64), stem="3x3")
_basic = partial(ResNet, widths=(64, 128, 256, 512), block=BasicBlock)
_bottleneck = partial(ResNet, widths=(64, 128, 256, 512), block=Bottleneck)

MODELS: dict[str, tuple[Builder, tuple[int, ...]]] = {
    "mlp": (Mlp, _CIFAR),
    "resnet8": (partial(_cifar, depths=(1, 1, 1)), _CIFAR),
    "resnet20": (partial(_cifar, depths=(3, 3, 3)), _CIFAR),
    "resnet32": (partial(_cifar, depths=(5, 5, 5)), _CIFAR),
    "resnet56": (partial(_cifar, depths=(9, 9, 9)), _CIFAR),
    "resnet110": (partial(_cifar, depths=(18, 18, 18)), _CIFAR),
    "wrn-16-4": (partial(WideResNet, depth=16, width=4), _CIFAR),
    "wrn-28-10": (partial(WideResNet, depth=28, width=10), _CIFAR),
    "vgg11-bn": (partial(Vgg, depths=(1, 1, 2, 2, 2)), _CIFAR),
    "vgg13-bn": (partial(Vgg, depths=(2, 2, 2, 2, 2)), _CIFAR),
    "vgg16-bn": (partial(Vgg, depths=(2, 2, 3, 3, 3)), _CIFAR),
    "vgg19-bn": (partial(Vgg, depths=(2, 2, 4, 4, 4)), _CIFAR),
    "resnet18": (partial(_basic, depths=(2, 2, 2, 2), stem="7x7"), _IMAGENET),
    "resnet34": (partial(_basic, depths=(3, 4, 6, 3), stem="7x7"), _IMAGENET),
    "resnet50": (partial(_bottleneck, depths=(3, 4, 6, 3), stem="7x7"), _IMAGENET),
    "resnet18-3x3": (partial(_basic, depths=(2, 2, 2, 2), stem="3x3"), _TINY),
    "resnet34-3x3": (partial(_basic, depths=(3, 4, 6, 3), stem="3x3"), _TINY),
    "resnet50-3x3": (partial(_bottleneck, depths=(3, 4, 6, 3), stem="3x3"), _TINY),
    "vit-tiny": (VisionTransformer, _CIFAR),
}
PATTERNS = ("wrn-DEPTH-WIDTH", "torchvision:NAME", "timm:NAME", "package.module:factory")


def names() -> list[str]:
    """The names of Sapwood's own models, sorted."""
    return sorted(MODELS)


def create(
    name: str, *, num_classes: Count = 10, in_channels: Count = 3, image_size: Resolution | None = None, **kwargs: Any
) -> nn.Module:
    """Builds an untrained model; its weights come from torch's global generator (`torch.manual_seed`).

    Args:
        name: One of `names()`, `wrn-DEPTH-WIDTH`, `torchvision:NAME`, `timm:NAME` or `package.module:factory`.
        num_classes: Outputs.
        in_channels: Input channels.
        image_size: Height and width of the input in pixels. Models whose weights depend on it (`mlp`, `vit-tiny`, the
            vision transformers of timm, a factory that has the argument) are built for it; the others take any size.
            None: the model's own default.
        **kwargs: Further settings of the model, such as `widths` of `mlp` or `stem` of `resnet18`.

    Returns:
        The model, in training mode, on the CPU (or on the device of a `with torch.device(...)` around the call).

    Raises:
        ConfigError: For an unknown name or setting, or a library that is not there.
    """
    check_arguments(create, locals())
    settings = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size, **kwargs}
    prefix, colon, rest = name.partition(":")
    if not colon:
        return _own(name, settings)
    if prefix == "torchvision":
        return torchvision_model(rest, settings)
    if prefix == "timm":
        return timm_model(rest, settings)
    return factory_model(name, settings)


def check_name(name: str) -> None:
    """Refuses the name of a model that is not there; builds none.

    Raises:
        ConfigError: For an unknown name, or a library or a module of the user's that cannot be imported.
    """
    prefix, colon, rest = name.partition(":")
    if not colon:
        _entry(name)
    elif prefix == "torchvision":
        check_torchvision(rest)
    elif prefix == "timm":
        timm_input_shape(rest)
    else:
        importable(name)


def input_shape(name: str) -> tuple[int, ...]:
    """The usual shape (channels, height, width) of one sample, which `create(name)` accepts without further settings.

    Raises:
        ConfigError: For an unknown name, and for `package.module:factory`, of which the shape is not known.
    """
    prefix, colon, rest = name.partition(":")
    if not colon:
        return _entry(name)[1]
    if prefix == "torchvision":
        return _IMAGENET
    if prefix == "timm":
        return timm_input_shape(rest)
    raise ConfigError(f"The input shape of {name!r} is not known: give it, as in --input-shape 3 32 32.")


def _own(name: str, settings: dict[str, Any]) -> nn.Module:
    builder = _entry(name)[0]
    if settings["image_size"] is None or not accepts(builder, "image_size"):
        del settings["image_size"]
    legal = inspect.signature(builder).parameters
    for setting in settings:
        if setting not in legal:
            raise unknown_name(f"setting of model {name!r}:", setting, legal)
    model: nn.Module = called(builder, name, "model", **settings)
    return model


def _entry(name: str) -> tuple[Builder, tuple[int, ...]]:
    if name in MODELS:
        return MODELS[name]
    if wide := re.fullmatch(r"wrn-([0-9]{1,4})-([0-9]{1,4})", name):
        return partial(WideResNet, depth=int(wide[1]), width=int(wide[2])), _CIFAR
    raise unknown_name("model", name, [*MODELS, *PATTERNS])
