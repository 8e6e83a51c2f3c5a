"""The user's code behind `package.module:object`: which files it is made of, and what they say."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import numpy as np
import torch

from sapwood.files import checksum

LIBRARIES = {"site-packages", "dist-packages"}
OURS = "sapwood"  # which is told by its version


@dataclass(frozen=True)
class Seen:
    """An object's code as it was when this process first asked for it.

    A file that is edited later says nothing about what this process has imported, and an object that was used may have
    counted its calls.

    Attributes:
        digests: SHA-256 of the source of every module that the object is made of, by the modules' names.
        state: The checksum of what the object holds, see `state`; "" where it was not asked for.
        specs: Where those of the modules came from that were imported by then.
    """

    digests: Mapping[str, str]
    state: str
    specs: Mapping[str, ModuleSpec | None]

    def still_true(self) -> bool:
        """Whether none of the modules was imported anew."""
        return all(name in sys.modules and _spec_of(name) is spec for name, spec in self.specs.items())


_SEEN: dict[str, Seen] = {}


def seen(path: str, load: Callable[[], object] | None = None) -> Seen:
    """What an object is made of: its module, the packages around it, and all that they import, directly or not.

    An import counts wherever its statement stands. Left out are the standard library, what is installed in
    site-packages (unless it is the object's own top-level package) and Sapwood. Not seen are modules that are imported
    under computed names, and data files that the code reads.

    Args:
        path: `package.module:object`, which can be imported.
        load: Gives the object, for its state.
    """
    root = path.partition(":")[0]
    importlib.import_module(root)
    if path not in _SEEN or not _SEEN[path].still_true():
        digests = dict(_closure(root))
        held = "" if load is None else checksum(state(load()))
        _SEEN[path] = Seen(digests, held, {name: _spec_of(name) for name in (root, *digests) if name in sys.modules})
    return _SEEN[path]


def _closure(root: str) -> Iterator[tuple[str, str]]:
    top, waiting, seen = root.partition(".")[0], [root], set()
    while waiting:
        name = waiting.pop()
        if name in seen or not _is_users(name.partition(".")[0], top):
            continue
        seen.add(name)
        source = _source(name)
        if source is not None:
            yield name, hashlib.sha256(source).hexdigest()
            waiting += _mentioned(name, source)


def _mentioned(name: str, source: bytes) -> Iterator[str]:
    """The modules that a module's import statements may mean, and the packages that the module is in."""
    yield from _parents(name)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a compiled module
        return

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from (alias.name, *_parents(alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(name, node)
            yield from (base, *_parents(base))
            yield from (f"{base}.{alias.name}" for alias in node.names)  # some of which are modules


def _absolute(name: str, node: ast.ImportFrom) -> str:
    """The module that `from ... import` names, seen from a module."""
    if not node.level:
        return node.module or ""
    spec = _spec_of(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    package = name.split(".")[: -node.level + is_package or None]
    return ".".join([*package, *([node.module] if node.module else [])])


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _spec_of(name: str) -> ModuleSpec | None:
    """Where a module comes from, without importing anything; None where there is no such module."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    package = name.rpartition(".")[0]
    if not package:
        try:
            return importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return None

    above = _spec_of(package)
    if above is None or above.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(name, above.submodule_search_locations)


def _source(name: str) -> bytes | None:
    """What a module's file holds; None where there is no such module, or it has no file."""
    spec = _spec_of(name)
    file = getattr(sys.modules.get(name), "__file__", None) if spec is None else spec.origin
    if file is None or file in ("built-in", "frozen"):
        return None
    try:
        read = getattr(spec and spec.loader, "get_data", None)  # which also reads from zip files
        content: bytes = Path(file).read_bytes() if read is None else read(file)
        return content
    except OSError:
        return None


@functools.cache
def _is_users(package: str, own: str) -> bool:
    """Whether a top-level package is somebody's own code, rather than a library's."""
    if package in (OURS, "") or package in sys.builtin_module_names:
        return False
    if package == own:
        return True

    spec = _spec_of(package)
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    files = [Path(place) for place in places if place not in (None, "built-in", "frozen", "namespace")]
    return bool(files) and not any(_is_library(file) for file in files)


def _is_library(file: Path) -> bool:
    standard = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    return bool(LIBRARIES & set(file.parts)) or any(file.is_relative_to(folder) for folder in standard)


def state(thing: object, depth: int = 8) -> object:
    """What an object holds, as plain values and tensors: its fields, those of what it holds, what functions close over.

    Of what is neither, only the type's name is told.

    Args:
        thing: Any object.
        depth: How far to look into objects in objects.
    """
    if thing is None or isinstance(thing, str | bytes | int | float | complex | torch.Tensor):
        return thing
    if isinstance(thing, np.ndarray | np.generic):
        return torch.from_numpy(np.array(thing)) if thing.dtype.kind in "biuf" else repr(thing)
    if depth == 0 or isinstance(thing, types.ModuleType):
        return _name(thing)

    inside = functools.partial(state, depth=depth - 1)
    if isinstance(thing, list | tuple):
        return [inside(each) for each in thing]
    if isinstance(thing, set | frozenset):
        return sorted(str(inside(each)) for each in thing)
    if isinstance(thing, Mapping):
        return {str(key): inside(value) for key, value in thing.items()}
    return [_name(thing), inside(_parts(thing))]


def _parts(thing: object) -> list[object]:
    if isinstance(thing, type):
        return []
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, types.MethodType):
        return [thing.__func__, thing.__self__]
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
        return [cells, thing.__defaults__, thing.__kwdefaults__]
    slots = {name: getattr(thing, name) for name in getattr(thing, "__slots__", ()) if hasattr(thing, name)}
    return [{**getattr(thing, "__dict__", {}), **slots}]


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _name(thing: object) -> str:
    if isinstance(thing, types.ModuleType):
        return thing.__name__
    named = thing if hasattr(thing, "__qualname__") else type(thing)  # which classes and functions of any kind have
    return f"{named.__module__}.{named.__qualname__}"
