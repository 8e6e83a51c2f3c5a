"""The methods by the names the papers give them: criterion, rounds, schedule and allocation."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from sapwood.criteria import Grasp, Magnitude, NtkSap, NtkSapAnalytic, Random, Snip, SynFlow
from sapwood.errors import ConfigError, unknown_name
from sapwood.pruning import Criterion, Method

METHODS: dict[str, Method] = {
    "ntk-sap": Method(NtkSap(), rounds=20),
    "ntk-sap-analytic": Method(NtkSapAnalytic(), rounds=20),
    "random": Method(Random()),
    "erk": Method(Random(), allocation="erk"),
    "magnitude": Method(Magnitude()),
    "snip": Method(Snip()),
    "iter-snip": Method(Snip(), rounds=60),
    "force": Method(Snip(), rounds=60, regrow=True),
    "grasp": Method(Grasp()),
    "synflow": Method(SynFlow(), rounds=100),
}

LABELLED = ("snip", "iter-snip", "force", "grasp")
"""The methods that need labelled batches; the others need an input's shape at most."""


def find(method: str | Method | Criterion) -> tuple[str, Method]:
    """The name and the method behind a name, an import path, a method or a criterion.

    Args:
        method: A name of `METHODS`; `"package.module:object"`; a `Method`; or a criterion, used in one global round.

    Raises:
        ConfigError: no such name, or nothing callable at the import path.
    """
    if isinstance(method, Method):
        return type(method.criterion).__name__, method
    if not isinstance(method, str):
        return getattr(method, "__name__", type(method).__name__), Method(method)
    if ":" in method:
        return method, find(_imported(method))[1]
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    return method, METHODS[method]


def configured(name: str, method: Method, fields: dict[str, Any]) -> Method:
    """The method with some of its own or its criterion's fields replaced.

    Raises:
        ConfigError: neither has such a field.
    """
    own = {field.name for field in dataclasses.fields(method)} - {"criterion"}
    criterion = criterion_fields(method)
    for field in fields:
        if field not in own | criterion:
            raise unknown_name(f"field of method {name!r}", field, own | criterion)
    inner = {key: value for key, value in fields.items() if key in criterion}
    outer = {key: value for key, value in fields.items() if key in own}
    if inner:
        outer["criterion"] = dataclasses.replace(method.criterion, **inner)  # type: ignore[type-var]
    return dataclasses.replace(method, **outer)


def criterion_fields(method: Method) -> set[str]:
    """Names of the hyper-parameters of a method's criterion."""
    criterion = method.criterion
    return {field.name for field in dataclasses.fields(criterion)} if dataclasses.is_dataclass(criterion) else set()


def _imported(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"There is no method at {path!r} ('package.module:object' was expected): {error}.") from error
    if not callable(found) and not isinstance(found, Method):
        raise ConfigError(f"{path!r} is {type(found).__name__}; a criterion or a sapwood.Method was expected.")
    return found() if isinstance(found, type) else found
