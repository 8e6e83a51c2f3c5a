"""Which methods may refuse which of the random models, and for which of them there is an oracle."""

from __future__ import annotations

from torch import nn

import oracles
from random_models import Recipe
from troubled_blocks import NOISY, REFUSED

FLOWS = ("synflow", "synflow-l2", "px")

LIMITS: dict[str, frozenset[str]] = {
    "ntk-sap-jvp": frozenset({"recurrent", "gated unit", "bags"}),  # no forward derivative in torch
    "prospr": frozenset({"bags"}),  # which are trained, too, and have no second derivative in torch
    "ntt": frozenset({"bags"}),
    # A single sample has no statistics, and where the batch decides (by value), samples are none.
    "obd": frozenset({"norm open batch", "by value"}),
    "obs": frozenset({"norm open batch", "by value"}),
}
"""What a method may refuse for though the model is an ordinary one."""


def must_be_refused(recipe: Recipe, method: str) -> bool:
    uncomparable = "noise of its own" in recipe.troubles and method in ("ntk-sap", "grasp")
    return uncomparable or bool(recipe.troubles & REFUSED)


def may_be_refused(recipe: Recipe, method: str) -> bool:
    """Documented limits of a method; every other refusal of an ordinary model is a fault."""
    features = recipe.features
    if recipe.troubles or features & LIMITS.get(method, frozenset()):
        return True
    if method in FLOWS:
        return not flow_is_defined(recipe)
    if method == "ntk-sap-analytic":
        return not closed_form_is_known(recipe)
    # The loss is the model's own, so that its logits cannot be divided.
    return method == "grasp" and {"mapping", "object"} <= features


def flow_is_defined(recipe: Recipe) -> bool:
    """Whether the network with positive weights is a positive flow as it is written."""
    flowing = {
        "linear", "residual", "concatenated rows", "counters", "half", "bfloat", "double", "in pieces", "by group",
        "matrix product", "einsum", "frozen norm", "normalised twice", "hooked", "layer scale", "dropout", "listed",
    }  # fmt: skip
    maps = {"convolution", "residual convolution", "concatenated", "grouped", "depthwise", "transposed", "strided"}
    return (
        set(recipe.trunk) <= flowing
        and recipe.body in ("rows", "images")
        and (recipe.body == "rows" or set(recipe.maps) <= maps)
        and recipe.norm in ("none", "batch", "plain batch")
        and recipe.activation in ("relu", "relu in place")
    )


def closed_form_is_known(recipe: Recipe) -> bool:
    """Whether it is among the architectures of which the closed form has all rules."""
    known = {"linear", "residual", "frozen", "half frozen", "frozen norm", "hooked", "layer scale"}
    maps = {"convolution", "residual convolution", "concatenated", "grouped", "depthwise", "transposed"}
    return (
        set(recipe.trunk) <= known
        and recipe.body in ("rows", "images", "transformer")
        and (recipe.body != "images" or set(recipe.maps) <= maps)
        and recipe.call == "pairs"
        and recipe.norm != "open batch"
    )


def has_oracle(recipe: Recipe, method: str) -> bool:
    if method not in oracles.ORACLES or "noise of its own" in recipe.troubles:
        return False
    if method in ("synflow", "synflow-l2"):
        return flow_is_defined(recipe)
    if method == "ntk-sap" and "by value" in recipe.features:  # the batch decides, so it is run whole, as it came
        return False
    if "dead" in recipe.troubles and "batch" in recipe.norm:
        return False  # which divides a constant's rounding by its deviation
    if recipe.troubles & NOISY:  # several passes, or one after a look that has drawn: in which state is not promised
        return method in ("magnitude", "janowsky", "snip", "taylor", "ntk-sap")
    return True


def expected_names(model: nn.Module) -> list[str]:
    """Weights of two or more dimensions of layers that are no embeddings or norms, each once."""
    layers = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    names = []
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0].partition(".parametrizations")[0])
        leaf = name.rpartition("parametrizations.")[2] if "parametrizations" in name else name.rpartition(".")[2]
        if parameter.dim() >= 2 and isinstance(owner, layers) and "weight" in leaf:
            names.append(name)
    return names
