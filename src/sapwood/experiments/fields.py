"""Settings as one types them: FIELD=VALUE, and a method with fields of its own, `ntk-sap@rounds=5,epsilon=1e-6`."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sapwood.checks import check_value
from sapwood.errors import ConfigError, unknown_name
from sapwood.experiments.config import CONTROLS
from sapwood.methods import AFTER_TRAINING, configured, find
from sapwood.methods.table import settings

RETRAIN_FIELDS: dict[str, Any] = {"retrain": str, "rewind_epoch": int, "rate": float}
COMMA = re.compile(r",(?!\w+=)")  # one that does not stand inside a method's variant


@dataclass(frozen=True)
class Variant:
    """A method, the fields in which it differs from the method table, and the control that it undergoes, if any.

    `retraining` has the fields of the run for pruning after training.
    """

    method: str
    fields: dict[str, Any]
    control: str
    retraining: dict[str, Any] = field(default_factory=dict)


def parse_variant(text: str) -> Variant:
    """Reads METHOD, or METHOD@FIELD=VALUE,...

    The fields `control`, `retrain`, `rewind_epoch` and `rate` are the run's and not the method's, and METHOD may be one
    that prunes after training, which stands for another with such fields.

    Raises:
        ConfigError: the method, a field or the control does not exist, or a value is illegal.
    """
    method, _, rest = text.partition("@")
    entries = rest.split(",") if rest else []
    method, usual = AFTER_TRAINING.get(method, (method, {}))
    retraining = {**usual, **_retraining(entries)}
    entries = [entry for entry in entries if entry.partition("=")[0] not in RETRAIN_FIELDS]
    controls = [entry.removeprefix("control=") for entry in entries if entry.startswith("control=")]
    for control in controls:
        if control not in CONTROLS:
            raise unknown_name("control", control, CONTROLS)
    own = [entry for entry in entries if not entry.startswith("control=")]
    return Variant(method, parse_fields(method, own), controls[-1] if controls else "", retraining)


def _retraining(entries: Iterable[str]) -> dict[str, Any]:
    pairs = [assignment(entry, "retrain=rewind-lr") for entry in entries]
    return {key: value(key, text, RETRAIN_FIELDS[key]) for key, text in pairs if key in RETRAIN_FIELDS}


def parse_fields(method: str, entries: Iterable[str]) -> dict[str, Any]:
    """Reads `FIELD=VALUE` entries into the fields of a method, each value in the type of the field's default.

    Raises:
        ConfigError: the method or a field does not exist, or a value is illegal.
    """
    name, found = find(method)
    defaults = settings(found)
    parsed = {}
    for entry in entries:
        field, text = assignment(entry, "rounds=20")
        if field not in defaults:
            raise unknown_name(f"field of method {name!r}", field, defaults)
        parsed[field] = value(field, text, type(defaults[field]))
    configured(name, found, parsed)  # which checks the values
    return parsed


def assignment(entry: str, example: str) -> tuple[str, str]:
    """The two sides of `FIELD=VALUE`.

    Raises:
        ConfigError: there is no equals sign.
    """
    field, equals, text = entry.partition("=")
    if not equals:
        raise ConfigError(f"A setting is written FIELD=VALUE, such as {example}; {entry!r} came.")
    return field, text


def value(field: str, text: str, kind: Any) -> Any:
    """Reads a value of a type: str, bool, int, float, a tuple of one of them (1,2,3), or one of them or none.

    Raises:
        ConfigError: the text is no such value.
    """
    inner = [part for part in typing.get_args(kind) if part not in (types.NoneType, Ellipsis)]
    if typing.get_origin(kind) is tuple:
        return tuple(value(field, part, inner[0]) for part in COMMA.split(text) if part)
    if inner:
        return None if text.lower() == "none" else value(field, text, inner[0])
    if kind is str:
        return text
    try:
        read = json.loads(text.lower() if kind is bool else text)
    except (ValueError, RecursionError):  # a word, a number of thousands of digits, a thousand brackets
        read = text
    if kind in (bool, int, float):
        check_value(field, read, kind)
    return float(read) if kind is float else read
