"""The file format of masks: a safetensors file with one bit a weight, sealed by a checksum.

Layout, as safetensors has it: the length of the header (8 bytes, little-endian), the header in JSON, then the bits of
every mask, rows packed as by `numpy.packbits`. The header's `__metadata__` holds

- `format`, `version`,
- `shapes`: the shape of every mask by name, in the model's order, in JSON,
- `provenance`: how the masks came about, in JSON,
- `sha256`: of the whole file, lengths and names included, with 64 zeros in its own place.

The header is written here, because safetensors' own writer orders the metadata by chance: equal masks and provenance
give equal bytes. Version 1 is still read. Its checksum covers the contents without their lengths, and the first files
have none, so that damage to those may pass unnoticed where the structure stays sound.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sapwood.errors import MaskError, MaskFileError
from sapwood.text import one_line

FORMAT, VERSION = "sapwood-masks", "2"
FIELDS = ("format", "version", "shapes", "provenance")
METADATA, CHECKSUM = "__metadata__", "sha256"
UNSEALED = "0" * 64

LONGEST_HEADER = 100_000_000  # bytes, as in safetensors
LARGEST = 2**63 - 1  # elements of a tensor
MOST_DIMENSIONS = 64

KNOWN: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "fields": (dict,),
    "seed": (int,),
    "density": (int, float),
    "torch": (str,),
    "sapwood": (str,),
    "fingerprint": (str,),
    "seconds": (int, float),
    "peak_memory": (int, type(None)),
    "shuffled": (bool, str),
    "new_weights": (bool,),
}
"""What the program reads from a provenance, and of which type it is; all further entries are anybody's."""


class Damaged(Exception):
    """Why a file cannot be believed, as the end of a sentence."""


class Content(NamedTuple):
    """What a file says, its structure checked."""

    masks: dict[str, Tensor]
    provenance: dict[str, Any]


# Writing.


