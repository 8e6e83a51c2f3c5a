"""What a run's result depends on besides its config: the data, the model, somebody's code, and the versions.

It is no part of a run's id, so that names stay as they are. It lies beside the run as identity.json, and is compared
wherever something that was computed before is about to be used: a finished run, masks, a checkpoint, a kernel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sapwood
from sapwood import files
from sapwood.data import Dataset, Images
from sapwood.data.download import data_root
from sapwood.errors import ConfigError, DataError, listed
from sapwood.experiments import sources, store
from sapwood.experiments.config import RunConfig
from sapwood.experiments.fairness import weights_hash
from sapwood.experiments.store import RunFolder
from sapwood.methods import find

LIBRARIES = ("torchvision", "timm")  # prefixes of models that come from them
TEXTS = {
    "data": "the images or labels of the data set",
    "method": "the settings of the method's object",
    "model": "the layers of the model",
    "weights": "the initial weights of the model",
}
"""What an identity has digests of, in words."""
SHOWN = 20  # runs in a sentence
CODE, VERSIONS = "code", "versions"
TABLES = (CODE, VERSIONS)  # by the names of modules and libraries

Identity = Mapping[str, Any]
"""JSON values: what `inputs` gives, and the digests of the model and the versions."""


def inputs(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """What comes from outside: digests of the data, and of the code behind `package.module:object`."""
    found: dict[str, Any] = {"data": data_digest(dataset), CODE: {}, "method": ""}
    if ":" in config.model and config.model.partition(":")[0] not in LIBRARIES:
        found[CODE] |= sources.seen(config.model).digests
    if ":" in config.method and config.masks is None:  # what a mask file names is not ours to import
        seen = sources.seen(config.method, lambda: find(config.method)[1])
        found[CODE] |= seen.digests
        found["method"] = seen.state
    return found


def of(config: RunConfig, dataset: Dataset, model: nn.Module) -> dict[str, Any]:
    """The identity of a run.

    Args:
        config: The run.
        dataset: Its data.
        model: Its model, at the initial weights.
    """
    return {**inputs(config, dataset), **of_model(config, model)}


def of_model(config: RunConfig, model: nn.Module) -> dict[str, Any]:
    """The part of an identity that the model makes: its structure, its initial weights, and what computes it."""
    return {"model": structure(model), "weights": weights_hash(model), VERSIONS: versions(config.model)}


def versions(model: str = "") -> dict[str, str]:
    """The versions of what computes, without what they were built for, and of the library that a model is from."""
    found = {"sapwood": sapwood.__version__, "torch": torch.__version__}
    if (library := model.partition(":")[0]) in LIBRARIES:
        found[library] = str(getattr(importlib.import_module(library), "__version__", "unknown"))
    return {name: version.partition("+")[0] for name, version in found.items()}


@functools.lru_cache(maxsize=2)
def data_digest(dataset: Dataset) -> str:
    """Of all images and labels, in their order.

    It costs a pass over the memory: 0.2 s for CIFAR-10. Images that stay on disk are read once, whole; the digest is
    then kept in the user's cache for as long as no file changes its size or times.
    """
    parts = [_images_digest(part) for part in (dataset.train, dataset.test)]
    return files.checksum([dataset.num_classes, *parts])


def structure(model: nn.Module) -> str:
    """Of the modules' names, types and plain attributes, such as a stride; and of the tensors' names and shapes."""
    modules = [
        [name, type(module).__module__, type(module).__qualname__, _plain_attributes(module)]
        for name, module in model.named_modules()
    ]
    tensors = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in model.state_dict().items()]
    return files.checksum([modules, tensors])


def read(folder: Path) -> Identity | None:
    """What a run's folder says that it depends on; None where it says nothing, or the file is damaged."""
    try:
        found = files.read_json(folder / store.IDENTITY, sealed=True)
    except (OSError, ValueError):
        return None
    whole = found.keys() == {*TEXTS, *TABLES} and all(isinstance(found[key], dict) for key in TABLES)
    return found if whole else None


