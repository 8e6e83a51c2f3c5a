"""Comparisons worth repeating, as functions: the paper's, its ablations, and two for a laptop.

A recipe of your own is a function without arguments that returns a `Recipe`, in any module or file.
"""

from sapwood.experiments.recipes.demos import digits
from sapwood.experiments.recipes.load import RECIPES, load, overridden
from sapwood.experiments.recipes.recipe import Accuracy, Recipe

__all__ = ["RECIPES", "Accuracy", "Recipe", "digits", "load", "overridden"]
