"""The program `sapwood`: prune, train, compare, show. Every command is a dataclass whose fields are its flags."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg, subcommand

from sapwood.allocation import target_density
from sapwood.errors import ConfigError, SapwoodError, SapwoodWarning
from sapwood.experiments import terminal
from sapwood.experiments.compare import Outcome, compare
from sapwood.experiments.config import Place, RunConfig, seeded, under
from sapwood.experiments.environment import device_of
from sapwood.experiments.fields import parse_fields
from sapwood.experiments.grid import Grid
from sapwood.experiments.run import run
from sapwood.experiments.search import Shape, search, subject
from sapwood.experiments.summary import summarise
from sapwood.masks import Masks
from sapwood.methods import find, prunable
from sapwood.training import Epoch, TrainConfig

FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes; 130 = 128 + SIGINT, as in a shell

Model = Annotated[str, arg(metavar="MODEL")]
File = Annotated[Path, arg(metavar="FILE")]


@dataclass(frozen=True)
class Recipe(TrainConfig):
    """How the networks are trained, by SGD."""

    seed: Suppress[int] = 0  # follows from the seed of the run

    def __post_init__(self) -> None:
        """Leaves the checks to the TrainConfig that is made of this, whose errors reach `main`."""


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
    out: File | None = None
    method: str = "ntk-sap"
    density: float | None = None
    sparsity: float | None = None
    compression: float | None = None
    data: str | None = None
    per_class: int = 10
    shape: Shape = field(default_factory=Shape)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allocation: str | None = None
    min_per_layer: int = 0
    seed: int = 0
    set: tuple[str, ...] = ()
    dry_run: bool = False
    overwrite: bool = False
    place: Place = field(default_factory=Place)

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code."""
        chosen = [*self.set, *([f"allocation={self.allocation}"] if self.allocation else [])]
        fields = parse_fields(self.method, chosen)
        device = device_of(self.place.device)
        if not self.dry_run:
            density, out = target_density(self.density, self.sparsity, self.compression), self._target()
        built = subject(
            self.model,
            self.shape,
            data_name=self.data,
            place=self.place,
            # A dry run scores nothing and so needs no labels.
            method="random" if self.dry_run else self.method,
            fields=fields,
            per_class=self.per_class,
            seed=self.seed,
        )
        if self.dry_run:
            terminal.show(terminal.weight_table(prunable(built.model, self.include, self.exclude)))
            return 0
        out.parent.mkdir(parents=True, exist_ok=True)
        built.model.to(device)
        rounds = fields.get("rounds", find(self.method)[1].rounds)
        with terminal.progress() as bar:
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
        terminal.show(terminal.mask_table(result.masks))
        print(out)
        return 0

    def _target(self) -> Path:
        if self.out is None:
            raise ConfigError("The mask file has no name: add --out FILE, or --dry-run to write none.")
        if self.out.exists() and not self.overwrite:
            raise ConfigError(f"{self.out} exists: add --overwrite to replace it, or choose another --out.")
        return self.out


