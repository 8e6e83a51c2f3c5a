"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_in_one_step(path: Path, content: bytes) -> None:
    """Replaces a file in one step: a killed or full-disk write leaves the old one as it was.

    The bytes are on the disk before the name is theirs. Permissions are those that the umask gives to any new file.
    A killed process leaves a hidden file `.NAME.*.tmp` beside `path`.

    Raises:
        OSError: the folder is not there or may not be written to, or the disk is full; nothing is left behind.
    """
    half_written = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    # "x" follows no link that somebody put there, and `open` applies the umask without having to read it
    file = open(half_written, "xb")
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half_written, path)
    except BaseException:
        with contextlib.suppress(OSError):
            half_written.unlink()
        raise
