"""Checksums: a file of a run whose bytes changed since they were written is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "sha256"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with a checksum of their own, under the key `sha256`."""
    return {**values, KEY: _checksum(values)}


def unsealed(found: object) -> dict[str, Any]:
    """What `sealed` was given. Values without a checksum, of an older version, pass as they are.

    Raises:
        ValueError: this is no mapping, or its values are not those that the checksum was made of.
    """
    if not isinstance(found, dict):
        raise ValueError("a JSON object is expected")
    values = {key: value for key, value in found.items() if key != KEY}
    if found.get(KEY, _checksum(values)) != _checksum(values):
        raise ValueError("the values contradict their checksum")
    return values


def digests(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The SHA-256 of each of these files that is there."""
    return {name: digest(folder / name) for name in names if (folder / name).exists()}


def digest(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, KEY).hexdigest()


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
