"""What an operation is called, however it is written: `x += y`, `x.add_(y)` and `torch.add(x, y)` are all "add"."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

OPERATORS = frozenset((
    "add", "sub", "mul", "truediv", "div", "pow", "matmul", "neg", "abs", "gt", "lt", "ge", "le", "eq", "ne", "and",
    "or", "xor", "invert", "getitem", "setitem", "iter",
))  # fmt: skip
ALIASES = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg",
    "concat": "cat", "concatenate": "cat", "arctan": "atan", "special_expit": "sigmoid", "special_erf": "erf",
    "absolute": "abs", "special_softmax": "softmax", "special_log_softmax": "log_softmax", "vector_norm": "norm",
    "special_logsumexp": "logsumexp",
}  # fmt: skip
UNTAGGED = frozenset(("hardswish", "log_sigmoid", "logsigmoid", "prelu", "softsign", "tanhshrink"))
SHARED = frozenset(("max", "min"))  # of two tensors, and over one


class Name(NamedTuple):
    """An operation's name, whether its operands come in reverse, and whether it writes into the first one."""

    text: str
    is_reversed: bool = False
    writes: bool = False


@cache
def name_of(function: Any) -> Name:
    """The one name of an operation."""
    text = getattr(function, "__name__", repr(function))
    if text == "__get__":
        return Name(function.__self__.__name__)

    if text.startswith("__") and text.endswith("__"):
        return _operator(text)

    plain = text.strip("_").removeprefix("linalg_")
    return Name(ALIASES.get(plain, plain), writes=text.endswith("_"))


def _operator(text: str) -> Name:
    plain = text.strip("_")
    if plain in OPERATORS:
        return Name(ALIASES.get(plain, plain), writes=plain == "setitem")

    if plain[1:] in OPERATORS:
        return Name(ALIASES.get(plain[1:], plain[1:]), is_reversed=plain[0] == "r", writes=plain[0] == "i")

    return Name(text)


@cache
def is_pointwise(name: str) -> bool:
    """Whether torch's own registry says that an operation works entry by entry."""
    if name in UNTAGGED or name in SHARED:
        return name in UNTAGGED

    packet = getattr(torch.ops.aten, name, None)
    overloads = () if packet is None else packet.overloads()
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)
