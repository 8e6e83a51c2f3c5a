"""What NTK-SAP's parts are worth, on CIFAR-10 with ResNet-20: the paper's ablations and those it leaves out."""

from __future__ import annotations

import dataclasses

from sapwood.experiments.recipes.cifar import CIFAR10_NTK_SAP, cifar10_resnet20
from sapwood.experiments.recipes.paper import SOURCE, TABLED, ntk_sap
from sapwood.experiments.recipes.recipe import Accuracy, Key, Recipe, table

NTK_SAP = "ntk-sap"  # T = 20, R = 5, epsilon = 1e-4, fresh weights, random inputs


def ablation_epsilon() -> Recipe:
    """Appendix I."""
    rows = {
        NTK_SAP: CIFAR10_NTK_SAP,
        "ntk-sap@epsilon=2.5e-5": _published((91.34, 0.11), (90.30, 0.17), (87.94, 0.20), (83.82, 0.24), (77.33, 0.10)),
        "ntk-sap@epsilon=1e-5": _published((91.45, 0.13), (90.26, 0.06), (87.64, 0.18), (83.92, 0.44), (77.53, 0.34)),
        "ntk-sap@epsilon=1e-6": _published((91.41, 0.03), (90.44, 0.33), (88.00, 0.36), (83.66, 0.23), (76.90, 0.44)),
    }
    return _ablation("epsilon", "the variance of the perturbation", tuple(rows), table(TABLED, rows), "table 12")


def ablation_rounds() -> Recipe:
    """Appendix C."""
    rows = {
        "ntk-sap@rounds=1": (None, None, None, 82.0, 74.4),
        "ntk-sap@rounds=2": (None, None, None, None, 77.0),
        "ntk-sap@rounds=4": (None, None, None, None, 76.7),
        "ntk-sap@rounds=10": (None, None, None, None, 77.1),
        NTK_SAP: (None, None, None, None, 77.6),
    }
    return _ablation("rounds", "the number of rounds T", tuple(rows), table(TABLED, rows), "appendix C")


def ablation_resamples() -> Recipe:
    """How many draws of the weights are needed."""
    methods = (*(ntk_sap(resamples=r) for r in (1, 2)), NTK_SAP, ntk_sap(resamples=10))
    return _ablation("resamples", "the number R of passes with fresh draws", methods)


def ablation_weights() -> Recipe:
    """Fresh weights for every mini-batch (NINW) against the network's own."""
    return _ablation("weights", "fresh weights against the network's own", (NTK_SAP, "ntk-sap@fresh_weights=false"))


def ablation_inputs() -> Recipe:
    """Gaussian noise against images."""
    return _ablation("inputs", "Gaussian inputs against images", (NTK_SAP, "ntk-sap@random_inputs=false"))


def _ablation(
    name: str,
    about: str,
    methods: tuple[str, ...],
    expected: dict[Key, Accuracy] | None = None,
    where: str = "but no numbers are known",
) -> Recipe:
    recipe = cifar10_resnet20()
    return dataclasses.replace(
        recipe,
        name=f"ablation-{name}",
        about=f"NTK-SAP on CIFAR-10 with ResNet-20: {about}.",
        source=f"{SOURCE}, {where}",
        grid=dataclasses.replace(recipe.grid, methods=methods, sparsities=TABLED),
        expected=expected or {},
    )


def _published(*cells: tuple[float, float]) -> tuple[Accuracy, ...]:
    return tuple(Accuracy(*cell) for cell in cells)
