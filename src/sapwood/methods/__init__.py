"""Methods by name, and the front door `prune`."""

from sapwood.methods.front import prunable, prune
from sapwood.methods.table import LABELLED, METHODS, configured, find

__all__ = ["LABELLED", "METHODS", "configured", "find", "prunable", "prune"]
