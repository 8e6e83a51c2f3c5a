"""A method's own fields, from FIELD=VALUE as typed on a command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from sapwood.errors import ConfigError, unknown_name
from sapwood.methods import configured, find
from sapwood.methods.table import criterion_fields
from sapwood.pruning import Method


def parse_fields(method: str, entries: Iterable[str]) -> dict[str, Any]:
    """Reads `FIELD=VALUE` entries into the fields of a method, each value in the type of the field's default.

    Raises:
        ConfigError: the method or a field does not exist, or a value is illegal.
    """
    name, recipe = find(method)
    defaults = _defaults(recipe)
    parsed = {}
    for entry in entries:
        field, equals, text = entry.partition("=")
        if not equals:
            raise ConfigError(f"--set takes FIELD=VALUE, such as rounds=20; {entry!r} came.")
        if field not in defaults:
            raise unknown_name(f"field of method {name!r}", field, defaults)
        parsed[field] = _value(field, text, type(defaults[field]))
    configured(name, recipe, parsed)  # which checks the values
    return parsed


def _defaults(recipe: Method) -> dict[str, Any]:
    own = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe) if field.name != "criterion"}
    return own | {field: getattr(recipe.criterion, field) for field in criterion_fields(recipe)}


def _value(field: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    try:
        value = json.loads(text.lower() if kind is bool else text)
    except json.JSONDecodeError:
        value = text
    if kind is float and type(value) is int:
        return float(value)
    if kind in (bool, int, float) and type(value) is not kind:
        raise ConfigError(f"--set {field} takes a value of type {kind.__name__}; {text!r} came.")
    return value
