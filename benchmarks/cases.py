"""What is measured: networks, inputs, and the budget that the NTK-SAP paper gives each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A network and what a mask search on it looks at.

    Attributes:
        model: Name in `sapwood.models`.
        input_shape: One sample's shape.
        num_classes: Outputs.
        density: Share of the weights to keep.
        budget: Fields of `ntk-sap` and of the published procedure: rounds, resamples, samples.
        batch_size: Most inputs that are run at once: the paper's 256, or what fits a 16 GB machine.
        labelled: Labelled inputs for the methods that need them: 10 a class.
        long: Whether a search of many mini-batches takes hours, so that one of them is measured.
        settings: Further settings of the model.
    """

    model: str
    input_shape: tuple[int, int, int]
    num_classes: int
    density: float
    budget: dict[str, int]
    batch_size: int
    labelled: int
    long: bool
    settings: dict[str, Any] = field(default_factory=dict)


_VIT_S = {"patch": 16, "width": 384, "depth": 12, "heads": 6, "image_size": 224}

CASES: dict[str, Case] = {
    "resnet20": Case(
        "resnet20", (3, 32, 32), 10, 0.8**18, {"rounds": 20, "resamples": 5, "samples": 100}, 256, 100, long=False
    ),
    "vgg16-bn": Case(
        "vgg16-bn", (3, 32, 32), 100, 0.8**18, {"rounds": 100, "resamples": 1, "samples": 1000}, 256, 1000, long=True
    ),
    "resnet18": Case(
        "resnet18", (3, 64, 64), 200, 0.8**18, {"rounds": 100, "resamples": 1, "samples": 2000}, 256, 2000, long=True
    ),
    "resnet50": Case(
        "resnet50", (3, 224, 224), 1000, 0.8**14, {"rounds": 100, "resamples": 1, "samples": 10_000}, 16, 10_000, True
    ),
    "vit-s": Case(
        "vit-tiny",
        (3, 224, 224),
        1000,
        0.8**14,
        {"rounds": 100, "resamples": 1, "samples": 10_000},
        16,
        10_000,
        long=True,
        settings=_VIT_S,
    ),
    "tiny": Case(
        "resnet8", (3, 8, 8), 10, 0.1, {"rounds": 2, "resamples": 1, "samples": 6}, 4, 6, long=False
    ),  # keeps the commands running in the tests
}
