"""Which weights may be pruned: selection by layer type, by name or glob, by module type or by module.

By default: every weight of two or more dimensions of linear, convolution, attention and recurrent layers. Biases,
norms and embeddings (and so a head tied to an embedding) only when `include` names them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sapwood.errors import ConfigError, UnsupportedModelError, unknown_name

LAYERS = (nn.Linear, nn.Bilinear, _ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
Pattern = str | type[nn.Module] | nn.Module


class Layout(NamedTuple):
    """Where a weight has its channels.

    Attributes:
        output: Dimension of the output channels, 0 or 1; the input channels are in the other one.
        groups: Groups of a convolution: dimension 1 has the channels of one group, dimension 0 those of all.
    """

    output: int
    groups: int


@dataclass(frozen=True)
class Weight:
    """One parameter: its name, all its owners (several when tied) and its other names.

    Attributes:
        name: torch's first name of the parameter.
        aliases: All its names, the first included.
        owners: The modules that hold it, in the order of `aliases`.
        tensor: The parameter itself.
    """

    name: str
    aliases: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    tensor: Tensor

    @property
    def is_layer_weight(self) -> bool:
        """Whether it is a weight that is pruned by default."""
        _, parametrized, rest = self.name.rpartition("parametrizations.")
        leaf = rest if parametrized else self.name.rpartition(".")[2]
        layer = all(_is_layer(owner) for owner in self.owners)
        return self.tensor.dim() >= 2 and layer and "weight" in leaf

    @property
    def fan_in(self) -> int:
        """Inputs that one output unit sums over (of the dense weight)."""
        shape, owner = self.tensor.shape, self.owners[0]
        if isinstance(owner, _ConvTransposeNd):  # (in, out / groups, ...): torch's own formula takes the wrong axis
            return shape[0] // owner.groups * math.prod(shape[2:])
        if type(owner).__name__ == "Conv1D":  # Hugging Face's transposed linear layer
            return shape[0]
        return math.prod(shape[1:])

    @property
    def layout(self) -> Layout:
        """Dimensions of its output and input channels; an embedding's inputs are its words."""
        owner = self.owners[0]
        inputs_first = isinstance(owner, _ConvTransposeNd | nn.Embedding) or type(owner).__name__ == "Conv1D"
        return Layout(int(inputs_first), owner.groups if isinstance(owner, _ConvNd) else 1)

    def matches(self, pattern: Pattern) -> bool:
        """Whether a name, glob, module type or module selects this parameter."""
        if isinstance(pattern, str):
            return any(fnmatchcase(n, pattern) or fnmatchcase(_module_of(n), pattern) for n in self.aliases)
        if isinstance(pattern, type):
            return any(isinstance(owner, pattern) for owner in self.owners)
        return any(parameter is self.tensor for parameter in pattern.parameters())


def all_weights(model: nn.Module) -> list[Weight]:
    """Every parameter of the model once, ties resolved, in torch's order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    weights = []
    for name, parameter in model.named_parameters():
        names = tuple(aliases[id(parameter)])
        owners = tuple(_owner(modules, alias) for alias in names)
        weights.append(Weight(name, names, owners, parameter))
    return weights


def select(
    model: nn.Module, include: Iterable[Pattern] | Pattern = (), exclude: Iterable[Pattern] | Pattern = ()
) -> list[Weight]:
    """The prunable weights of a model.

    Args:
        model: Any module.
        include: Patterns of further parameters to prune: a parameter or module name, a glob over them (`"head.*"`), a
            module type (`nn.Embedding`) or a module.
        exclude: Patterns of parameters to leave alone; wins over `include`.

    Raises:
        ConfigError: a pattern selects nothing.
        UnsupportedModelError: nothing is left to prune, or the model is already under `torch.nn.utils.prune`.
    """
    weights = all_weights(model)
    include, exclude = _patterns(include), _patterns(exclude)
    for word, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(weight.matches(pattern) for weight in weights):
                raise _matches_nothing(word, pattern, weights)
    _refuse_torch_pruned(model)
    wanted = [w for w in weights if w.is_layer_weight or any(w.matches(p) for p in include)]
    chosen = [w for w in wanted if not any(w.matches(p) for p in exclude)]
    if not chosen:
        raise UnsupportedModelError(
            f"{type(model).__name__} has nothing to prune: no weight of a linear, convolution, attention or recurrent "
            "layer is left. Name parameters with include=, or exclude less."
        )
    return chosen


def _is_layer(owner: nn.Module) -> bool:
    return isinstance(owner, LAYERS) or type(owner).__name__ == "Conv1D"


def _module_of(name: str) -> str:
    """The module that a user would name: "fc" for "fc.weight" and for "fc.parametrizations.weight.original"."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("parametrizations") if "parametrizations" in parts else -1])


def _owner(modules: dict[str, nn.Module], name: str) -> nn.Module:
    return modules[_module_of(name)]


def _patterns(patterns: Iterable[Pattern] | Pattern) -> tuple[Pattern, ...]:
    return (patterns,) if isinstance(patterns, str | type | nn.Module) else tuple(patterns)


def _matches_nothing(word: str, pattern: Pattern, weights: list[Weight]) -> ConfigError:
    names = {n for w in weights for alias in w.aliases for n in (alias, _module_of(alias)) if n}
    if isinstance(pattern, str):
        return unknown_name(f"parameter or module in {word}", pattern, names)
    what = pattern.__name__ if isinstance(pattern, type) else f"the given {type(pattern).__name__}"
    return ConfigError(f"{word} names {what}, but no parameter of the model belongs to it.")


def _refuse_torch_pruned(model: nn.Module) -> None:
    buffers = dict(model.named_buffers())
    for name, _ in model.named_parameters():
        if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in buffers:
            raise UnsupportedModelError(
                f"{name!r} is already under torch.nn.utils.prune. Call torch.nn.utils.prune.remove on its module, or "
                "take its masks over with sapwood.from_torch_prune."
            )
