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
from sapwood.names import Names

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
        raw: What torch calls it where the model is wrapped (`sapwood.names`), in the order of `aliases`.
    """

    name: str
    aliases: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    tensor: Tensor
    raw: tuple[str, ...] = ()

    @property
    def is_layer_weight(self) -> bool:
        """Whether it is a weight that is pruned by default: by all its owners, its name and its dimensions."""
        _, parametrized, rest = self.name.rpartition("parametrizations.")
        leaf = rest if parametrized else self.name.rpartition(".")[2]
        return "weight" in leaf and all(map(self._is_weight_of, self.owners))

    def _is_weight_of(self, owner: nn.Module) -> bool:
        """A stack of matrices in a subclass of Linear is no linear layer's weight."""
        if isinstance(owner, _ConvNd | nn.Bilinear):
            return self.tensor.dim() >= 2
        return self.tensor.dim() == 2 and (isinstance(owner, LAYERS) or self._is_transposed)

    @property
    def _is_transposed(self) -> bool:
        """Whether it is the weight, (in, out), of Hugging Face's linear layer, which says its outputs in `nf`."""
        owner = self.owners[0]
        return type(owner).__name__ == "Conv1D" and getattr(owner, "nf", None) == self.tensor.shape[-1]

    @property
    def fan_in(self) -> int:
        """Inputs that one output unit sums over (of the dense weight), by the convention of the layer that owns it.

        Raises:
            UnsupportedModelError: it is no layer's weight, and which of its dimensions is summed over is the forward's.
        """
        shape, owner = self.tensor.shape, self.owners[0]
        if not self.is_layer_weight:
            raise UnsupportedModelError(
                f"{self.name!r} of shape {tuple(shape)} is not the weight of a linear, convolution, attention or "
                "recurrent layer, so its fan-in is not known (a stack of experts may be (experts, out, in) or "
                "(experts, in, out)): exclude it, or make it the weight of a layer."
            )
        if isinstance(owner, _ConvTransposeNd):  # (in, out / groups, ...): torch's own formula takes the wrong axis
            return shape[0] // owner.groups * math.prod(shape[2:])
        return shape[0] if self._is_transposed else math.prod(shape[1:])

    @property
    def layout(self) -> Layout | None:
        """Dimensions of its output and input channels; None where they are not known.

        They are known of layers, of vectors, and of embeddings, whose inputs are their words.
        """
        owner = self.owners[0]
        known = self.is_layer_weight or isinstance(owner, nn.Embedding | nn.EmbeddingBag) or self.tensor.dim() < 2
        if not known:
            return None
        inputs_first = isinstance(owner, _ConvTransposeNd | nn.Embedding | nn.EmbeddingBag) or self._is_transposed
        return Layout(int(inputs_first), owner.groups if isinstance(owner, _ConvNd) else 1)

    def matches(self, pattern: Pattern) -> bool:
        """Whether a name, glob, module type or module selects this parameter."""
        if isinstance(pattern, str):
            names = [name for alias in (*self.aliases, *self.raw) for name in (alias, _module_of(alias))]
            return pattern in names or any(fnmatchcase(name, pattern) for name in names)  # a name may look like a glob
        if isinstance(pattern, type):
            return any(isinstance(owner, pattern) for owner in self.owners)
        return any(parameter is self.tensor for parameter in pattern.parameters())


def all_weights(model: nn.Module) -> list[Weight]:
    """Every parameter of the model once, ties resolved, in torch's order."""
    names = Names.of(model)
    weights = []
    for name, parameter in names.parameters.items():
        aliases = names.aliases[name]
        owners = tuple(names.modules[_module_of(alias)] for alias in aliases)
        raw = tuple(names.raw[alias] for alias in aliases)
        weights.append(Weight(name, aliases, owners, parameter, raw))
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
        UnsupportedModelError: nothing is left to prune, a weight is quantised, or the model is already under
            `torch.nn.utils.prune`.
    """
    weights = all_weights(model)
    include, exclude = as_patterns(include), as_patterns(exclude)
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
    for weight in chosen:
        _refuse_quantised(weight)
    return chosen


def _module_of(name: str) -> str:
    """The module that a user would name: "fc" for "fc.weight" and for "fc.parametrizations.weight.original"."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("parametrizations") if "parametrizations" in parts else -1])


def as_patterns(patterns: Iterable[Pattern] | Pattern) -> tuple[Pattern, ...]:
    """One pattern or several, as several."""
    return (patterns,) if isinstance(patterns, str | type | nn.Module) else tuple(patterns)


def _matches_nothing(word: str, pattern: Pattern, weights: list[Weight]) -> ConfigError:
    names = {n for w in weights for alias in w.aliases for n in (alias, _module_of(alias)) if n}
    if isinstance(pattern, str):
        return unknown_name(f"parameter or module in {word}", pattern, names)
    what = pattern.__name__ if isinstance(pattern, type) else f"the given {type(pattern).__name__}"
    return ConfigError(f"{word} names {what}, but no parameter of the model belongs to it.")


def _refuse_quantised(weight: Weight) -> None:
    dtype = weight.tensor.dtype
    if not (dtype.is_complex or dtype.is_floating_point) or dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"{weight.name!r} holds {str(dtype).removeprefix('torch.')} numbers, and only floating-point weights of 16 "
            f"bits or more can be pruned: prune before quantising, or leave it out with exclude={weight.name!r}."
        )


def _refuse_torch_pruned(model: nn.Module) -> None:
    names = Names.of(model).tensors
    for name in names:
        if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in names:
            raise UnsupportedModelError(
                f"{name!r} is already under torch.nn.utils.prune. Call torch.nn.utils.prune.remove on its module, or "
                "take its masks over with sapwood.from_torch_prune."
            )
