"""Files as Sapwood writes them: in one step, with checksums; and the checksum of values that hold tensors."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "sha256"  # of a JSON object's own checksum
REMNANTS = ".*.tmp"  # what a killed process may leave of a file that it was writing
FORGOTTEN = 3600  # seconds after which such a remnant is nobody's: no write takes an hour
LONGEST = 40  # characters of a name that a remnant shows: names have a limit


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """Gives a new empty file beside `path`; it takes `path`'s place once the block has ended well and it is on disk.

    Whatever happens (an error, a kill, a power failure), `path` is the old file or the whole new one. The new file gets
    the permissions that the process gives to any file.

    Args:
        path: The file to write; an existing one is replaced.

    Raises:
        OSError: what the file system refuses, with the name of `path`, or it is a device or a pipe.
    """
    try:
        _refuse_special(path)
        _clear(path)
        temporary = _created_beside(path)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch hides a full disk
        if isinstance(cause, OSError) and cause.errno is not None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def write_in_one_step(path: Path, content: bytes) -> None:
    """Replaces a file, as `in_one_step` says."""
    with in_one_step(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file (UTF-8) in one step; what UTF-8 lacks, as in some names of files, is escaped."""
    write_in_one_step(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object in one step, with a checksum of its own under the key `sha256`."""
    sealed = {**value, KEY: _json_checksum(value)}
    write_text(path, json.dumps(sealed, indent=2) + "\n")


def read_json(path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Args:
        path: The file.
        sealed: Whether a checksum is demanded; else an object without one, of an older version, passes as it is.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or no JSON object.
    """
    found = _parsed(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("a JSON object is expected")

    value = {key: inner for key, inner in found.items() if key != KEY}
    if found.get(KEY, None if sealed else _json_checksum(value)) != _json_checksum(value):
        raise ValueError("the values contradict their checksum")
    return value


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, in one step."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads what `write_rows` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    rows = [_parsed(line) for line in path.read_bytes().splitlines()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a JSON object a line is expected")
    return rows


def digest(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(paths: Iterable[Path]) -> str:
    """Changes with any of these files, without reading them: of their names, sizes, times and places on the disk.

    Raises:
        OSError: a file is not there.
    """
    found = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        facts = (os.fsencode(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        found.update(repr(facts).encode())
    return found.hexdigest()


def remove_remnants(folder: Path) -> None:
    """Removes what killed writes left in a folder; only for who knows that nobody writes there."""
    for remnant in folder.glob(REMNANTS):
        remnant.unlink(missing_ok=True)


def checksum(value: object) -> str:
    """The SHA-256 of nested plain values and tensors (dtype, shape, bytes), wherever these are kept."""
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()


def _parts(value: object) -> Iterator[bytes | memoryview]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"{key!r}:".encode()
            yield from _parts(inner)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} of".encode()
        for inner in value:
            yield from _parts(inner)
    else:
        yield repr(value).encode()


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except RecursionError:
        raise ValueError("the values are nested without end") from None


def _json_checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _refuse_special(path: Path) -> None:
    """A device must not be replaced by a file, be it by root."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "A device or a pipe cannot be replaced; name an ordinary file", str(path))


def _clear(path: Path) -> None:
    """Removes what killed writes of the same file left long ago."""
    for remnant in path.parent.glob(f".{glob.escape(path.name[:LONGEST])}.*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - remnant.stat().st_mtime > FORGOTTEN:
                remnant.unlink()


def _created_beside(path: Path) -> Path:
    """A new file under a name that nobody can foresee; the umask is the kernel's business."""
    temporary = path.with_name(f".{path.name[:LONGEST]}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
