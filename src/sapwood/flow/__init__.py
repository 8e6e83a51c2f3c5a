"""Networks run as positive flows: what SynFlow, SynFlow-L2, PX and the diagnosis of paths have in common."""

from sapwood.flow.positive import PositiveFlow

__all__ = ["PositiveFlow"]
