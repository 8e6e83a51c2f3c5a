"""Methods by name, and the front door `prune`."""

from sapwood.methods.front import prunable, prune
from sapwood.methods.table import LABELLED, METHODS, ON_INPUTS, configured, find

__all__ = ["LABELLED", "METHODS", "ON_INPUTS", "configured", "find", "prunable", "prune"]
