"""Which runs a comparison consists of."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from sapwood.allocation import target_density
from sapwood.errors import ConfigError
from sapwood.experiments.config import DENSE, RunConfig, seeded
from sapwood.experiments.fields import parse_fields
from sapwood.training import TrainConfig


@dataclass(frozen=True)
class Grid:
    """A comparison: every method at every sparsity with every seed, and the dense model with every seed.

    Attributes:
        data: Data set.
        model: Model.
        methods: Pruning methods.
        sparsities: Shares of the prunable weights to remove, each in [0, 1).
        seeds: One run each. A seed gives all methods the same initial weights and the same data order.
        resolution: Pixels that images are brought to; the default keeps theirs.
        per_class: Training images of each class that SNIP, GraSP and their like score on.
        min_per_layer: Weights that every layer keeps at least.
        set: Fields of single methods, as METHOD.FIELD=VALUE, such as ntk-sap.rounds=5.
    """

    data: str = "digits"
    model: str = "resnet8"
    methods: tuple[str, ...] = ("ntk-sap", "synflow", "snip", "grasp", "magnitude", "random")
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98)
    seeds: tuple[int, ...] = (0, 1, 2)
    resolution: int | None = None
    per_class: int = 10
    min_per_layer: int = 0
    set: tuple[str, ...] = ()

    def runs(self, train: TrainConfig) -> list[RunConfig]:
        """All runs, the dense ones first.

        Raises:
            BudgetError: a sparsity is not in [0, 1).
            ConfigError: an unknown method or field, or one of the lists is empty or repeats itself.
        """
        self._check_lists()
        fields = self._fields()
        dense = RunConfig(self.data, self.model, resolution=self.resolution)
        plain = [dataclasses.replace(dense, seed=seed, train=seeded(train, seed)) for seed in self.seeds]
        return plain + [
            dataclasses.replace(
                run,
                method=method,
                density=round(target_density(None, sparsity, None), 12),  # 1 - 0.9 is not quite 0.1
                fields=fields[method],
                per_class=self.per_class,
                min_per_layer=self.min_per_layer,
            )
            for method, sparsity, run in itertools.product(self.methods, self.sparsities, plain)
        ]

    def _check_lists(self) -> None:
        for name in ("methods", "sparsities", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                given = " ".join(map(str, values)) or "none"
                raise ConfigError(f"{name} must be one or more values without repetition, got {given}.")
        if DENSE in self.methods:
            raise ConfigError(f"The {DENSE} model is always part of a comparison: leave {DENSE!r} out of methods.")

    def _fields(self) -> dict[str, dict[str, Any]]:
        for entry in self.set:
            if not any(entry.startswith(f"{method}.") for method in self.methods):
                legal = ", ".join(self.methods)
                raise ConfigError(f"--set takes METHOD.FIELD=VALUE with a method of {legal}; {entry!r} came.")
        return {
            method: parse_fields(method, [e.removeprefix(f"{method}.") for e in self.set if e.startswith(f"{method}.")])
            for method in self.methods
        }
