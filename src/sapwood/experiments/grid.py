"""Which runs a comparison consists of."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Annotated

from sapwood import data, models
from sapwood.allocation import target_density
from sapwood.checks import Count, Known, Natural, OneOf, Resolution, Seed, check
from sapwood.errors import ConfigError
from sapwood.experiments import levels
from sapwood.experiments.config import DENSE, RunConfig, seeded
from sapwood.experiments.fields import parse_variant
from sapwood.training import TrainConfig


def _method(text: str) -> None:
    """Refuses what is no method; the dense model is refused later, in better words."""
    if text != DENSE:
        parse_variant(text)


@dataclass(frozen=True)
class Grid:
    """A comparison: every method at every sparsity with every seed, and the dense model with every seed.

    Attributes:
        data: Data set.
        model: Model.
        methods: Pruning methods, some perhaps with fields that differ from the method table, as
            ntk-sap@rounds=5,epsilon=1e-6, or a control (shuffle, shuffle-taps, reinit, invert), as
            ntk-sap@control=shuffle. imp, lr-rewinding and magnitude-after
            prune after training; so does any method with a way of retraining, as snip@retrain=fine-tune (or
            rewind-weights, rewind-lr).
        sparsities: Shares of the prunable weights to remove, each in [0, 1).
        seeds: One run each. A seed gives all methods the same initial weights and the same data order.
        resolution: Pixels that images are brought to; the default keeps theirs.
        per_class: Training images of each class that SNIP, GraSP and their like score on.
        min_per_layer: Weights that every layer keeps at least.
    """

    data: Annotated[str, OneOf("data set", tuple(data.names()))] = "digits"
    model: Annotated[str, Known(models.check_name)] = "resnet8"
    methods: tuple[Annotated[str, Known(_method)], ...] = ("ntk-sap", "synflow", "snip", "grasp", "magnitude", "random")
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98)
    seeds: tuple[Seed, ...] = (0, 1, 2)
    resolution: Resolution | None = None
    per_class: Count = 10
    min_per_layer: Natural = 0

    def runs(self, train: TrainConfig) -> list[RunConfig]:
        """All runs, the dense ones first.

        Raises:
            BudgetError: a sparsity is not in [0, 1).
            ConfigError: an unknown name, a value out of range, or one of the lists is empty or repeats itself.
        """
        self._check_lists()
        check(self)
        variants = [parse_variant(method) for method in self.methods]
        dense = RunConfig(self.data, self.model, resolution=self.resolution)
        plain = [dataclasses.replace(dense, seed=seed, train=seeded(train, seed)) for seed in self.seeds]
        pruned = [
            dataclasses.replace(
                run,
                method=variant.method,
                density=round(target_density(None, sparsity, None), 12),  # 1 - 0.9 is not quite 0.1
                fields=variant.fields,
                control=variant.control,
                per_class=self.per_class,
                min_per_layer=self.min_per_layer,
                **variant.retraining,
            )
            for variant, sparsity, run in itertools.product(variants, self.sparsities, plain)
        ]
        for run in pruned:
            levels.check(run)
        return plain + pruned

    def _check_lists(self) -> None:
        for name in ("methods", "sparsities", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                given = " ".join(map(str, values)) or "none"
                raise ConfigError(f"{name} must be one or more values without repetition, got {given}.")
        if DENSE in self.methods:
            raise ConfigError(f"The {DENSE} model is always part of a comparison: leave {DENSE!r} out of methods.")
