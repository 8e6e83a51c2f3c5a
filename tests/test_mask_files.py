"""Mask files: what is written is what is read, to the byte, and nothing else is believed."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sapwood import MaskError, MaskFileError, Masks
from sapwood.files import write_in_one_step

ROOT = Path(__file__).parent.parent


def example() -> Masks:
    """Two layers, one of which ends within a byte."""
    rng = torch.Generator().manual_seed(1)
    tensors = {"a.weight": torch.rand(3, 5, generator=rng) < 0.5, "b.weight": torch.rand(16, generator=rng) < 0.5}
    return Masks(tensors, {"method": "snip", "fields": {"rounds": 1}, "seed": 3, "seconds": 0.5})


def header_of(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def forged(header: object, body: bytes) -> bytes:
    """A file of version 2 with this header, and a checksum that is right: see `sapwood.mask_files`."""
    if isinstance(header, dict):
        header["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head + body).hexdigest()
    return head.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest.encode()) + body


def refused(path: Path, content: bytes, match: str = ".") -> None:
    path.write_bytes(content)
    with pytest.raises(MaskFileError, match=match) as caught:
        Masks.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.trap(83)
def test_equal_masks_are_equal_files_in_every_process(tmp_path):
    script = (
        "import torch; from sapwood import Masks; import sys\n"
        "torch.manual_seed(0)\n"
        "m = Masks({f'l{i}.weight': torch.rand(7, 9) < 0.5 for i in range(9)}, {'method': 'x', 'b': 1, 'a': [2.5]})\n"
        "m.save(sys.argv[1]); Masks.load(sys.argv[1]).save(sys.argv[2])"
    )
    for i in range(2):
        names = [str(tmp_path / f"{i}"), str(tmp_path / f"again{i}")]
        subprocess.run([sys.executable, "-c", script, *names], check=True)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_others_can_read_it(tmp_path):
    """By safetensors itself: one bit a weight, most significant bit first."""
    from safetensors import safe_open

    masks = example()
    masks.save(tmp_path / "m")
    with safe_open(tmp_path / "m", framework="np") as file:
        assert file.metadata()["format"] == "sapwood-masks"
        bits = file.get_tensor("a.weight").tolist()
    text = "".join(f"{byte:08b}" for byte in bits)
    assert text == "".join(str(int(kept)) for kept in masks["a.weight"].flatten()) + "0"


@pytest.mark.trap(83)
def test_every_flipped_bit_is_noticed(tmp_path):
    masks = Masks({"a": torch.tensor([True, False, True])}, {"seed": 1})
    path = tmp_path / "m"
    masks.save(path)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(MaskFileError):
            Masks.load(path)


@pytest.mark.trap(83)
def test_the_checksum_is_asked_for(tmp_path):
    path = tmp_path / "m"
    example().save(path)
    header, body = header_of(path.read_bytes())
    assert Masks.load(path) == example()
    del header["__metadata__"]["sha256"]
    text = json.dumps(header).encode()
    refused(path, len(text).to_bytes(8, "little") + text + body, "metadata")


@pytest.mark.parametrize("sealed", [True, False])
def test_files_of_version_1_are_read_and_their_damage_is_noticed(tmp_path, sealed):
    """Those committed, with and without a checksum; a mask and its provenance survive the step to version 2."""
    for old in sorted(ROOT.glob("results/**/masks.safetensors")):
        header, _ = header_of(old.read_bytes())
        if ("sha256" in header["__metadata__"]) == sealed:
            break
    assert header["__metadata__"]["version"] == "1"
    masks, new = Masks.load(old), tmp_path / "m"
    masks.save(new)
    assert Masks.load(new) == masks and Masks.load(new).provenance == masks.provenance
    content = old.read_bytes()
    if sealed:
        refused(new, content[:-1] + bytes([content[-1] ^ 1]), "checksum")
    refused(new, content.replace(b'"provenance"', b'"provenancf"'))
    refused(new, content[:-1], "truncated")


STRUCTURES = {
    "no shapes": lambda m, e: m.pop("shapes"),
    "no provenance": lambda m, e: m.pop("provenance"),
    "one more": lambda m, e: m.update(more="x"),
    "shapes no JSON": lambda m, e: m.update(shapes="{"),
    "shapes a list": lambda m, e: m.update(shapes="[]"),
    "shapes nested": lambda m, e: m.update(shapes="[" * 100_000),
    "a shape null": lambda m, e: m.update(shapes='{"a.weight": null, "b.weight": [16]}'),
    "a shape of words": lambda m, e: m.update(shapes='{"a.weight": ["3", "5"], "b.weight": [16]}'),
    "a shape of bools": lambda m, e: m.update(shapes='{"a.weight": [15, true], "b.weight": [16]}'),
    "a negative shape": lambda m, e: m.update(shapes='{"a.weight": [-3, -5], "b.weight": [16]}'),
    "a fractional shape": lambda m, e: m.update(shapes='{"a.weight": [3.0, 5.0], "b.weight": [16]}'),
    "a vast shape": lambda m, e: m.update(shapes='{"a.weight": [0, 99999999999999999999], "b.weight": [16]}'),
    "a shape that overflows": lambda m, e: m.update(shapes='{"a.weight": [0, 4294967296, 4294967296]}'),
    "a shape of 65 dimensions": lambda m, e: m.update(shapes=json.dumps({"a.weight": [1] * 64 + [15]})),
    "another name": lambda m, e: m.update(shapes='{"a.weight": [3, 5], "c.weight": [16]}'),
    "bits beyond the shape": lambda m, e: m.update(shapes='{"a.weight": [9], "b.weight": [16]}'),
    "provenance a list": lambda m, e: m.update(provenance="[1]"),
    "provenance a number": lambda m, e: m.update(provenance="9" * 5000),
    "seconds of words": lambda m, e: m.update(provenance='{"seconds": "x"}'),
    "seconds null": lambda m, e: m.update(provenance='{"seconds": null}'),
    "seconds NaN": lambda m, e: m.update(provenance='{"seconds": NaN}'),
    "seconds negative": lambda m, e: m.update(provenance='{"seconds": -1}'),
    "fields a list": lambda m, e: m.update(provenance='{"fields": []}'),
    "method a number": lambda m, e: m.update(provenance='{"method": 3}'),
    "fingerprint a list": lambda m, e: m.update(provenance='{"fingerprint": ["x"]}'),
    "metadata a list": lambda m, e: e.update(__metadata__=[]),
    "metadata null": lambda m, e: e.update(__metadata__=None),
    "an entry of 8-bit floats": lambda m, e: e["a.weight"].update(dtype="F8_E4M3"),
    "an entry of bfloat16": lambda m, e: e["a.weight"].update(dtype="BF16"),
    "an entry null": lambda m, e: e.update({"a.weight": None}),
    "an entry without a place": lambda m, e: e["a.weight"].pop("data_offsets"),
    "a place of words": lambda m, e: e["a.weight"].update(data_offsets=["0", "2"]),
    "places that overlap": lambda m, e: e["b.weight"].update(data_offsets=[1, 3]),
    "a place backwards": lambda m, e: e["b.weight"].update(data_offsets=[4, 2]),
    "another length": lambda m, e: e["b.weight"].update(shape=[3]),
}


@pytest.mark.trap(83)
@pytest.mark.parametrize("what", STRUCTURES)
def test_structure_is_checked_before_it_is_believed(tmp_path, what):
    """Files whose checksum is right, made by somebody else."""
    path = tmp_path / "m"
    example().save(path)
    header, body = header_of(path.read_bytes())
    path.write_bytes(forged(header, body))
    assert Masks.load(path) == example()  # forging works
    STRUCTURES[what](header["__metadata__"], header)
    if not isinstance(header["__metadata__"], dict):
        text = json.dumps(header).encode()
        return refused(path, len(text).to_bytes(8, "little") + text + body)
    refused(path, forged(header, body))
    return None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 8 + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"null",
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (5000).to_bytes(8, "little") + b"9" * 5000,
    ],
)
def test_what_is_no_mask_file_at_all(tmp_path, content):
    refused(tmp_path / "m", content)


@pytest.mark.parametrize("kind", ["folder", "pipe", "NUL", "loop", "not readable"])
def test_paths_that_are_no_file(tmp_path, kind):
    path = tmp_path / "m"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # a read would wait for ever
    elif kind == "NUL":
        path = Path(f"{path}\0")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path = Path("/proc/self/mem")
    with pytest.raises(MaskFileError):
        Masks.load(path)


def test_a_vast_file_of_something_else_is_not_read(tmp_path):
    """A terabyte of nothing after a sound header."""
    path = tmp_path / "m"
    example().save(path)
    os.truncate(path, 2**40)
    with pytest.raises(MaskFileError, match="something after its masks"):
        Masks.load(path)


@pytest.mark.parametrize("provenance", [{"x": object()}, {"x": {1, 2}}, {"seconds": "1"}, {"fields": None}])
def test_what_cannot_be_read_is_not_written(tmp_path, provenance):
    with pytest.raises(MaskError, match="provenance"):
        Masks({"a": torch.tensor([True])}, provenance).save(tmp_path / "m")
    with pytest.raises(MaskError, match="reserves"):
        Masks({"__metadata__": torch.tensor([True])}).save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_odd_names_and_shapes_come_back(tmp_path):
    shapes = [(), (0,), (3, 0, 2), (1,) * 64, (7,)]
    names = ["", "sha256", 'x"sha256":"' + "0" * 64 + '"', "\x1b[31m\n\0", "\ud800 é 🌲"]
    masks = Masks({name: torch.ones(shape, dtype=torch.bool) for name, shape in zip(names, shapes, strict=True)})
    masks.save(tmp_path / "m")
    assert Masks.load(tmp_path / "m") == masks
    with pytest.raises(MaskError, match="list"):
        Masks({"a": [True]})


def test_a_file_written_in_one_step_obeys_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_in_one_step(tmp_path / "m", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o640
    with pytest.raises(OSError):
        write_in_one_step(tmp_path / "none" / "m", b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
