"""Legal values of settings, said in the annotations of a dataclass's fields and checked in one place.

@dataclass(frozen=True)
class Settings:
epochs: Annotated[int, Range(1)]
momentum: Annotated[float, Range(0, 1, open_high=True)] = 0.9

def __post_init__(self) -> None:
check(self)
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import inspect
import math
import os
import sys
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from sapwood.errors import ConfigError, unknown_name

LARGEST = 2**63 - 1  # of an integer, as torch holds them
SIMPLE = (bool, int, float, str, Path)


class Rule(ABC):
    """What a value must be besides its type; stands in `Annotated`."""

    @abstractmethod
    def check(self, name: str, value: Any) -> None:
        """Raises a ConfigError, which names the setting, for an illegal value."""


@dataclass(frozen=True)
class Range(Rule):
    """From `low` to `high`, both legal unless said to be open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    unit: str = ""

    def check(self, name: str, value: Any) -> None:
        """Refuses what is outside."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        if not (above and below):
            unit = self.unit and f" {self.unit}"
            raise ConfigError(f"{name} must be {self}{unit}, got {_short(value)}.")

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {self.low}"
        if self.low == -math.inf:
            return f"{'below' if self.open_high else 'at most'} {self.high}"
        return f"in {'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"


@dataclass(frozen=True)
class OneOf(Rule):
    """One of the names; `kind` says of what."""

    kind: str
    names: tuple[str, ...]

    def check(self, name: str, value: Any) -> None:
        """Refuses another name, and proposes the nearest."""
        if value not in self.names:
            raise unknown_name(self.kind, str(value), self.names)


@dataclass(frozen=True)
class Known(Rule):
    """What a function finds without complaint, such as a name that stands for something."""

    find: Callable[[Any], Any]

    def check(self, name: str, value: Any) -> None:
        """Looks for it."""
        self.find(value)


@dataclass(frozen=True)
class CalledWith(Rule):
    """Something that may be called with these arguments, in this order."""

    arguments: tuple[str, ...]

    def check(self, name: str, value: Any) -> None:
        """Refuses another signature; one that is not known passes."""
        if not takes(value, *self.arguments):
            raise ConfigError(
                f"{name} must be callable as {name}({', '.join(self.arguments)}), which {_short(value)} is not."
            )


Count = Annotated[int, Range(1)]
Processes = Annotated[int, Range(1, unit="process")]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
Resolution = Annotated[int, Range(1), Range(high=2**14)]
"""Height and width of images, in pixels."""
Seed = Annotated[int, Range(0), Range(high=2**31 - 1)]
"""A seed from which others follow by adding some ten thousands; scikit-learn's end at 2^32 - 1."""


def check(settings: Any, *, flags: bool = False) -> None:
    """Checks every field of a dataclass, and of the dataclasses in it, against its annotation.

    Protocols and what is in containers other than tuples are left alone. A float is finite, except where the default is
    not. With `flags`, a field is called as on the command line: `--batch-size`.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """
    check_fields(settings, {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}, flags)


