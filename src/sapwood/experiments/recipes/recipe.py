"""What a recipe is: a comparison with its training, where it comes from, and the numbers that it should reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sapwood.experiments.config import label_of
from sapwood.experiments.fields import parse_variant
from sapwood.experiments.grid import Grid
from sapwood.training import TrainConfig

Key = tuple[str, float]


class Accuracy(NamedTuple):
    """An accuracy as published.

    Attributes:
        percent: Of the test images.
        std: Over the seeds, percentage points; None where none is given.
        exact: Printed as a number; False: read off a figure by eye, about 0.15 points in error.
    """

    percent: float
    std: float | None = None
    exact: bool = True


@dataclass(frozen=True)
class Recipe:
    """A comparison that somebody published, or that is worth repeating.

    Attributes:
        name: As `sapwood run` takes it.
        about: What it is, in one sentence.
        source: Where settings and numbers come from.
        grid: Data, model, methods, sparsities, seeds.
        train: How the networks are trained.
        expected: Accuracy test accuracies by method label and sparsity; the dense model's is at sparsity 0.
        notes: What the fields cannot say: where sources disagree, what is not verified, what differs here.
    """

    name: str
    about: str
    source: str
    grid: Grid
    train: TrainConfig
    expected: Mapping[Key, Accuracy] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def accuracies(self) -> dict[Key, float]:
        """The published accuracies, percent, by method label and sparsity."""
        return {key: published.percent for key, published in self.expected.items()}


def table(
    sparsities: tuple[float, ...], rows: Mapping[str, tuple[float | Accuracy | None, ...]], *, exact: bool = False
) -> dict[Key, Accuracy]:
    """Accuracy numbers as printed: a row a method, a column a sparsity; None where there is none.

    Args:
        sparsities: Of the columns.
        rows: By method, as in `Grid.methods`; a plain number has no standard deviation.
        exact: Whether plain numbers were printed, rather than read off a figure.
    """
    return {
        (label(method), sparsity): cell if isinstance(cell, Accuracy) else Accuracy(cell, exact=exact)
        for method, cells in rows.items()
        for sparsity, cell in zip(sparsities, cells, strict=True)
        if cell is not None
    }


def label(method: str) -> str:
    """The label that an entry of `Grid.methods` gets in tables and figures."""
    variant = parse_variant(method)
    return label_of(variant.method, variant.fields, variant.control, variant.retraining)
