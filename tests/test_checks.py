"""Settings are checked by their annotations, a user's code is imported in one place, the version stands in one."""

import dataclasses
import importlib.metadata
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
import torch

import sapwood
from nets import mlp
from sapwood import ConfigError, models
from sapwood.checks import Count, Known, OneOf, Range, check, check_arguments
from sapwood.experiments import trackers
from sapwood.experiments.config import RunConfig
from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.environment import device_of
from sapwood.experiments.recipes import load
from sapwood.imports import imported
from sapwood.training import TrainConfig

NAN, INF = math.nan, math.inf


# Values.


@dataclass(frozen=True)
class Inner:
    count: Count = 1


class Typed(TypedDict):
    x: int


@dataclass(frozen=True)
class Outer:
    whole: int = 0
    share: Annotated[float, Range(0, 1, open_high=True)] = 0.5
    names: tuple[Annotated[str, OneOf("colour", ("red", "green"))], ...] = ()
    maybe: Count | None = None
    either: int | str = 1
    yes: bool = False
    norm: float = INF
    inner: Inner = Inner()
    anything: Any = None
    place: Path = Path()
    pair: tuple[int, str] = (1, "x")
    typed: Typed | None = None
    even: Annotated[int, Known(lambda n: math.sqrt(n))] = 4


@pytest.mark.parametrize(
    "legal",
    [
        {"whole": -5},
        {"share": 0},
        {"names": ("red", "red")},
        {"names": ["green"]},
        {"maybe": 3},
        {"maybe": None},
        {"either": "x"},
        {"norm": 2.0},
        {"norm": INF},
        {"inner": Inner(2)},
        {"anything": object()},
        {"place": "text"},
        {"pair": [2, "y"]},
        {"typed": {"x": 3}},
    ],
)
def test_what_is_legal_passes(legal: dict) -> None:
    check(dataclasses.replace(Outer(), **legal))