def check_fields(settings: Any, values: Mapping[str, Any], flags: bool = False) -> None:
    """Checks values that fields of a dataclass have or are to have: see `check`."""
    kind: Any = type(settings)
    hints = _hints(kind)
    for field in dataclasses.fields(settings):
        value = values.get(field.name, field.default)
        if value is not field.default:
            name = f"--{field.name.replace('_', '-')}" if flags else field.name
            infinite = isinstance(field.default, float) and math.isinf(field.default)
            check_value(name, value, hints.get(field.name, Any), infinite=infinite)


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Checks what a function was called with (its `locals()` at the beginning) against its annotations: see `check`."""
    defaults = inspect.signature(function).parameters
    for name, hint in _hints(function).items():
        if name in arguments and arguments[name] is not defaults[name].default:
            check_value(name, arguments[name], hint)


def check_value(name: str, value: Any, hint: Any, *, infinite: bool = False) -> None:
    """Checks one value against an annotation: see `check`."""
    if typing.get_origin(hint) is Annotated:
        inner, *notes = typing.get_args(hint)
        check_value(name, value, inner, infinite=infinite)
        for rule in (note for note in notes if isinstance(note, Rule) and value is not None):
            rule.check(name, value)
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        _check_union(name, value, typing.get_args(hint), infinite)
    elif typing.get_origin(hint) is tuple:
        _check_type(name, value, (tuple, list), "a sequence")
        kinds = typing.get_args(hint)
        for part in value if kinds[-1:] == (Ellipsis,) else ():
            check_value(name, part, kinds[0], infinite=infinite)
    elif hint in SIMPLE:
        _check_simple(name, value, hint, infinite)
    elif (kind := _class_of(hint)) is not None:
        _check_type(name, value, (kind,), _WORDS.get(kind, f"a {kind.__name__}"))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check(value, flags=name.startswith("--"))


def takes(function: Callable[..., Any], *arguments: str) -> bool:
    """Whether something may be called with this many positional arguments; True where its signature is not known."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # of a builtin, which has none
        return True
    return True


def _check_union(name: str, value: Any, kinds: tuple[Any, ...], infinite: bool) -> None:
    if value is None and types.NoneType in kinds:
        return
    others = [kind for kind in kinds if kind is not types.NoneType]
    if len(others) == 1:
        return check_value(name, value, others[0], infinite=infinite)
    for kind in others:
        with contextlib.suppress(ConfigError):
            return check_value(name, value, kind, infinite=infinite)
    names = ", ".join(getattr(kind, "__name__", str(kind)) for kind in others)
    raise ConfigError(f"{name} takes one of {names}; {_short(value)} came.")


_WORDS: dict[Any, str] = {collections.abc.Callable: "a function", collections.abc.Iterable: "an iterable"}


def _class_of(hint: Any) -> Any:
    """The class whose instances an annotation asks for, where that can be told: not of a protocol or a variable."""
    kind = typing.get_origin(hint) or hint
    if kind is collections.abc.Callable or (isinstance(kind, type) and not getattr(kind, "_is_protocol", False)):
        return None if kind in (object, Any) else kind
    return None


def _check_simple(name: str, value: Any, kind: type, infinite: bool) -> None:
    legal: tuple[type, ...] = {float: (float, int), Path: (Path, str)}.get(kind, (kind,))
    if isinstance(value, bool) and kind is not bool:
        legal = ()
    _check_type(name, value, legal, f"a value of type {kind.__name__}")
    largest = math.inf if infinite else sys.float_info.max
    if kind is float and not -largest <= value <= largest:  # which NaN is not either
        raise ConfigError(f"{name} must be a finite number, got {_short(value)}.")
    if kind is int and abs(value) > LARGEST:
        raise ConfigError(f"{name} must be at most {LARGEST:,}, got {_short(value)}.")
    if kind in (str, Path) and not _is_text(str(value)):
        raise ConfigError(f"{name} holds characters that no name has: {_short(str(value))} came.")


def _is_text(text: str) -> bool:
    """Whether the operating system could take it: no NUL, and nothing that cannot be encoded."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _check_type(name: str, value: Any, legal: tuple[type, ...], expected: str) -> None:
    try:
        fits = isinstance(value, legal)
    except TypeError:  # somebody's class that cannot be asked
        return
    if not fits:
        raise ConfigError(f"{name} takes {expected}; {_short(value)} came.")


def _short(value: Any) -> str:
    """The value as one types it; a number of a thousand digits by its size."""
    if isinstance(value, int) and abs(value) > 10**40:
        return f"a number of some {round(value.bit_length() * math.log10(2)):,} digits"
    return repr(value)[:80]


@cache
def _hints(kind: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a dataclass or a function; none where one of somebody else's cannot be read."""
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}
