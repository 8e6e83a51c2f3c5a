"""Methods by name, and the front doors `prune` and `imp`."""

from sapwood.methods.check import ScoreCheck, check_score
from sapwood.methods.front import prunable, prune
from sapwood.methods.imp import imp, level_densities
from sapwood.methods.table import AFTER_TRAINING, METHODS, configured, find

__all__ = [
    "AFTER_TRAINING",
    "METHODS",
    "ScoreCheck",
    "check_score",
    "configured",
    "find",
    "imp",
    "level_densities",
    "prunable",
    "prune",
]