@pytest.mark.trap(84)
@pytest.mark.parametrize(
    ("illegal", "said"),
    [
        ({"whole": True}, "whole takes a value of type int; True came"),
        ({"whole": 2.0}, "whole takes a value of type int"),
        ({"whole": 2**63}, "whole must be at most"),
        ({"whole": 10**5000}, "whole must be at most .* some 5,000 digits"),
        ({"share": 1.0}, r"share must be in \[0, 1\), got 1\.0"),
        ({"share": NAN}, "share must be a finite number"),
        ({"share": -INF}, "share must be a finite number"),
        ({"share": 10**400}, "share must be a finite number"),
        ({"share": "0.5"}, "share takes a value of type float"),
        ({"names": ("red", "gren")}, "Unknown colour 'gren'. Did you mean 'green'"),
        ({"names": "red"}, "names takes a sequence"),
        ({"names": (3,)}, "names takes a value of type str"),
        ({"maybe": 0}, "maybe must be at least 1, got 0"),
        ({"maybe": False}, "maybe takes a value of type int"),
        ({"either": 1.5}, "either takes one of int, str; 1.5 came"),
        ({"yes": 1}, "yes takes a value of type bool"),
        ({"norm": NAN}, "norm must be a finite number"),
        ({"inner": Inner(0)}, "count must be at least 1, got 0"),
        ({"inner": 3}, "inner takes a Inner; 3 came"),
        ({"place": "a\0b"}, "place holds characters"),
        ({"place": Path("\ud800")}, "place holds characters"),
    ],
)
def test_what_is_not_legal_is_named(illegal: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(dataclasses.replace(Outer(), **illegal))


def test_arguments_of_a_function() -> None:
    def function(model: torch.nn.Module, count: Count = 1, seed: int = 0) -> None:
        check_arguments(function, locals())

    function.__annotations__ = {"model": torch.nn.Module, "count": Count, "seed": int}
    function(mlp(2, 2), 3)
    for wrong in ({"model": 3}, {"count": 0}, {"seed": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            function(**{"model": mlp(2, 2), **wrong})


@pytest.mark.trap(84)
@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *((TrainConfig, {name: value}) for name in ("lr", "gamma", "momentum", "weight_decay") for value in (INF, NAN)),
        (TrainConfig, {"momentum": 2.0}),
        (TrainConfig, {"epochs": 1.5}),
        (TrainConfig, {"epochs": 10**30}),
        (TrainConfig, {"milestones": (1.5,)}),
        (TrainConfig, {"nesterov": "yes"}),
        (TrainConfig, {"seed": 2**32}),
        (lambda **more: RunConfig("digits", "mlp", **more), {"per_class": -1}),
        (lambda **more: RunConfig("digits", "mlp", **more), {"min_per_layer": -5}),
        (lambda **more: RunConfig("digits", "mlp", **more), {"density": NAN}),
        (lambda **more: RunConfig("digits", "mlp", **more), {"seed": -1}),
        (lambda **more: RunConfig("digits", "mlp", **more), {"resolution": 10**20}),
    ],
)
def test_settings_that_cannot_have_been_meant(kind: Any, wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        kind(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": "x"},
        {"rounds": True},
        {"rounds": 2.5},
        {"epsilon": NAN},
        {"epsilon": INF},
        {"epsilon": "a"},
        {"resamples": 1.0},
        {"schedule": 3},
        {"seed": -1},
        {"seed": 2**70},
        {"seed": 1.5},
        {"density": "x"},
        {"min_per_layer": 2.5},
        {"zero_init": "x"},
        {"allocation": 3},
        {"allocation": {"0.weight": NAN, "2.weight": 1}},
        {"allocation": {"0.weight": -1, "2.weight": 1}},
        {"exclude": 3},
        {"within": 3},
        {"batches": 3},
        {"loss": 3},
        {"on_round": 3},
        {"diagnosed": "x"},
        {"model": 3},
        {"method": 3},
        {"method": lambda: {}},
    ],
)
def test_prune_names_the_argument_that_is_wrong(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        sapwood.prune(**{"model": mlp(4, 6, 3), "density": 0.5, "input_shape": (4,), **wrong})


@pytest.mark.parametrize("name", ["meta", "cpu:x", "", "gpu", "cuda:-1"])
def test_devices_that_hold_no_values(name: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        device_of(name)


def test_engines_within_reason() -> None:
    for wrong in ({"cpus_per_run": 10**6}, {"retries": 1.5}, {"workers": True}):
        with pytest.raises(ConfigError):
            check(EngineConfig(**wrong))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", {"num_classes": -1}),
        ("mlp", {"in_channels": 0}),
        ("mlp", {"image_size": -5}),
        ("mlp", {"num_classes": 2**50}),
        ("mlp", {"widths": ("x",)}),
        ("wrn-16-99999999999", {}),
        ("wrn-99999999994-1", {}),
        ("os:system", {}),
        ("builtins:dict", {}),
        ("math:pi", {}),
    ],
)
def test_models_that_cannot_be_built(name: str, settings: dict) -> None:
    with pytest.raises(ConfigError):
        models.create(name, **settings)


# A user's code.

MODULES = {
    "broken_syntax": "def (:\n",
    "broken_at_import": "\n\nraise RuntimeError('no\\nluck')\n",
    "broken_by_exit": "import sys\nsys.exit(0)\n",
    "broken_import": "import nowhere_at_all\n",
    "broken_attribute": "import os\nos.nothing_of_that_name\n",
    "broken_key": "{}['x']\n",
    "broken_division": "1 / 0\n",
    "broken_call": "def made(*_, **__):\n    raise OSError('disk')\nclass Made:\n    def __init__(self, needed): ...\n",
}
USERS = {
    "method": lambda path: sapwood.prune(mlp(2, 2), method=path, density=0.5),
    "model": models.create,
    "model's name": models.check_name,
    "tracker": trackers.find,
    "recipe": load,
}


@pytest.fixture
def users_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.trap(84)
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("broken_syntax:x", r"SyntaxError: .*broken_syntax\.py, line 1"),
        ("broken_at_import:x", r"RuntimeError: no luck \(.*broken_at_import\.py, line 3\)"),
        ("broken_by_exit:x", "SystemExit: 0"),
        ("broken_import:x", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("broken_attribute:x", "AttributeError: .*nothing_of_that_name"),
        ("broken_key:x", "KeyError: 'x'"),
        ("broken_division:x", "ZeroDivisionError: division by zero"),
        ("nowhere_at_all:x", "ModuleNotFoundError: .* on the Python path"),
        ("math:nothing", "There is no 'nothing' in 'math'"),
        ("math:pi.nothing", "There is no 'pi.nothing' in 'math'"),
        ("..x:y", "is no import path"),
        (".x:y", "is no import path"),
        (":", "is no import path"),
        ("x:", "is no import path"),
        ("a b:c", "is no import path"),
        ("x:y:z", "is no import path"),
        ("x\0:y", "is no import path|holds characters"),
        ("math:pi", "."),
        ("builtins:len", "."),
    ],
)
def test_a_users_module_fails_in_one_sentence(users_modules: Path, user: str, path: str, said: str) -> None:
    if path == "builtins:len" and user == "model's name":
        return  # callable, and more is not known before it is called
    with pytest.raises(ConfigError, match=said) as caught:
        USERS[user](path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("user", "path"),
    [("model", "broken_call:made"), ("recipe", "broken_call:made"), ("method", "broken_call:Made")],
)
def test_a_users_function_fails_in_one_sentence(users_modules: Path, user: str, path: str) -> None:
    with pytest.raises(ConfigError, match=r"could not be made: (OSError: disk|TypeError: .*needed)"):
        USERS[user](path)


def test_what_is_there_is_imported(users_modules: Path) -> None:
    assert imported("os:path.join", "thing") is __import__("os").path.join
    file = users_modules / "broken_call.py"
    assert imported(f"{file}:made", "recipe", files=True).__name__ == "made"
    with pytest.raises(ConfigError, match="no import path"):
        imported(f"{file}:made", "model")
    with pytest.raises(ConfigError, match=r"SyntaxError: .*line 1"):
        imported(f"{users_modules / 'broken_syntax.py'}:x", "recipe", files=True)


# The version.


def test_the_version_stands_in_one_place_and_needs_no_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    masks = sapwood.prune(mlp(4, 6, 3), method="random", density=0.5).masks
    assert masks.provenance["sapwood"] == sapwood.__version__

    root = Path(sapwood.__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    from setuptools.config.expand import read_attr

    attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert read_attr(attribute, {"": "src"}, root) == sapwood.__version__
    literal = re.compile(rf"[\"']{re.escape(sapwood.__version__)}[\"']")
    places = [path for path in [root / "pyproject.toml", *root.glob("src/**/*.py")] if literal.search(path.read_text())]
    assert [path.name for path in places] == ["version.py"]
