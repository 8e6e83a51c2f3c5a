"""What the settings of NTK-SAP's paper have in common (Wang, Li, Sun, ICLR 2023, arXiv 2304.02840)."""

from __future__ import annotations

import dataclasses

from sapwood.experiments.recipes.recipe import Recipe

SOURCE = "Wang, Li, Sun, ICLR 2023 (arXiv 2304.02840)"
FOLLOWERS = "github.com/BeiYazi0/NTK-SAP and github.com/iurada/px-ntk-pruning"

SPARSITIES = tuple(round(1 - 0.8**k, 4) for k in range(2, 19, 2))  # 0.36, 0.5904, ..., 0.9719, 0.982
TABLED = tuple(SPARSITIES[i] for i in (0, 2, 4, 6, 8))  # those of the tables in the paper's appendix I

BASELINES = ("synflow", "snip", "iter-snip", "grasp", "magnitude", "random")
NOT_IN_PAPER = ("force", "erk")  # ERK-random is the stronger random control

NOTES = (
    "epsilon is a variance, as in the paper; the authors' command line takes its square root, 0.01.",
    "One draw of weights serves a mini-batch, and R = resamples passes are made over the inputs, as in the authors' "
    "code. The paper's Algorithm 1 draws weights for every input and has no R: see the -as-written recipes.",
    "Pruned are the weights of all convolutions and linear layers, the first, the shortcuts' and the classifier's "
    "included; biases and BatchNorm are not.",
    "Exactly k weights are kept; the authors' threshold prunes ties, too, and their program ends if it misses k by 5.",
    "After pruning, the initial weights return and BatchNorm's statistics start anew; in the authors' code they keep "
    "those of the last scoring batch.",
    "SNIP, GraSP and their like score on 10 images of every class, plain; the authors draw 10 x classes images at "
    "random over all classes, and augment them.",
    "Iter-SNIP has 60 rounds, those of its authors; the paper's number is not known. SynFlow has 100, in float64.",
    "No warm-up, no label smoothing, weight decay on every parameter. There is no validation split: nothing is chosen.",
    "Accuracies here are those after the last epoch; whether the paper gives the last or the best one is not known. "
    "Its number of seeds is not known either; its ± look like three.",
)
FIGURE_NOTES = (
    "The figure's axis says 73.80 and 89.30 %; its code gives 73.79 and 89.26 %, which are used here.",
    "Digitised numbers that lie below the figure's axis are extrapolated along the line.",
)

AS_WRITTEN = (
    "Beside the authors' code's NTK-SAP stands the one of Algorithm 1: batch_size=1 draws weights, a perturbation and "
    "BatchNorm statistics for every input, resamples=1 passes over the inputs once. Its number of inputs B is not "
    "known: the code's is taken."
)


def ntk_sap(**fields: int | float | str) -> str:
    """NTK-SAP with fields, as `Grid.methods` takes it."""
    return "ntk-sap@" + ",".join(f"{key}={value}" for key, value in fields.items())


def shuffled(method: str) -> str:
    """The control: the method's masks, shuffled inside each layer."""
    return f"{method}{',' if '@' in method else '@'}control=shuffle"


def as_written(recipe: Recipe, written: str) -> Recipe:
    """NTK-SAP as the paper's Algorithm 1 has it, beside the authors' code's of a recipe."""
    as_code = recipe.grid.methods[0]
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-as-written",
        about=f"{recipe.about.removesuffix('.')}: NTK-SAP as the paper's Algorithm 1 is written, and as its code is.",
        grid=dataclasses.replace(recipe.grid, methods=(as_code, written)),
        expected={key: published for key, published in recipe.expected.items() if key[0].startswith("ntk-sap")},
        notes=(AS_WRITTEN, *recipe.notes),
    )
