"""`sapwood show`: what is in a mask file, and what it leaves of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from tyro.conf import Positional

from sapwood.checks import Seed
from sapwood.cli.flags import DataSet, File, Model
from sapwood.diagnosis import Diagnosis, diagnose
from sapwood.errors import ConfigError
from sapwood.experiments import terminal
from sapwood.experiments.config import Place
from sapwood.experiments.search import Shape, subject
from sapwood.masks import Masks


@dataclass(frozen=True)
class Show:
    """Show what is in a mask file: how it came about, and how many weights of each layer it keeps.

    With --model, also what it leaves of that model: weights on no path, dead and bottleneck units, paths, gradients.

    Attributes:
        file: Mask file.
        csv: Print the layers as CSV, and nothing else.
        model: Name of the model that the masks are for, as for `sapwood prune`; the default probes none.
        data: Data set that the model is for.
        shape: What the model is built for where --data does not say it.
        seed: Of the initial weights, inputs and signs of the gradients.
        place: Where the data are.
    """

    file: Positional[File]
    csv: bool = False
    model: Model | None = None
    data: DataSet | None = None
    shape: Shape = field(default_factory=Shape)
    seed: Seed = 0
    place: Place = field(default_factory=Place)

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code."""
        if self.model is None and (self.data, self.shape) != (None, Shape()):
            raise ConfigError("--data and the shape are of a model: add --model NAME, or leave them out.")
        masks = Masks.load(self.file)
        if self.csv:
            terminal.print_csv(masks)
            return 0
        found = None if self.model is None else self._probed(self.model, masks)
        terminal.show(terminal.provenance_table(masks))
        terminal.show(terminal.mask_table(masks))
        if found is not None:
            print(f"\n{found.table()}")
        return 0

    def _probed(self, model: str, masks: Masks) -> Diagnosis:
        built = subject(
            model,
            self.shape,
            data_name=self.data,
            place=self.place,
            per_class=None,
            seed=self.seed,
        )
        return diagnose(built.model, masks, input_shape=built.input_shape, seed=self.seed)
