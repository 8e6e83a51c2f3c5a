"""Recipes by name, from somebody's module or file, and with settings changed."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable

from sapwood.errors import ConfigError, unknown_name
from sapwood.experiments.fields import assignment, value
from sapwood.experiments.recipes import ablations, cifar, demos, imagenet, tiny_imagenet
from sapwood.experiments.recipes.recipe import Recipe
from sapwood.imports import called, imported

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": demos.digits,
    "cifar10-laptop": demos.cifar10_laptop,
    "closed-form": demos.closed_form,
    "closed-form-vgg16": demos.closed_form_vgg16,
    "cifar10-resnet20": cifar.cifar10_resnet20,
    "cifar10-resnet20-as-written": cifar.cifar10_resnet20_as_written,
    "cifar100-vgg16": cifar.cifar100_vgg16,
    "cifar100-vgg16-as-written": cifar.cifar100_vgg16_as_written,
    "tiny-imagenet-resnet18": tiny_imagenet.tiny_imagenet_resnet18,
    "tiny-imagenet-resnet18-as-code": tiny_imagenet.tiny_imagenet_resnet18_as_code,
    "tiny-imagenet-resnet18-as-written": tiny_imagenet.tiny_imagenet_resnet18_as_written,
    "tiny-imagenet-resnet18-3x3": tiny_imagenet.tiny_imagenet_resnet18_3x3,
    "imagenet-resnet18": imagenet.imagenet_resnet18,
    "imagenet-resnet50": imagenet.imagenet_resnet50,
    "ablation-epsilon": ablations.ablation_epsilon,
    "ablation-rounds": ablations.ablation_rounds,
    "ablation-resamples": ablations.ablation_resamples,
    "ablation-weights": ablations.ablation_weights,
    "ablation-inputs": ablations.ablation_inputs,
}

SETTABLE = ("grid", "train")
LISTS = ("grid.methods", "grid.sparsities", "grid.seeds")


def load(name: str) -> Recipe:
    """The recipe of a name, of `package.module:function` or of `path/to/file.py:function`.

    Raises:
        ConfigError: there is none.
    """
    if ":" not in name:
        if name not in RECIPES:
            raise unknown_name("recipe", name, [*RECIPES, "package.module:function", "FILE.py:function"])
        return RECIPES[name]()
    function = imported(name, "recipe", files=True)
    recipe = called(function, name, "recipe") if callable(function) else function
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{name!r} gives {type(recipe).__name__}; a function that returns a Recipe was expected.")
    return recipe


def overridden(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """The recipe with `train.FIELD=VALUE` and `grid.FIELD=VALUE` put in; lists are written with commas.

    Accuracy numbers go with the published training: they are dropped where more changes than the lists of the grid.

    Raises:
        ConfigError: there is no such field, or the value is illegal.
    """
    for entry in settings:
        path, text = assignment(entry, "train.epochs=1")
        part, _, field = path.partition(".")
        if part not in SETTABLE:
            raise ConfigError(
                f"Settings of a recipe begin with grid. or train., such as train.epochs=1; {entry!r} came."
            )
        old = getattr(recipe, part)
        kinds = typing.get_type_hints(type(old))
        if field not in kinds:
            raise unknown_name(f"setting of {part}", field, kinds)
        new = dataclasses.replace(old, **{field: value(path, text, kinds[field])})
        expected = recipe.expected if path in LISTS else {}
        recipe = dataclasses.replace(recipe, **{part: new, "expected": expected})
    return recipe
