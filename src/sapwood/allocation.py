"""From scores to masks: which weights a budget keeps.

An allocation is a callable `(scores, candidates, keep) -> Masks`: among the weights that `candidates` allows it keeps
**exactly** `keep`, higher scores first. Ties are broken by position (parameter order, then row-major order), so the
result is a function of its arguments. A threshold would not do: at a tie it keeps too many or too few.

How many weights a density keeps is a matter of definition: here the nearest number, in authors' code one below or one
above it (see `ROUNDINGS`). One weight a round is enough to lead methods of many rounds elsewhere: SynFlow's 100 rounds
on a network of 4,000 weights keep masks that overlap by 73 % only. So masks of iterated methods can be compared with
those of other code round by round, and at the end only under the same rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor

from sapwood.checks import CalledWith, Range, check_value
from sapwood.errors import BudgetError, unknown_name
from sapwood.masks import Masks

Scores = dict[str, Tensor]
Share = Annotated[float, Range(0, 1)]


class Allocation(Protocol):
    """What turns scores into masks."""

    def __call__(self, scores: Scores, candidates: Masks, keep: int) -> Masks:
        """Keeps exactly `keep` of the weights that `candidates` allows."""
        ...


@dataclass(frozen=True)
class Global:
    """One ranking over all layers, after a floor of `min_per_layer` weights in each (as many as it has left)."""

    min_per_layer: int = 0

    def __call__(self, scores: Scores, candidates: Masks, keep: int) -> Masks:
        """Keeps the `keep` highest scores of the network."""
        floors = _floors(candidates, self.min_per_layer, keep)
        flat = []
        for name, score in scores.items():
            ranked = score.flatten().masked_fill(~candidates[name].flatten(), -math.inf)
            if floors[name]:
                ranked = ranked.masked_fill(_top(ranked, floors[name]), math.inf)
            flat.append(ranked)
        chosen = _top(torch.cat(flat), keep).split([s.numel() for s in scores.values()])
        return Masks({name: c.reshape(scores[name].shape) for name, c in zip(scores, chosen, strict=True)})


@dataclass(frozen=True)
class Layerwise:
    """Every layer has a budget of its own; scores compete only inside the layer.

    Attributes:
        shares: How the budget is divided: `"uniform"` (the same density everywhere), `"uniform+"` (the first layer
            dense, the others alike; Gale et al. 2019), `"erk"` (Erdős-Rényi-Kernel: kept weights of a layer in
            proportion to the sum of its dimensions; Evci et al. 2020), or densities by parameter name. A layer whose
            part exceeds its size is filled and the rest redistributed, so that the total stays exact.
        min_per_layer: Weights that every layer keeps at least (as many as it has).
    """

    shares: str | Mapping[str, float] = "uniform"
    min_per_layer: int = 0

    def __call__(self, scores: Scores, candidates: Masks, keep: int) -> Masks:
        """Keeps the highest scores of each layer, `keep` in all."""
        floors = _floors(candidates, self.min_per_layer, keep)
        weights = self._weights(scores, floors, keep)
        counts = apportion(weights, floors, _alive(candidates), keep)
        chosen = {}
        for name, score in scores.items():
            ranked = score.flatten().masked_fill(~candidates[name].flatten(), -math.inf)
            chosen[name] = _top(ranked, counts[name]).reshape(score.shape)
        return Masks(chosen)

    def _weights(self, scores: Scores, floors: Mapping[str, int], keep: int) -> dict[str, float]:
        sizes = {name: score.numel() for name, score in scores.items()}
        if isinstance(self.shares, Mapping):
            missing = [name for name in sizes if name not in self.shares]
            if missing:
                raise BudgetError(f"The allocation gives no density for {missing[0]!r}; name every prunable weight.")
            return {name: self.shares[name] * size for name, size in sizes.items()}
        if self.shares == "erk":
            return {name: float(sum(score.shape)) for name, score in scores.items()}
        weights = {name: float(size) for name, size in sizes.items()}
        if self.shares == "uniform+":
            first = next(iter(sizes))
            if sizes[first] + sum(floor for name, floor in floors.items() if name != first) >= keep:
                raise BudgetError(
                    f"'uniform+' keeps the first layer {first!r} dense ({sizes[first]:,} weights), which with the "
                    f"floors of the others exhausts the budget of {keep:,}; use 'uniform' or a higher density."
                )
            weights[first] = math.inf
        return weights


NAMES = ("global", "uniform", "uniform+", "layerwise", "erk")


def allocation(rule: str | Masks | Mapping[str, float] | Allocation, min_per_layer: int = 0) -> Allocation:
    """Reads an allocation from its name, from masks to be like, or from densities by name.

    Args:
        rule: `"global"`; `"uniform"` or `"layerwise"` (the same density in every layer); `"uniform+"`; `"erk"`; masks
            whose layer densities are to be met; a mapping from parameter name to density; or an allocation.
        min_per_layer: Weights that every layer keeps at least. Ignored by an allocation given as an object.

    Raises:
        ConfigError: the name is none of these.
        BudgetError: `min_per_layer` is negative.
    """
    if min_per_layer < 0:
        raise BudgetError(f"min_per_layer is {min_per_layer}; it must be 0 or more.")
    if isinstance(rule, Masks):
        return Layerwise({name: count.density for name, count in rule.per_layer().items()}, min_per_layer)
    if isinstance(rule, Mapping):
        for name, share in rule.items():
            check_value(f"The density of {name!r} in allocation", share, Share)
        return Layerwise(rule, min_per_layer)  # type: ignore[arg-type]  # not Masks: that was above
    if callable(rule):
        CalledWith(("scores", "candidates", "keep")).check("allocation", rule)
        return rule
    if not isinstance(rule, str):
        raise unknown_name("allocation", str(rule), NAMES)
    if rule not in NAMES:
        raise unknown_name("allocation", rule, NAMES)
    if rule == "global":
        return Global(min_per_layer)
    return Layerwise("uniform" if rule == "layerwise" else rule, min_per_layer)


def target_density(density: float | None, sparsity: float | None, compression: float | None) -> float:
    """The one density that was asked for, in whichever of three words: density d, sparsity 1-d or compression 1/d.

    Raises:
        BudgetError: none or several are given, or the density is not in (0, 1].
    """
    words = {"density": density, "sparsity": sparsity, "compression": compression}
    given = {word: value for word, value in words.items() if value is not None}
    if len(given) != 1:
        came = ", ".join(f"{word}={value}" for word, value in given.items()) or "none of them"
        raise BudgetError(
            f"Give exactly one of density (0-1], sparsity [0-1) and compression (1 or more); {came} came."
        )
    ((word, value),) = given.items()
    legal = {"density": 0 < value <= 1, "sparsity": 0 <= value < 1, "compression": 1 <= value < math.inf}
    if not legal[word]:
        bounds = {"density": "above 0, at most 1", "sparsity": "0 or more, below 1", "compression": "1 or more"}
        raise BudgetError(f"{word} is {value}; it must be {bounds[word]} (a share, not a percentage).")
    if word == "sparsity":
        return round(1 - value, 12)  # 1 - 0.9 is not quite 0.1
    return 1 / value if word == "compression" else value


ROUNDINGS: dict[str, Callable[[float, int], int]] = {
    "nearest": lambda density, total: round(density * total),
    "up": lambda density, total: total - int((1 - density) * total),
    "down": lambda density, total: int(density * total),
}
"""How a density becomes a number of weights.

