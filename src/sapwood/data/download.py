"""Where data lies, and how what is missing gets there."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pooch

from sapwood.errors import DataError


@dataclass(frozen=True)
class Remote:
    """A published file.

    Attributes:
        url: Where it is published.
        md5: Its published checksum.
    """

    url: str
    md5: str

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """What a loader may use; `load` has the same arguments.

    Attributes:
        root: The folder of all data sets, or the image folder itself.
        offline: Whether downloads are forbidden.
        resolution: Height and width that image files are brought to, in pixels; None keeps theirs.
        memory_limit: Bytes that one part of an image folder may take when decoded; a larger one stays on disk.
    """

    root: Path
    offline: bool
    resolution: int | None
    memory_limit: int


def data_root(root: str | Path | None) -> Path:
    """The folder of all data sets: the one given, else $SAPWOOD_DATA, else the user's cache."""
    return Path(root or os.environ.get("SAPWOOD_DATA") or pooch.os_cache("sapwood")).expanduser()


def fetch(remote: Remote, folder: Path, *, offline: bool) -> Path:
    """The file in this folder, downloaded first if it is not there with the published checksum.

    Raises:
        DataError: If it is not there and cannot, or (`offline`) may not, be downloaded.
    """
    target = folder / remote.filename
    if target.is_file() and pooch.file_hash(str(target), alg="md5") == remote.md5:
        return target
    if offline:
        raise DataError(
            f"{target} is not there (or not the published file) and offline=True forbids the download: "
            f"put the file from {remote.url} there, or load once without offline."
        )
    try:
        # pooch writes to a temporary file, checks it, and only then renames it
        pooch.retrieve(remote.url, known_hash=f"md5:{remote.md5}", fname=remote.filename, path=folder)
    except (OSError, ValueError) as error:  # no connection, a server's refusal, a full disk; a wrong checksum
        raise DataError(
            f"{remote.url} could not be downloaded to {target} ({error}): try again, or put the file there by hand."
        ) from error
    return target


def unpacked(remote: Remote, source: Source, name: str, members: tuple[str, ...]) -> Path:
    """The folder `name` under the root; if it is not there, `remote` is downloaded and unpacked.

    Args:
        remote: An archive that unpacks to one folder of this name.
        source: Says where, and whether a download is allowed.
        name: Of the folder.
        members: What must be in it.

    Raises:
        DataError: If the folder lacks a member, or cannot be had.
    """
    folder = source.root / name
    if folder.is_dir():
        missing = [member for member in members if not (folder / member).exists()]
        if missing:
            raise DataError(f"{folder} lacks {', '.join(missing)}: complete it, or delete it to have it made anew.")
        return folder
    try:
        archive = fetch(remote, source.root, offline=source.offline)
    except DataError as error:
        raise DataError(f"{folder} is not there. {error}") from error
    with tempfile.TemporaryDirectory(dir=source.root) as temporary:
        shutil.unpack_archive(archive, temporary, filter=None if archive.suffix == ".zip" else "data")
        if not folder.is_dir():  # else another process was faster
            os.replace(Path(temporary) / name, folder)  # by one rename, so that a folder which is there is complete
    return folder
