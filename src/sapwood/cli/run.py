"""`sapwood run`: a recipe, with its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from sapwood.checks import Known
from sapwood.cli.compare import compare_and_report
from sapwood.cli.flags import OptionalFolder, Tracker
from sapwood.experiments.config import Place
from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.recipes import load, overridden


@dataclass(frozen=True)
class Run:
    """Run a recipe: a published comparison with its settings, or one of your own; `sapwood recipes` lists them.

    Finished runs in DIR are not run again, so that a recipe may be interrupted, repeated and extended.

    Attributes:
        recipe: Name of the recipe, or package.module:function, or path/to/file.py:function, which returns a Recipe.
        set: Settings that differ, such as train.epochs=1 grid.seeds=0,1 grid.methods=snip,ntk-sap@rounds=5.
        place: Where it is computed.
        engine: What computes it.
        out: Folder for report.html, results.csv, figures and runs; the default is runs/RECIPE.
        tracker: Where metrics go besides DIR: tensorboard, wandb, mlflow, trackio, or package.module:function.
        ntk: Also compute the tangent kernels of the first seed's networks at this sparsity, and show their spectra.
    """

    recipe: Positional[Annotated[str, arg(metavar="RECIPE"), Known(load)]]
    set: tuple[str, ...] = ()
    place: Place = field(default_factory=Place)
    engine: EngineConfig = field(default_factory=EngineConfig)
    out: OptionalFolder = None
    tracker: Tracker | None = None
    ntk: float | None = None

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code, which is not 0 if a run failed."""
        recipe = overridden(load(self.recipe), self.set)
        configs, out = recipe.grid.runs(recipe.train), self.out or Path("runs") / recipe.name
        return compare_and_report(
            configs,
            out,
            self.place,
            self.engine,
            typed,
            tracker=self.tracker,
            expected=recipe.accuracies,
            ntk=self.ntk,
        )
