"""How much of a model the masks cover: a sparsity is of the prunable weights, and what is left dense must be said."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from sapwood.masks import Masks
from sapwood.prunable import Pattern, Weight, all_weights, as_patterns

SHOWN = 5


@dataclass(frozen=True)
class Coverage:
    """The matrices of a model that no mask covers; a matrix has two or more dimensions above one.

    Attributes:
        pruned: Number of weights that the masks remove.
        parameters: Number of the model's weights of any kind, tied ones once.
        left_out: Number of weights of each matrix that is not pruned by default and that `include` did not name.
        excluded: The same of those that `exclude` names.
    """

    pruned: int
    parameters: int
    left_out: Mapping[str, int]
    excluded: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, masks: Masks, exclude: Iterable[Pattern] | Pattern = ()) -> Coverage:
        """Of masks on a model, for which `exclude` left some weights out."""
        weights, unwanted = all_weights(model), as_patterns(exclude)
        rest = [weight for weight in weights if weight.name not in masks and _is_matrix(weight)]
        by_user = {weight.name for weight in rest if any(weight.matches(pattern) for pattern in unwanted)}
        left_out = _grouped([w for w in rest if w.name not in by_user], weights, masks)
        excluded = _grouped([w for w in rest if w.name in by_user], weights, masks)
        pruned, parameters = masks.total - masks.kept, sum(weight.tensor.numel() for weight in weights)
        return cls(pruned, parameters, left_out, excluded)

    def __str__(self) -> str:
        """What share of the model is pruned, and what is left dense: a line each, as far as there is any."""
        share = f"{self.pruned / self.parameters:.2%}"
        lines = [f"{self.pruned:,} of the model's {self.parameters:,} parameters are pruned, {share}"]
        if self.left_out:
            lines.append(f"left dense by default: {self._list(self.left_out)}; name them in include= to prune them")
        if self.excluded:
            lines.append(f"left dense by exclude=: {self._list(self.excluded)}")
        return "\n".join(lines)

    def _list(self, groups: Mapping[str, int]) -> str:
        largest = sorted(groups, key=lambda name: -groups[name])
        shown = ", ".join(f"{name} ({groups[name]:,})" for name in largest[:SHOWN])
        more = f" and {len(largest) - SHOWN} more" if len(largest) > SHOWN else ""
        total = sum(groups.values())
        return f"{total:,} weights, {total / self.parameters:.2%} of the model, in {shown}{more}"


def _is_matrix(weight: Weight) -> bool:
    return sum(size > 1 for size in weight.tensor.shape) >= 2


def _grouped(rest: list[Weight], weights: list[Weight], covered: Collection[str]) -> dict[str, int]:
    """Sizes by name, those that differ in numbers only under one glob, if that is fit for `include`."""
    names = {weight.name for weight in rest}
    unfit = [weight.name for weight in weights if weight.name not in names and weight.name not in covered]
    alike: dict[str, list[Weight]] = {}
    for weight in rest:
        alike.setdefault(re.sub(r"(?:(?<=\.)|^)\d+(?=\.)", "*", weight.name), []).append(weight)

    groups: dict[str, int] = {}
    for glob, members in alike.items():
        single = len(members) == 1 or any(fnmatchcase(name, glob) for name in unfit)
        for weight in members:
            name = weight.name if single else glob
            groups[name] = groups.get(name, 0) + weight.tensor.numel()
    return groups
