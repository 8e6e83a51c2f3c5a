"""The methods by the names the papers give them: criterion, rounds, schedule and allocation."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from sapwood.criteria import (
    PX,
    Grasp,
    Magnitude,
    NtkSap,
    NtkSapAnalytic,
    NtkSapJvp,
    OptimalBrainDamage,
    ProsPr,
    Random,
    Skeletonization,
    Snip,
    SynFlow,
    SynFlowL2,
    Taylor,
)
from sapwood.errors import ConfigError, unknown_name
from sapwood.methods.ntt import Ntt
from sapwood.methods.obs import Obs
from sapwood.pruning import Criterion, Method, Procedure

METHODS: dict[str, Procedure] = {
    "ntk-sap": Method(NtkSap(), rounds=20),
    "ntk-sap-analytic": Method(NtkSapAnalytic(), rounds=20),
    "ntk-sap-jvp": Method(NtkSapJvp(), rounds=20),
    "random": Method(Random()),
    "erk": Method(Random(), allocation="erk"),
    "magnitude": Method(Magnitude()),
    "snip": Method(Snip()),
    "iter-snip": Method(Snip(), rounds=60),
    "force": Method(Snip(), rounds=60, regrow=True),
    "grasp": Method(Grasp()),
    "synflow": Method(SynFlow(), rounds=100),
    "synflow-l2": Method(SynFlowL2(), rounds=100),
    "px": Method(PX(), rounds=100),
    "prospr": Method(ProsPr()),
    "ntt": Ntt(),
    # For trained networks, though they score whatever weights there are.
    "janowsky": Method(Magnitude()),
    "taylor": Method(Taylor()),
    "obd": Method(OptimalBrainDamage()),
    "skeletonization": Method(Skeletonization()),
    "obs": Obs(),
}

AFTER_TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude-after": ("magnitude", {"retrain": "fine-tune"}),  # Han et al. 2015
    "imp": ("magnitude", {"retrain": "rewind-weights", "rate": 0.2}),  # Frankle & Carbin 2019, Frankle et al. 2020
    "lr-rewinding": ("magnitude", {"retrain": "rewind-lr", "rate": 0.2}),  # Renda et al. 2020
}
"""What trains the network before it prunes: the method that then scores, and how the rest is trained again.

`sapwood.imp` does this with a training of your own, `sapwood compare` with Sapwood's.
"""

METHOD_FIELDS = tuple(field.name for field in dataclasses.fields(Method) if field.name != "criterion")
"""Fields of `Method`, in the order in which provenance names them."""


def find(method: str | Procedure | Criterion) -> tuple[str, Procedure]:
    """The name and the method behind a name, an import path, a method or a criterion.

    Args:
        method: A name of `METHODS`; `"package.module:object"`; a `Method` or another `Procedure`; or a criterion, used
            in one global round.

    Raises:
        ConfigError: no such name, or nothing callable at the import path.
    """
    if isinstance(method, Method):
        return type(method.criterion).__name__, method
    if isinstance(method, Procedure):
        return type(method).__name__, method
    if not isinstance(method, str):
        return getattr(method, "__name__", type(method).__name__), Method(method)
    if ":" in method:
        return method, find(_imported(method))[1]
    if method in AFTER_TRAINING:
        raise ConfigError(
            f"{method!r} trains the network before it prunes it: call sapwood.imp(model, train=...), or name it in "
            "`sapwood compare --methods`."
        )
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    return method, METHODS[method]


def configured(name: str, method: Procedure, fields: dict[str, Any]) -> Procedure:
    """The method with some of its own or its criterion's fields replaced.

    Raises:
        ConfigError: neither has such a field.
    """
    legal, criterion = settings(method), criterion_fields(method)
    for field in fields:
        if field not in legal:
            raise unknown_name(f"field of method {name!r}", field, legal)
    inner = {key: value for key, value in fields.items() if key in criterion}
    outer = {key: value for key, value in fields.items() if key not in criterion}
    if inner:
        outer["criterion"] = dataclasses.replace(method.criterion, **inner)  # type: ignore[attr-defined]
    return dataclasses.replace(method, **outer) if outer else method  # type: ignore[type-var]


def criterion_fields(method: Procedure) -> set[str]:
    """Names of the hyper-parameters of a method's criterion; none where it has no criterion."""
    return set(_values(getattr(method, "criterion", None)))


def settings(method: Procedure) -> dict[str, Any]:
    """The values of a method's own fields and of its criterion's, by name."""
    own = _values(method)
    criterion = own.pop("criterion", None)
    return own | _values(criterion)


def _values(thing: object) -> dict[str, Any]:
    if isinstance(thing, type) or not dataclasses.is_dataclass(thing):
        return {}
    return {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}


def _imported(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"There is no method at {path!r} ('package.module:object' was expected): {error}.") from error
    if not callable(found) and not isinstance(found, Procedure):
        raise ConfigError(
            f"{path!r} is {type(found).__name__}; a criterion, a sapwood.Method or another Procedure was expected."
        )
    return found() if isinstance(found, type) else found
