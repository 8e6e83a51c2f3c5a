"""The figures of tangent kernels: spectra in the form of NTK-SAP's Figure 2, and trainings beside their prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from sapwood.experiments.config import DENSE
from sapwood.experiments.figures import axes_of, legend
from sapwood.experiments.kernels import Network
from sapwood.experiments.looks import INK, MUTED, Look, looks
from sapwood.ntk import Dynamics

EVERY = 9  # markers on a curve


def spectra(networks: Sequence[Network]) -> Figure:
    """Sorted eigenvalues on a log scale, the smallest on the left; the dense network is drawn in black, dashed.

    Args:
        networks: Their eigenvalues are drawn but for those that are zero up to rounding.
    """
    with axes_of((5.2, 3.8)) as (figure, axes):
        by_label = {network.label: network for network in networks}
        for label, look in _looks(list(by_label)).items():
            values, size = by_label[label].eigenvalues, by_label[label].size
            floor = max(values[0], 0.0) * 1e-12
            points = [(index, v) for index, v in enumerate(reversed(values), size - len(values)) if v > floor]
            axes.plot(
                [i for i, _ in points],
                [v for _, v in points],
                label=label,
                markevery=max(1, len(points) // EVERY),
                **look,
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("index of the eigenvalue, ascending")
        axes.set_ylabel("eigenvalue (log scale)")
        legend(figure, size=8)
    return figure


def training(dynamics: Mapping[str, Dynamics]) -> Figure:
    """Loss over the steps of gradient descent: real (lines) and as the initial kernel predicts (dotted)."""
    with axes_of((3.5, 3.2)) as (figure, axes):
        for label, look in _looks(list(dynamics)).items():
            found = dynamics[label]
            start = found.loss[0]
            every = max(1, len(found.loss) // EVERY)
            real = [value / start for value in found.loss]
            axes.plot(real, label=label, **{**look, "markevery": every})
            predicted = [value / start for value in found.predicted]
            axes.plot(predicted, **{**look, "linestyle": ":", "marker": "", "linewidth": 1.3})
        axes.plot([], [], color=MUTED, linestyle=":", linewidth=1.3, label="predicted")
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("step")
        axes.set_ylabel("loss, share of the initial one")
        legend(figure, size=7.5)
    return figure


def drift(dynamics: Mapping[str, Dynamics]) -> Figure:
    """Centred alignment of the kernel during training with the initial one."""
    with axes_of((3.5, 3.2)) as (figure, axes):
        for label, look in _looks(list(dynamics)).items():
            found = dynamics[label]
            axes.plot(found.kernel_steps[: len(found.kept_alignment)], found.kept_alignment, label=label, **look)
        axes.set_xlabel("step")
        axes.set_ylabel("alignment with the initial kernel")
        legend(figure, size=7.5)
    return figure


def _looks(labels: Sequence[str]) -> dict[str, Look]:
    """Of the methods as in all figures; the dense network in ink."""
    dense: Look = {"color": INK, "linestyle": (0, (4, 2)), "linewidth": 2.2, "marker": ""}
    methods = looks([label for label in labels if label != DENSE])
    return {label: dense if label == DENSE else methods[label] for label in labels}
