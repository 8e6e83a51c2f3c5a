"""Methods by name, and the front door `prune`."""

from sapwood.methods.check import ScoreCheck, check_score
from sapwood.methods.front import prunable, prune
from sapwood.methods.table import LABELLED, METHODS, configured, find

__all__ = ["LABELLED", "METHODS", "ScoreCheck", "check_score", "configured", "find", "prunable", "prune"]
