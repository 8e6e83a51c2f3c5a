"""`sapwood train`: a model, dense or under the masks of a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tyro.conf import Positional

from sapwood.checks import Resolution, Seed
from sapwood.cli.flags import DataSet, File, Folder, Model, Together, Training
from sapwood.errors import SapwoodError
from sapwood.experiments import terminal
from sapwood.experiments.config import Place, RunConfig, seeded, under
from sapwood.experiments.environment import device_of
from sapwood.experiments.run import run
from sapwood.experiments.store import RunResult
from sapwood.experiments.together import end
from sapwood.masks import Masks
from sapwood.training import Epoch

if TYPE_CHECKING:  # imported late, as it is slow to import
    from lightning_fabric import Fabric

OTHER = 3  # exit code of a process that is not the first of several


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
        training: How it is trained.
        place: Where it is computed.
        together: Several devices for it.
    """

    model: Positional[Model]
    out: Folder
    data: DataSet = "digits"
    masks: File | None = None
    seed: Seed = 0
    resolution: Resolution | None = None
    training: Training = field(default_factory=Training)
    place: Place = field(default_factory=Place)
    together: Together = field(default_factory=Together)

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code."""
        masks = None if self.masks is None else Masks.load(self.masks)
        config = RunConfig(
            self.data, self.model, resolution=self.resolution, seed=self.seed, train=seeded(self.training, self.seed)
        )
        if masks is not None:
            config = under(config, masks)
        fabric = self.together.fabric(self.place.device, config.train.precision)
        if fabric is None:
            device_of(self.place.device)  # which is not there, perhaps
        try:
            result = self._run(config, masks, fabric)
            if fabric is not None:
                fabric.barrier()
        except (SapwoodError, KeyboardInterrupt):
            if fabric is None or fabric.is_global_zero:
                raise
            return OTHER  # which the first process speaks for
        finally:
            if fabric is not None:
                end(fabric)
        if fabric is None or fabric.is_global_zero:
            self._tell(result)
        return 0

    def _run(self, config: RunConfig, masks: Masks | None, fabric: Fabric | None) -> RunResult:
        with terminal.progress("last", silent=fabric is not None and not fabric.is_global_zero) as bar:
            task = bar.add_task("epochs", total=config.train.epochs, last="")

            def show(row: Epoch) -> None:
                bar.update(task, completed=row["epoch"], last=f"test accuracy {row['test_accuracy']:.2f} %")

            keep = {config.train.epochs}
            return run(config, self.out, self.place, masks=masks, keep=keep, on_epoch=show, fabric=fabric)

    def _tell(self, result: RunResult) -> None:
        if result.diverged:
            terminal.complain("warning", f"the training diverged in epoch {result.epochs}: lower --lr.")
        print(f"test accuracy after epoch {result.epochs}: {result.test_accuracy:.2f} %")
        if result.validation_accuracy is not None:
            print(f"validation accuracy: {result.validation_accuracy:.2f} %")
        print(self.out)
