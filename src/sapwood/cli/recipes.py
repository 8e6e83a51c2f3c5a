"""`sapwood recipes`: what `sapwood run` can run, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from sapwood.checks import Known
from sapwood.experiments import terminal
from sapwood.experiments.environment import device_of, is_device_name
from sapwood.experiments.recipes import RECIPES, load
from sapwood.experiments.recipes.estimate import estimate
from sapwood.experiments.recipes.tables import cost_table, recipe_table


@dataclass(frozen=True)
class Recipes:
    """List the recipes with their cost, or show one: where it comes from, its settings, numbers to reach, and quirks.

    Attributes:
        recipe: One of them, as for `sapwood run`; the default lists all.
        probe: Time a few training steps of each network here, for the hours.
        device: auto (a GPU if there is one), cpu, cuda or cuda:0.
    """

    recipe: Positional[Annotated[str | None, arg(metavar="RECIPE"), Known(load)]] = None
    probe: bool = True
    device: Annotated[str, Known(is_device_name)] = "auto"

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code."""
        device = device_of(self.device) if self.probe else None
        names = RECIPES if self.recipe is None else [self.recipe]
        costs = []
        with terminal.progress("name") as bar:
            task = bar.add_task("estimates", total=len(names), name="")
            for name in names:
                bar.update(task, advance=1, name=name)
                recipe = load(name)
                costs.append((recipe, estimate(recipe, device)))
        terminal.show(cost_table(costs) if self.recipe is None else recipe_table(*costs[0]))
        return 0