def differences(before: Identity, now: Identity, *, of_versions: bool = True) -> list[str]:
    """What has changed, in words; empty where nothing has.

    Args:
        before: As it was.
        now: As it is.
        of_versions: Whether another version of Sapwood or torch counts.
    """
    changed = [words for key, words in TEXTS.items() if key in now and before.get(key) != now[key]]
    changed += [f"the source of {module}" for module in _unequal(before, now, CODE)]
    if of_versions and VERSIONS in now:
        names = _unequal(before, now, VERSIONS)
        changed += [f"{name} ({_version(before, name)}, now {_version(now, name)})" for name in names]
    return changed


def changes(folder: Path, now: Identity, *, finished: bool) -> list[str]:
    """What has changed since a folder was written, in words; nothing where it does not say what it depends on.

    A run that is not finished must not go on under other versions either: its epochs would be of both.
    """
    before = read(folder)
    return [] if before is None else differences(before, now, of_versions=not finished)


def require_unchanged(inputs: Identity | None, now: Identity) -> None:
    """Refuses a run of a comparison that would not be of the data and the code that the others are of.

    Raises:
        ConfigError: something has changed since the comparison began.
    """
    if inputs is not None and (changed := differences(now, inputs)):
        raise ConfigError(f"While the comparison was going on, {listed(changed)} changed: start it again.")


def require_finished(folder: Path, now: Identity) -> None:
    """Lets a finished run be used, if what it depends on is what it was; one of an older version does not say so.

    Raises:
        ConfigError: something has changed.
    """
    if changed := changes(folder, now, finished=True):
        raise ConfigError(refusal([folder], changed))


def claim(here: RunFolder, now: Identity) -> bool:
    """Writes down what a run depends on, before there is anything that does.

    Args:
        here: The run's folder, entered.
        now: What it depends on.

    Returns:
        Whether there is something to go on from, which depends on the same. Files whose record is damaged are removed,
        and what was written after the folder was removed.

    Raises:
        ConfigError: it depends on something else, or an older version left it that kept no record.
    """
    there = here.half_done()
    if there and here.begun and not (here.path / store.IDENTITY).exists():
        raise ConfigError(
            f"{here.path} holds a run that an older version began, which did not note the data and code that it "
            "depends on: delete it to begin again, or go on with that version."
        )
    if there and (changed := changes(here.path, now, finished=False)):
        raise ConfigError(refusal([here.path], changed))

    goes_on = bool(there) and read(here.path) is not None
    if not goes_on:
        for file in there:
            file.unlink()
        files.write_json(here.path / store.IDENTITY, now)
    return goes_on


def refusal(folders: Sequence[Path], changed: Iterable[str]) -> str:
    """One sentence: what has changed since these folders, of one comparison, were written, and what to do."""
    if len(folders) == 1:
        what, them = f"{folders[0]} holds a run", "it"
    else:
        names = ", ".join(folder.name for folder in folders[:SHOWN]) + (", ..." if len(folders) > SHOWN else "")
        what, them = f"{folders[0].parent} holds {len(folders)} runs ({names})", "them"
    return (
        f"{what} of something else: since then {listed(list(changed))} changed. Choose another folder (--out), or "
        f"delete {them} to run {them} again."
    )


def _unequal(before: Identity, now: Identity, key: str) -> list[str]:
    old, new = before.get(key) or {}, now.get(key) or {}
    return sorted(name for name in {**old, **new} if old.get(name) != new.get(name))


def _version(identity: Identity, name: str) -> str:
    return str((identity.get(VERSIONS) or {}).get(name, "unknown"))


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if name != "training" and not name.startswith("_") and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, str | int | float)


def _images_digest(images: Images) -> str:
    pixels = images.images
    content = pixels if isinstance(pixels, Tensor) else _content_of(pixels.files)
    return files.checksum([content, images.labels])


def _content_of(paths: Sequence[Path]) -> str:
    """The digest of files' contents, kept under a name that changes with any file."""
    try:
        kept = data_root(None) / "digests" / files.stamp(path.absolute() for path in paths)
    except OSError as error:
        raise DataError(f"{error}: restore the file, or remove it from the data set.") from error
    try:
        return files.read_json(kept, sealed=True)["content"]  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError):
        pass
    with ThreadPoolExecutor() as pool:
        content = files.checksum(list(pool.map(files.digest, paths)))
    with suppress(OSError):  # a cache that may not be written costs time, and nothing else
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(kept, {"content": content})
    return content
