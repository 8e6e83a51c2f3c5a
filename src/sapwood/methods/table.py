"""The methods by the names the papers give them: criterion, rounds, schedule and allocation."""

from __future__ import annotations

import dataclasses
from typing import Any

from sapwood.checks import check_fields, takes
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
from sapwood.imports import called, imported
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
    if not isinstance(method, str):
        return _named(method)
    if ":" in method:
        return method, _named(imported(method, "method"), method)[1]
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
        ConfigError: neither has such a field, or a value has the wrong type.
    """
    legal, criterion = settings(method), criterion_fields(method)
    for field in fields:
        if field not in legal:
            raise unknown_name(f"field of method {name!r}", field, legal)
    inner = {key: value for key, value in fields.items() if key in criterion}
    outer = {key: value for key, value in fields.items() if key not in criterion}
    if inner:
        check_fields(method.criterion, inner)  # type: ignore[attr-defined]
        outer["criterion"] = dataclasses.replace(method.criterion, **inner)  # type: ignore[attr-defined]
    if not outer:
        return method
    check_fields(method, outer)
    return dataclasses.replace(method, **outer)  # type: ignore[type-var]


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


def _named(found: Any, path: str = "method") -> tuple[str, Procedure]:
    """The name and the method that an object is: a method, a criterion, or a class of one, made with its defaults.

    Raises:
        ConfigError: it is none of these, or its class cannot be made so.
    """
    if isinstance(found, type):
        found = called(found, path, "method")
    if isinstance(found, Method):
        return type(found.criterion).__name__, found
    if isinstance(found, Procedure):
        return type(found).__name__, found
    if not callable(found) or not takes(found, "net", "masks", "data", "generator"):
        raise ConfigError(
            f"{path!r} is {type(found).__name__}; a criterion, which is called with (net, masks, data, generator), a "
            "sapwood.Method or another Procedure was expected."
        )
    return getattr(found, "__name__", type(found).__name__), Method(found)
