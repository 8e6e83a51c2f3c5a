"""ImageNet with ResNet-18 and ResNet-50: table 1 of the paper."""

from __future__ import annotations

from sapwood.experiments.config import DENSE
from sapwood.experiments.grid import Grid
from sapwood.experiments.recipes import paper
from sapwood.experiments.recipes.recipe import Accuracy, Recipe, table
from sapwood.training import TrainConfig

SPARSITIES = tuple(round(1 - 0.8**k, 4) for k in (10, 14))  # 0.8926, 0.956
NTK_SAP = paper.ntk_sap(rounds=100, resamples=1, samples=10000)

OWN_NOTES = (
    "Give the images as --data-root DIR with DIR/train/CLASS/* and DIR/val/CLASS/*.",
    "Training settings are from the code of a follow-up (github.com/iurada/px-ntk-pruning), and not verified for "
    "NTK-SAP; its T, the mini-batch of its scoring and its epsilon are not known for ImageNet: T = 100, 256 and 1e-4 "
    "are taken.",
    "The paper gives one number each, so there is one seed; the margin over the runner-up is 0.1 to 1.1 points.",
    "Images are read with the short side at 224 pixels and cut to the centre, and resized crops are taken from that; "
    "the authors take them from the whole image in training, and test on the centre of images of 256 pixels. The "
    "channels' mean and standard deviation are measured on 2,000 images. Accuracies may differ for these reasons.",
)


def imagenet_resnet18() -> Recipe:
    """11,678,912 prunable weights."""
    return _recipe(
        "resnet18",
        69.98,
        {
            "synflow": (57.30, 45.65),
            "snip": (57.41, 45.04),
            "iter-snip": (52.97, 37.44),
            "grasp": (58.16, 49.17),
            "magnitude": (58.75, 48.50),
            "random": (54.48, 42.80),
            NTK_SAP: (58.87, 49.43),
        },
    )


def imagenet_resnet50() -> Recipe:
    """25,502,912 prunable weights."""
    return _recipe(
        "resnet50",
        76.20,
        {
            "synflow": (66.81, 58.88),
            "snip": (60.98, 40.69),
            "iter-snip": (52.53, 36.82),
            "grasp": (67.74, 59.73),
            "magnitude": (66.80, 43.79),
            "random": (65.30, 56.53),
            NTK_SAP: (68.28, 60.79),
        },
    )


def _recipe(model: str, dense: float, rows: dict[str, tuple[float | None, ...]]) -> Recipe:
    return Recipe(
        name=f"imagenet-{model}",
        about=f"The paper's ImageNet experiment with ResNet-{model.removeprefix('resnet')}.",
        source=f"{paper.SOURCE}, table 1; training as in github.com/iurada/px-ntk-pruning",
        grid=Grid(
            data="folder",
            model=model,
            methods=(NTK_SAP, *paper.BASELINES),
            sparsities=SPARSITIES,
            seeds=(0,),
            resolution=224,
        ),
        train=TrainConfig(epochs=90, batch_size=448, milestones=(30, 60, 80)),
        expected={(DENSE, 0.0): Accuracy(dense), **table(SPARSITIES, rows, exact=True)},
        notes=(*OWN_NOTES, *paper.NOTES),
    )
