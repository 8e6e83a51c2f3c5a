"""A user's own code by name: `imported("package.module:object")`."""

from __future__ import annotations

import functools
import importlib
import runpy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sapwood.errors import ConfigError, SapwoodError
from sapwood.text import one_line


def imported(path: str, kind: str, *, files: bool = False) -> Any:
    """What stands at an import path.

    Args:
        path: `package.module:object`, or `package.module:object.attribute`.
        kind: What it should be, for sentences: "method", "model".
        files: Whether the module may also be a file, as in `path/to/file.py:object`.

    Raises:
        ConfigError: the path is none, the module raised an error of its own, or there is no such object in it.
    """
    where, _, name = path.rpartition(":")
    is_file = files and Path(where).suffix == ".py"
    whole = is_file or _is_dotted(where)
    if not whole or not _is_dotted(name):
        also = " or path/to/file.py:object" if files else ""
        raise ConfigError(f"The {kind} {path!r} is no import path: package.module:object{also} was expected.")

    try:
        first, *rest = name.split(".")
        found = runpy.run_path(where)[first] if is_file else getattr(importlib.import_module(where), first)
        return functools.reduce(getattr, rest, found)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may raise anything while it is imported, SystemExit included
        if isinstance(error, AttributeError | KeyError) and not _is_of_user(error):
            says = f"There is no {name!r} in {where!r}, so the {kind} {path!r} cannot be imported"
            raise ConfigError(f"{says} ({one_line(error)}).") from error
        hint = " Its folder must be on the Python path." if isinstance(error, ModuleNotFoundError) else ""
        says = f"There is no {kind} at {path!r}, as {where!r} cannot be read"
        raise ConfigError(f"{failed(says, error)}{hint}") from error


def called(function: Callable[..., Any], path: str, kind: str, /, **arguments: Any) -> Any:
    """Calls what was imported; an error of the user's own code becomes one sentence.

    Raises:
        ConfigError: it raised one.
    """
    try:
        return function(**arguments)
    except (SapwoodError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise failed(f"The {kind} {path!r} could not be made", error) from error


def failed(what: str, error: BaseException) -> ConfigError:
    """The one sentence for an error of somebody else's code, with the place where it was raised."""
    says = one_line(error) or "without a word"
    return ConfigError(f"{what}: {type(error).__name__}: {says}{_place(error)}.")


def _place(error: BaseException) -> str:
    if not _is_of_user(error) or isinstance(error, SyntaxError):  # whose words name the line
        return ""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({frame.filename}, line {frame.lineno})"


def _is_of_user(error: BaseException) -> bool:
    """Whether it was raised inside of the imported code, and not by looking for that."""
    machinery = (__file__, importlib.__file__, runpy.__file__, functools.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and not frames[-1].filename.startswith(("<frozen", *map(str, machinery)))


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))
