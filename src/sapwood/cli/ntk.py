"""`sapwood ntk`: spectra of the tangent kernels of dense and pruned networks, in one figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from sapwood.allocation import target_density
from sapwood.checks import Count, Known, Seed
from sapwood.cli.flags import DataSet, Model, OptionalFolder
from sapwood.experiments import kernel_run, terminal
from sapwood.experiments.config import Place
from sapwood.experiments.environment import device_of
from sapwood.experiments.kernels import KernelConfig


@dataclass(frozen=True)
class Ntk:
    """Compute the tangent kernels of a dense network and of pruned ones: spectra in one figure, and a table.

    Kernels and masks in DIR are not computed again, so that a command may be interrupted, repeated and extended.

    Attributes:
        model: Name of the model, as for `sapwood prune`.
        masks: Mask files from `sapwood prune`.
        method: Methods to prune with here, as for `sapwood compare`, or "all"; the default without --masks is those of
            NTK-SAP's Figure 2.
        sparsity: Share of the prunable weights that the methods remove; the default is the figure's.
        data: Data set whose training images are the inputs.
        kernel: What the kernels are the kernels of.
        seed: Of the initial weights, the methods' draws and the images.
        dynamics: Also train on up to 50 of the images, and compare with the training that the kernel predicts.
        steps: Steps of gradient descent of such a training.
        place: Where it is computed.
        out: Folder for ntk.html, ntk.csv, ntk.json and figures; the default is ntk/MODEL-DATA.
    """

    model: Positional[Model]
    masks: tuple[Path, ...] = ()
    method: tuple[Annotated[str, Known(kernel_run.variants)], ...] = ()
    sparsity: float = 0.7379
    data: DataSet = "digits"
    kernel: KernelConfig = field(default_factory=KernelConfig)
    seed: Seed = 0
    dynamics: bool = False
    steps: Count = 100
    place: Place = field(default_factory=Place)
    out: OptionalFolder = None

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code."""
        device_of(self.place.device)  # which is not there, perhaps
        out = self.out or Path("ntk") / f"{self.model.replace(':', '-').replace('/', '-')}-{self.data}"
        methods = self.method or (() if self.masks else kernel_run.PAPER)
        networks = kernel_run.read_masks(self.masks)
        density = round(target_density(None, self.sparsity, None), 12)
        if methods:
            networks |= kernel_run.find_masks(self.model, self.data, methods, density, self.seed, out, self.place)
        about = (self.model, self.data, networks, self.kernel, self.seed)
        spectra = kernel_run.spectra(*about, out / "kernels", self.place)
        trained = kernel_run.trainings(*about, self.steps, self.place) if self.dynamics else None

        from sapwood.experiments.kernel_report import table, write_page  # here, because matplotlib takes a second

        page = write_page(spectra, out, typed, kernel_run.setup(spectra, self.place), trained)
        terminal.show(table(spectra.networks))
        print(page)
        return 0
