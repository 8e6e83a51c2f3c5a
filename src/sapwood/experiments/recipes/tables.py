"""Recipes in a terminal: the list with costs, and one in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sapwood.experiments.config import DENSE
from sapwood.experiments.recipes.estimate import Estimate
from sapwood.experiments.recipes.recipe import Accuracy, Recipe

COLUMNS = ("runs", "images", "GFLOPs", "hours")
COST_NOTE = (
    "\nruns: networks to train; images: through all of them in training; GFLOPs: of one forward pass of one image, two "
    "a multiply-add; hours: of training here, a run a CPU core or one on the GPU, pruning not counted."
)


def cost_table(rows: Iterable[tuple[Recipe, Estimate]]) -> Group:
    """A line a recipe: what it is, where it comes from, and what it costs."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("recipe", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what it is, and its source")
    for recipe, cost in rows:
        about = Text.assemble(recipe.about, " ", (f"{recipe.source}.", "dim"))
        table.add_row(recipe.name, *_costs(cost).values(), about)
    return Group(table, Text(COST_NOTE, style="dim"))


def recipe_table(recipe: Recipe, cost: Estimate) -> Group:
    """Everything that a recipe says."""
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for key, value in {
        "recipe": recipe.name,
        "about": recipe.about,
        "source": f"{recipe.source}.",
        **{field.name: _text(getattr(recipe.grid, field.name)) for field in dataclasses.fields(recipe.grid)},
        "training": ", ".join(f"{k} {_text(v)}" for k, v in dataclasses.asdict(recipe.train).items() if k != "seed"),
        "cost": ", ".join(f"{text} {key}" for key, text in _costs(cost).items()),
        **{f"note {number}": note for number, note in enumerate(recipe.notes, start=1)},
    }.items():
        facts.add_row(Text(key, style="dim"), Text(value))
    published = Group(Text(""), expected_table(recipe)) if recipe.expected else Group()
    return Group(facts, published, Text(COST_NOTE, style="dim"))


def expected_table(recipe: Recipe) -> Table:
    """The published accuracies, method by sparsity; ~ before those read off a figure."""
    sparsities = sorted({sparsity for method, sparsity in recipe.expected if method != DENSE})
    table = Table(box=None, pad_edge=False, header_style="dim", title="published, % (~ read off a figure)")
    table.add_column("method")
    for sparsity in sparsities:
        table.add_column(f"{100 * sparsity:g} %", justify="right", no_wrap=True)
    for method in dict.fromkeys(method for method, _ in recipe.expected):
        at = (
            [recipe.expected.get((method, 0.0))]
            if method == DENSE
            else [recipe.expected.get((method, s)) for s in sparsities]
        )
        table.add_row(method, *map(_number, at))
    return table


def _number(published: Accuracy | None) -> str:
    if published is None:
        return "-"
    spread = "" if published.std is None else f" ± {published.std:.2f}"
    return f"{published.percent:.2f}{spread}" if published.exact else f"~{published.percent}"


def _costs(cost: Estimate) -> dict[str, str]:
    flops = "-" if cost.flops is None else f"{cost.flops / 1e9:.3g}"
    hours = "-" if cost.hours is None else f"{cost.hours:.2g}" if cost.hours < 10 else f"{cost.hours:,.0f}"
    return dict(zip(COLUMNS, (f"{cost.runs:,}", _large(cost.images), flops, hours), strict=True))


def _text(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value).lower()


def _large(count: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
