"""Models from torchvision, from timm and from the user's own code; every library is imported only when it is named."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sapwood.errors import ConfigError
from sapwood.imports import called, imported


def torchvision_model(name: str, settings: dict[str, Any]) -> nn.Module:
    """A classification model of torchvision, untrained; `settings` may hold what its builder accepts."""
    library = check_torchvision(name)
    channels = settings.pop("in_channels")
    settings.pop("image_size")
    if channels != 3:
        raise ConfigError(
            f"torchvision:{name} takes images of 3 channels, but the data has in_channels={channels}: "
            "use a timm model, one of Sapwood's own, or data converted to RGB."
        )
    model: nn.Module = called(
        library.models.get_model, f"torchvision:{name}", "model", name=name, weights=None, **settings
    )
    return model


def check_torchvision(name: str) -> ModuleType:
    """The library, if it has a classification model of this name."""
    library = _vision_library("torchvision")
    legal = library.models.list_models(module=library.models)
    if name not in legal:
        raise _unknown("torchvision", name, legal)
    return library


def timm_model(name: str, settings: dict[str, Any]) -> nn.Module:
    """A model of timm, untrained; `settings` may hold what `timm.create_model` accepts."""
    size, channels = settings.pop("image_size"), settings.pop("in_channels")
    config = _timm_config(name)
    if size is not None and config is not None and config.fixed_input_size:
        settings.setdefault("img_size", size)  # the models without a fixed size refuse the argument
    create = _vision_library("timm").create_model
    settings |= {"model_name": name, "pretrained": False, "in_chans": channels}
    model: nn.Module = called(create, f"timm:{name}", "model", **settings)
    return model


def timm_input_shape(name: str) -> tuple[int, ...]:
    """What timm's configuration of the model says, else (3, 224, 224)."""
    config = _timm_config(name)
    return (3, 224, 224) if config is None else tuple(config.input_size)


def factory_model(path: str, settings: dict[str, Any]) -> nn.Module:
    """Calls `package.module:factory` with the settings; `num_classes` and its like only if the signature takes them."""
    factory = importable(path)
    offered = {key: settings.pop(key) for key in ("num_classes", "in_channels", "image_size")}
    known = {key: value for key, value in offered.items() if value is not None and accepts(factory, key)}
    model = called(factory, path, "model", **known, **settings)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"The model factory {path!r} must return a torch.nn.Module, but gave {type(model).__name__}.")
    return model


def importable(path: str) -> Callable[..., Any]:
    """What `package.module:factory` names.

    Raises:
        ConfigError: there is no such thing, or it cannot be called.
    """
    factory = imported(path, "model")
    if not callable(factory):
        raise ConfigError(f"The model {path!r} names a {type(factory).__name__}, but must name something callable.")
    return factory  # type: ignore[no-any-return]


def accepts(function: Callable[..., Any], argument: str) -> bool:
    """Whether the function can be called with a keyword argument of this name."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a builtin, which does not say
        return False
    named = argument in parameters and parameters[argument].kind is not inspect.Parameter.POSITIONAL_ONLY
    return named or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _vision_library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError where its operators do not fit torch
        raise ConfigError(
            f"Models named {name}:NAME need {name}, which cannot be imported here ({error}): "
            f"`pip install 'sapwood[vision]'` gets it; its build must fit torch {torch.__version__}."
        ) from error


def _timm_config(name: str) -> Any:
    library = _vision_library("timm")
    if not library.is_model(name):
        raise _unknown("timm", name, library.list_models())
    return library.get_pretrained_cfg(name)


def _unknown(library: str, name: str, legal: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(name, legal, n=5, cutoff=0.3)  # timm has over a thousand names
    listing = {"timm": "timm.list_models()", "torchvision": "torchvision.models.list_models()"}[library]
    return ConfigError(f"{library} has no model {name!r}. Nearest: {', '.join(near) or 'none'}. `{listing}` lists all.")
