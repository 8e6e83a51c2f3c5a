"""Moment propagation: what a network computes in expectation over fresh weights and Gaussian inputs, in one pass.

`traced` writes a network down as a list of operations, `propagate` runs a small rule for each of them, and `rule`
registers a rule for an operation that has none.
"""

from sapwood.moments import (  # noqa: F401  # registers their rules
    attention,
    concat,
    convolutions,
    layers,
    maxima,
    norms,
    pools,
    rectifiers,
    shapes,
    smooth,
    sums,
)
from sapwood.moments.propagate import propagate
from sapwood.moments.registry import RULES, Call, rule
from sapwood.moments.state import Law, Moments, Side, Weight
from sapwood.moments.trace import Trace, traced

__all__ = ["RULES", "Call", "Law", "Moments", "Side", "Trace", "Weight", "propagate", "rule", "traced"]
