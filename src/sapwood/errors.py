"""Every error that Sapwood raises on purpose: one hierarchy, so that one `except SapwoodError` catches them all."""

from __future__ import annotations

import difflib
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


class SapwoodError(Exception):
    """Base of all errors below; its message says what was expected, what came, and what to do."""


class UnsupportedModelError(SapwoodError):
    """The model (or one of its layers) cannot be pruned by this method."""


class ZerosLostError(UnsupportedModelError):
    """Zeros of a parameter are no zeros of the weight that its layer applies."""


class ForwardError(UnsupportedModelError):
    """The model's forward failed on an input."""


class BudgetError(SapwoodError, ValueError):
    """A density, sparsity, compression or per-layer floor that cannot be met."""


class ScoreError(SapwoodError):
    """A criterion gave NaN or infinite scores, or scores of the wrong shape."""


class MaskError(SapwoodError):
    """Masks that do not fit the model, or that the model's weights no longer obey."""


class MaskFileError(MaskError):
    """A mask file that is missing, truncated, not a mask file, or of another format version."""


class DataError(SapwoodError):
    """Data that is missing, damaged, empty, or lacks what a method needs."""


class ConfigError(SapwoodError, ValueError):
    """A name or setting that does not exist or has an illegal value."""


class RunBusyError(SapwoodError):
    """Another process is at this run."""


def unknown_name(kind: str, name: str, legal: Iterable[str]) -> ConfigError:
    """Builds the error for a wrong name: the nearest legal one first, then all of them."""
    choices = sorted(legal)
    near = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"Unknown {kind} {name!r}.{hint} Legal: {', '.join(choices)}.")


class SapwoodWarning(UserWarning):
    """Something that a user should look at, though the result stands (a collapsed layer, a zero-initialised branch)."""


OTHERS = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), str(Path(__file__).parent))
"""Where code lies that a user of the command did not write: Python's, installed packages', and ours."""


def for_the_user(show: Callable[..., None]) -> Callable[..., None]:
    """Makes of a `warnings.showwarning` one that leaves out what the user of the command cannot act on.

    Shown are our warnings, and those about a line of the user's own files; what packages say of each other is not.
    """

    def shown(message: Warning | str, category: type[Warning], filename: str, *args: Any, **kwargs: Any) -> None:
        if issubclass(category, SapwoodWarning) or not filename.startswith(OTHERS):
            show(message, category, filename, *args, **kwargs)

    return shown


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