def encoded(masks: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> bytes:
    """The bytes of a mask file: a function of the masks and the provenance, in their orders.

    Raises:
        MaskError: a name that the format reserves, or a provenance that is not made of JSON values.
    """
    if METADATA in masks:
        raise MaskError(f"A mask cannot be called {METADATA!r}, which the file format reserves: rename the parameter.")
    try:
        written = json.dumps(dict(provenance))
        _check_provenance(json.loads(written))
    except (Damaged, TypeError, ValueError, RecursionError) as error:
        raise MaskError(f"The provenance of the masks cannot be written: {error}.") from error

    packed = {name: np.packbits(mask.detach().cpu().flatten().numpy()).tobytes() for name, mask in masks.items()}
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    metadata = dict(zip(FIELDS, (FORMAT, VERSION, shapes, written), strict=True))

    head = _head({**metadata, CHECKSUM: UNSEALED}, packed)
    body = b"".join(packed.values())
    seal = hashlib.sha256(head + body).hexdigest()
    return head.replace(_sealed(UNSEALED), _sealed(seal)) + body


def _head(metadata: Mapping[str, str], packed: Mapping[str, bytes]) -> bytes:
    """The header and its length, padded with spaces so that the data begin at a multiple of 8 bytes."""
    header: dict[str, Any] = {METADATA: metadata}
    begin = 0
    for name, bits in packed.items():
        end = begin + len(bits)
        header[name] = {"dtype": "U8", "shape": [len(bits)], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sealed(checksum: str) -> bytes:
    """The checksum as it stands in a header, where strings have their quotation marks escaped: it is there once."""
    return f'"{CHECKSUM}":"{checksum}"'.encode()


# Reading.


def read(path: Path) -> Content:
    """Reads a mask file; nothing in it is believed before it is checked.

    Raises:
        MaskFileError: the file is missing, damaged, no mask file, or of another format version.
    """
    try:
        with torch.inference_mode(False):  # autograd could not record masks made in that mode
            return _decoded(*_split(path))
    except Damaged as error:
        raise MaskFileError(f"{str(path)!r} is not a readable mask file: {one_line(error)}.") from error
    except FileNotFoundError as error:
        raise MaskFileError(f"There is no mask file {str(path)!r}.") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise MaskFileError(f"The mask file {str(path)!r} cannot be read ({one_line(error)}).") from error


def _split(path: Path) -> tuple[bytes, bytes, bytes]:
    """The length, the header and the rest of a file, of which no more is read than is believed."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Damaged("it is a folder, a pipe or a device, and no regular file")
    with path.open("rb") as file:
        length = file.read(8)
        claimed = int.from_bytes(length, "little")
        if len(length) < 8 or not 2 <= claimed <= min(LONGEST_HEADER, status.st_size - 8):
            raise Damaged("it is truncated, or not in safetensors format")
        header = file.read(claimed)
        _places(_parsed(header), status.st_size - 8 - claimed)  # before gigabytes of something else are read
        return length, header, file.read()


def _decoded(length: bytes, header: bytes, body: bytes) -> Content:
    entries = _parsed(header)
    metadata = entries[METADATA]
    bits = {name: body[place] for name, place in _places(entries, len(body)).items()}
    if metadata["version"] == VERSION:
        unsealed = header.replace(_sealed(metadata[CHECKSUM]), _sealed(UNSEALED))
        seal = hashlib.sha256(length + unsealed + body).hexdigest()
    else:
        seal = _first_checksum(metadata, bits)
    if metadata.get(CHECKSUM, seal) != seal:
        raise Damaged("it is damaged, as its content contradicts its checksum")

    shapes = _loaded(metadata["shapes"], "its shapes")
    provenance = _loaded(metadata["provenance"], "its provenance")
    _check_provenance(provenance)
    if shapes.keys() != bits.keys():
        raise Damaged("it is damaged, as its masks and their shapes have different names")
    return Content({name: _unpacked(bits[name], shape, name) for name, shape in shapes.items()}, provenance)


def _parsed(header: bytes) -> dict[str, Any]:
    """The header of a mask file of a version that is known."""
    entries = _loaded(header, "its header")
    metadata = entries.get(METADATA)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise Damaged("it is a safetensors file of something else, or truncated")
    version = metadata.get("version")
    if version not in ("1", VERSION):
        raise Damaged(f"its format version is {version!r}, and this Sapwood knows 1 and {VERSION}: get a newer one")

    expected = {*FIELDS, CHECKSUM}
    if version == "1" and CHECKSUM not in metadata:
        expected = {*FIELDS}
    if metadata.keys() != expected or not all(isinstance(value, str) for value in metadata.values()):
        raise Damaged("it is damaged, as its metadata are not those of a mask file")
    return entries


def _loaded(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is damaged, as {what} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise Damaged(f"it is damaged, as {what} is no mapping")
    return value


def _places(entries: Mapping[str, Any], size: int) -> dict[str, slice]:
    """Where the bits of every mask are in the `size` bytes after the header, which they must fill, end to end."""
    ends = {name: _ends(name, entry) for name, entry in entries.items() if name != METADATA}
    places, position = {}, 0
    for name, (begin, end) in sorted(ends.items(), key=lambda item: item[1]):
        if begin != position:
            raise Damaged(f"it is damaged, as the mask {name!r} does not lie where the one before it ends")
        position = end
        places[name] = slice(begin, end)
    if position != size:
        raise Damaged("it is truncated, or has something after its masks")
    return places


def _ends(name: str, entry: Any) -> tuple[int, int]:
    """Where a mask begins and ends, as the header says."""
    if not isinstance(entry, dict) or entry.get("dtype") != "U8":
        raise Damaged(f"it is damaged, as the entry {name!r} is no mask")
    place = entry.get("data_offsets")
    if not isinstance(place, list) or not _sizes(place) or len(place) != 2 or place[0] > place[1]:
        raise Damaged(f"it is damaged, as the mask {name!r} lies at {str(place)[:80]}")
    if entry.get("shape") != [place[1] - place[0]]:
        raise Damaged(f"it is damaged, as the mask {name!r} has another length than it says")
    return place[0], place[1]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= LARGEST for size in value)


def _unpacked(bits: bytes, shape: Any, name: str) -> Tensor:
    if not _sizes(shape) or len(shape) > MOST_DIMENSIONS or math.prod(size or 1 for size in shape) > LARGEST:
        raise Damaged(f"it is damaged, as the mask {name!r} has the shape {str(shape)[:80]}")
    size = math.prod(shape)
    if len(bits) != (size + 7) // 8:
        raise Damaged(f"it is damaged, as the mask {name!r} does not fill its shape {shape}")
    flat = np.unpackbits(np.frombuffer(bits, np.uint8))
    if flat[size:].any():
        raise Damaged(f"it is damaged, as the mask {name!r} has bits beyond its shape {shape}")
    return torch.from_numpy(flat[:size].astype(bool)).reshape(shape)


def _check_provenance(provenance: Mapping[str, Any]) -> None:
    for key, legal in KNOWN.items():
        value = provenance.get(key, legal[0]())
        whole = type(value) in legal and not (isinstance(value, float) and not math.isfinite(value))
        if not whole:
            names = " or ".join(kind.__name__ for kind in legal)
            raise Damaged(f"{key!r} in its provenance is {str(value)[:80]!r}, where a finite {names} was expected")
        if key == "seconds" and value < 0:
            raise Damaged(f"{key!r} in its provenance is negative")


def _first_checksum(metadata: Mapping[str, str], bits: Mapping[str, bytes]) -> str:
    """That of version 1."""
    digest = hashlib.sha256()
    for key in ("shapes", "provenance"):
        digest.update(metadata[key].encode())
    for name in sorted(bits):
        digest.update(name.encode())
        digest.update(bits[name])
    return digest.hexdigest()
