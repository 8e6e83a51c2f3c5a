"""`sapwood prune`: from a model's name to a mask file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional

from sapwood.allocation import target_density
from sapwood.checks import Count, Known, Natural, Seed
from sapwood.cli.flags import DataSet, File, Model, NewFile
from sapwood.errors import ConfigError
from sapwood.experiments import terminal
from sapwood.experiments.config import Place
from sapwood.experiments.environment import device_of
from sapwood.experiments.fields import parse_fields
from sapwood.experiments.search import Shape, asking_for_data, needs_batches, refuse_without_data, search, subject
from sapwood.methods import find, prunable


@dataclass(frozen=True)
class Prune:
    """Find which weights of an untrained model to keep, and write them to a mask file.

    Exactly one of --density, --sparsity and --compression says how many.

    Attributes:
        model: Name of the model (resnet20, vgg16-bn, wrn-28-10, vit-tiny, ...), or torchvision:NAME, timm:NAME, or
            package.module:factory.
        out: Mask file to write.
        method: Pruning method, or package.module:object.
        density: Share of the prunable weights to keep, above 0, at most 1.
        sparsity: Share of the prunable weights to remove, from 0 to below 1.
        compression: 1 / density, 1 or more.
        data: Data set that the model is for; methods such as snip and grasp score on its training images.
        per_class: Training images of each class to score on.
        shape: What the model is built for where --data does not say it.
        include: Weights to prune besides those of linear, convolution, attention and recurrent layers: names or globs.
        exclude: Weights to leave dense, which do not count: names or globs.
        allocation: How the budget is divided among the layers: global, uniform, uniform+ or erk; the default is the
            method's own.
        min_per_layer: Weights that every layer keeps at least.
        seed: Of the model's initial weights and of every draw.
        set: Fields of the method, such as rounds=20 epsilon=1e-4.
        dry_run: Print the prunable weights and write nothing.
        overwrite: Replace FILE if it exists.
        place: Where it is computed.
    """

    model: Positional[Model]
    out: NewFile = None
    method: Annotated[str, Known(find)] = "ntk-sap"
    density: float | None = None
    sparsity: float | None = None
    compression: float | None = None
    data: DataSet | None = None
    per_class: Count = 10
    shape: Shape = field(default_factory=Shape)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allocation: str | None = None
    min_per_layer: Natural = 0
    seed: Seed = 0
    set: tuple[str, ...] = ()
    dry_run: bool = False
    overwrite: bool = False
    place: Place = field(default_factory=Place)

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code."""
        chosen = [*self.set, *([f"allocation={self.allocation}"] if self.allocation else [])]
        fields = parse_fields(self.method, chosen)
        device = device_of(self.place.device)
        asked = (self.density, self.sparsity, self.compression)
        if not self.dry_run or any(share is not None for share in asked):
            density = target_density(*asked)
        if not self.dry_run:
            out = self._target()
            if self.data is None:
                refuse_without_data(self.method, fields)
        built = subject(
            self.model,
            self.shape,
            data_name=self.data,
            place=self.place,
            per_class=self.per_class if not self.dry_run and needs_batches(self.method, fields) else None,
            seed=self.seed,
        )
        if self.dry_run:
            terminal.show(terminal.weight_table(prunable(built.model, self.include, self.exclude)))
            return 0
        out.parent.mkdir(parents=True, exist_ok=True)
        built.model.to(device)
        rounds = fields.get("rounds", getattr(find(self.method)[1], "rounds", 1))
        with terminal.progress() as bar, asking_for_data(self.method, self.data):
            task = bar.add_task(f"{self.method}, rounds", total=rounds)
            result = search(
                built,
                method=self.method,
                density=density,
                seed=self.seed,
                include=self.include,
                exclude=self.exclude,
                min_per_layer=self.min_per_layer,
                on_round=lambda _, __: bar.advance(task),
                **fields,
            )
        result.masks.save(out)
        if result.params is not None:
            terminal.complain(
                "warning",
                f"{self.method} also changes the weights that are kept, and a mask file holds none: call sapwood.prune "
                "from Python, or train with `sapwood compare`, where they count.",
            )
        terminal.show(terminal.mask_table(result.masks))
        print(result.coverage)
        print(out)
        return 0

    def _target(self) -> File:
        if self.out is None:
            raise ConfigError("The mask file has no name: add --out FILE, or --dry-run to write none.")
        if self.out.exists() and not self.overwrite:
            raise ConfigError(f"{self.out} exists: add --overwrite to replace it, or choose another --out.")
        return self.out