"up" and "down" are spelt as in the code that they reproduce, in double precision: "up" in that of SynFlow, NTK-SAP and
PX, "down" in SNIP's PyTorch port and FORCE's. So "up" keeps 91 of 100 weights at a density of 0.9, since 1 - 0.9 is a
little less than 0.1.
"""


def check_rounding(rounding: str) -> None:
    """Refuses what is not one of `ROUNDINGS`.

    Raises:
        ConfigError: it is not.
    """
    if rounding not in ROUNDINGS:
        raise unknown_name("rounding", rounding, ROUNDINGS)


def budget(density: float, total: int, rounding: str = "nearest") -> int:
    """The number of weights that a density keeps: density x total, rounded.

    Args:
        density: Share to keep, (0, 1].
        total: Prunable weights.
        rounding: "nearest" (halves to the even number), "up" or "down"; see `ROUNDINGS`.

    Raises:
        BudgetError: that is no weight at all.
        ConfigError: no such rounding.
    """
    check_rounding(rounding)
    keep = ROUNDINGS[rounding](density, total)
    if keep < 1:
        raise BudgetError(
            f"A density of {density:g} keeps none of {total:,} prunable weights; the least is {1 / total:g}."
        )
    return keep


def apportion(
    weights: Mapping[str, float], floors: Mapping[str, int], sizes: Mapping[str, int], total: int
) -> dict[str, int]:
    """Divides `total` in proportion to `weights`, each part between its floor and its size, by largest remainders."""

    def parts(scale: float) -> dict[str, float]:
        return {n: min(max(scale * w if w else 0.0, floors[n]), sizes[n]) for n, w in weights.items()}

    low, high = 0.0, 1.0
    while sum(parts(high).values()) < total and high < 1e300:
        high *= 2
    for _ in range(200):  # bisection: the sum of the parts rises with the scale
        middle = (low + high) / 2
        low, high = (middle, high) if sum(parts(middle).values()) < total else (low, middle)
    exact = parts(high)
    counts = {n: math.floor(part + 1e-9) for n, part in exact.items()}
    by_remainder = sorted(exact, key=lambda n: counts[n] - exact[n])
    while (short := total - sum(counts.values())) > 0:
        for n in [n for n in by_remainder if counts[n] < sizes[n]][:short]:
            counts[n] += 1
    return counts


def _alive(candidates: Masks) -> dict[str, int]:
    return {name: count.kept for name, count in candidates.per_layer().items()}


def _floors(candidates: Masks, floor: int, keep: int) -> dict[str, int]:
    alive = _alive(candidates)
    if sum(alive.values()) < keep:
        raise BudgetError(f"{keep:,} weights were asked for and only {sum(alive.values()):,} may be kept.")
    floors = {name: min(floor, count) for name, count in alive.items()}
    if sum(floors.values()) > keep:
        raise BudgetError(
            f"min_per_layer={floor} needs {sum(floors.values()):,} weights over {len(floors)} layers, but the budget "
            f"is {keep:,}; lower the floor or raise the density."
        )
    return floors


def _top(values: Tensor, keep: int) -> Tensor:
    """A bool tensor with exactly `keep` True: the largest values, ties by position. Linear time, no sort."""
    if keep <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(values.numel() - keep + 1).values
    chosen = values > threshold
    ties = (values == threshold).nonzero().flatten()
    chosen[ties[: keep - int(chosen.count_nonzero())]] = True
    return chosen
