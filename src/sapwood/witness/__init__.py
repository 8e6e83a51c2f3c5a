"""What a model does, seen by running it a few times before it is scored."""

from sapwood.witness.alone import refuse_lost_zeros
from sapwood.witness.opening import opened
from sapwood.witness.twice import look_at_second_derivatives

__all__ = ["look_at_second_derivatives", "opened", "refuse_lost_zeros"]