@dataclass(frozen=True)
class Train:
    """Train a model, dense or under the masks of a file, and write its weights and result.

    The same command takes up an interrupted training where it was; a finished one is not repeated.

    Attributes:
        model: Name of the model, as for `sapwood prune`.
        out: Folder for config.json, metrics.jsonl, weights.safetensors and result.json.
        data: Data set.
        masks: Mask file from `sapwood prune`; the default trains the dense model.
        seed: Of the initial weights (those that `sapwood prune` saw with the same seed), the data order and dropout.
        resolution: Height and width to bring the images to, in pixels; the default keeps theirs.
        recipe: How it is trained.
        place: Where it is computed.
    """

    model: Positional[Model]
    out: Annotated[Path, arg(metavar="DIR")]
    data: str = "digits"
    masks: File | None = None
    seed: int = 0
    resolution: int | None = None
    recipe: Recipe = field(default_factory=Recipe)
    place: Place = field(default_factory=Place)

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code."""
        masks = None if self.masks is None else Masks.load(self.masks)
        config = RunConfig(
            self.data, self.model, resolution=self.resolution, seed=self.seed, train=seeded(self.recipe, self.seed)
        )
        if masks is not None:
            config = under(config, masks)
        with terminal.progress("last") as bar:
            task = bar.add_task("epochs", total=config.train.epochs, last="")

            def show(row: Epoch) -> None:
                bar.update(task, completed=row["epoch"], last=f"test accuracy {row['test_accuracy']:.2f} %")

            result = run(config, self.out, self.place, masks=masks, save_weights=True, on_epoch=show)
        if result.diverged:
            terminal.complain("warning", f"the training diverged in epoch {result.epochs}: lower --lr.")
        print(f"test accuracy after epoch {result.epochs}: {result.test_accuracy:.2f} %")
        if result.validation_accuracy is not None:
            print(f"validation accuracy: {result.validation_accuracy:.2f} %")
        print(self.out)
        return 0


@dataclass(frozen=True)
class Compare:
    """Compare pruning methods: prune and train with each, then write a report. Alone, it runs a demo in two minutes.

    Finished runs in DIR are not run again, so that a comparison may be interrupted, repeated and extended.

    Attributes:
        grid: What is compared; the dense model always is.
        recipe: How the networks are trained; the defaults are made for the demo, the digits.
        place: Where it is computed.
        out: Folder for report.html, results.csv, figures and runs; the default is runs/DATA, such as runs/digits.
        workers: Processes that run side by side; the default is one a CPU core, or one on a GPU.
    """

    grid: Grid = field(default_factory=Grid)
    recipe: Recipe = field(
        default_factory=lambda: Recipe(epochs=5, batch_size=64, lr=0.1, schedule="one-cycle", milestones=())
    )
    place: Place = field(default_factory=Place)
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    workers: int | None = None

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code, which is not 0 if a run failed."""
        configs, out = self.grid.runs(self.recipe), self.out or Path("runs") / self.grid.data
        with terminal.progress() as bar:
            task = bar.add_task(f"{self.grid.model} on {self.grid.data}, runs", total=len(configs))

            def show(outcome: Outcome, fresh: bool) -> None:
                bar.advance(task)
                if fresh and not bar.disable:
                    bar.console.print(terminal.outcome_line(outcome))

            outcomes = compare(configs, out, self.place, workers=self.workers, on_run=show)
        failed = [outcome for outcome in outcomes if outcome.result is None]
        for outcome in failed:
            terminal.complain("error", f"{terminal.run_name(outcome.config)}: {outcome.error}")
        if len(failed) < len(outcomes):
            from sapwood.experiments.report import write_report  # here, because matplotlib takes a second to import

            terminal.show(terminal.comparison_table(summarise(outcomes)))
            print(write_report(outcomes, out, typed))
        return FAILED if failed else 0


@dataclass(frozen=True)
class Show:
    """Show what is in a mask file: how it came about, and how many weights of each layer it keeps.

    Attributes:
        file: Mask file.
        csv: Print the layers as CSV, and nothing else.
    """

    file: Positional[File]
    csv: bool = False

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code."""
        masks = Masks.load(self.file)
        if self.csv:
            terminal.print_csv(masks)
        else:
            terminal.show(terminal.provenance_table(masks))
            terminal.show(terminal.mask_table(masks))
        return 0


Command = (
    Annotated[Prune, subcommand("prune")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Show, subcommand("show")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        0; 1 if a run of a comparison failed; 2 for what the user can put right; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("always", SapwoodWarning)
        warnings.showwarning = lambda message, *_, **__: terminal.complain("warning", message)
        try:
            command = tyro.cli(Command, prog="sapwood", args=argv, config=(OmitArgPrefixes,))
            return int(command(shlex.join(["sapwood", *argv])))
        except (SapwoodError, OSError) as error:
            terminal.complain("error", error)
            return USAGE
        except KeyboardInterrupt:
            terminal.complain("error", "interrupted; the same command goes on from here.")
            return INTERRUPTED
