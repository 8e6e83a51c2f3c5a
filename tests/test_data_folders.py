"""Image folders as people have them: handled as torchvision's ImageFolder does, or said."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sapwood import data
from sapwood.data import bundled
from sapwood.data.files import ImageFiles, read
from sapwood.errors import ConfigError, DataError, SapwoodWarning

RNG = np.random.default_rng(0)


def picture(file: Path, pixels: np.ndarray | None = None, **how: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8) if pixels is None else pixels
    Image.fromarray(pixels).save(file, **how)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("train", "test"):
        for name in ("a", "b"):
            for i in range(2):
                picture(tmp_path / part / name / f"{i}.png")
    return tmp_path


def decoded(file: Path) -> np.ndarray:
    pixels = read([file], None, 2**30)
    assert isinstance(pixels, torch.Tensor)
    return pixels[0].permute(1, 2, 0).numpy()


@pytest.mark.trap(85)
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    """A ramp over all 65,536 levels, beside the exact quotient; Pillow's own conversion makes it white."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    file = tmp_path / f"x.{suffix}"
    if suffix == "pgm":  # big-endian, as Netpbm has it
        file.write_bytes(b"P5 256 256 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(file)
    found = decoded(file)
    assert np.abs(found - levels[..., None] / 257).max() <= 0.5
    assert (found == found[..., :1]).all()


def test_numbers_without_a_range_are_refused(tmp_path: Path) -> None:
    for kind in (np.float32, np.int32):
        Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "x.tif")
        with pytest.raises(DataError, match=r"x\.tif cannot be decoded .*no known range"):
            read([tmp_path / "x.tif"], None, 2**30)


@pytest.mark.trap(85)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_is_read_as_torchvision_reads_it(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8), "RGBA")
    image = image.convert("RGB" if mode == "P" else mode)
    if mode == "P":
        image = image.quantize(16)
        image.info["transparency"] = bytes(range(16))
    file = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    image.save(file)
    with Image.open(file) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.array(opened.convert("RGB"))
    assert np.array_equal(decoded(file), expected)


def test_orientation_in_exif_is_not_applied_as_in_torchvision(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    file = picture(tmp_path / "x.png", np.zeros((4, 6, 3), np.uint8), exif=exif)
    assert decoded(file).shape == (4, 6, 3)


@pytest.mark.trap(85)
def test_hidden_files_are_left_out(folder: Path) -> None:
    (folder / "train/a/._0.png").write_bytes(b"Mac OS X")
    (folder / "train/a/.cache").mkdir()
    (folder / "train/a/.cache/x.png").write_bytes(b"thumbnail")
    picture(folder / "train/.hidden/x.png")
    (folder / "train/a/deep.png").mkdir()  # a folder, whatever its name
    picture(folder / "train/a/deep.png/2.png")
    loaded = data.load("folder", folder)
    assert (len(loaded.train), loaded.num_classes) == (5, 2)


@pytest.mark.trap(85)
@pytest.mark.parametrize("kind", ["pipe", "broken link", "loop"])
def test_what_is_no_file_is_named_instead_of_waited_for(folder: Path, kind: str) -> None:
    odd = folder / "train/b/x.png"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to(odd if kind == "loop" else folder / "nowhere")
    with pytest.raises(DataError, match=r"x\.png is no regular file"):
        data.load("folder", folder)


@pytest.mark.trap(85)
def test_what_makes_an_accuracy_meaningless_is_said(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load("folder", folder)
    for file in (folder / "test/b").iterdir():
        file.unlink()
    (folder / "test/b").rmdir()
    with pytest.warns(SapwoodWarning, match="no images of 'b'"):
        data.load("folder", folder)
    for file in (folder / "train/b").iterdir():
        file.unlink()
    (folder / "train/b").rmdir()
    with pytest.warns(SapwoodWarning, match="one class only, 'a'"):
        data.load("folder", folder)


@pytest.mark.trap(85)
@pytest.mark.parametrize("memory_limit", [2**30, 100])
def test_test_images_that_are_trained_on_are_counted(folder: Path, memory_limit: int) -> None:
    (folder / "test/a/0.png").write_bytes((folder / "train/a/0.png").read_bytes())
    with pytest.warns(SapwoodWarning, match="1 of the 4 test images"):
        loaded = data.load("folder", folder, resolution=8, memory_limit=memory_limit)
    assert isinstance(loaded.train.images, ImageFiles) == (memory_limit == 100)
    for file in list(folder.glob("test/*/*")):
        file.unlink()
    for name in ("a", "b"):
        (folder / "test" / name).rmdir()
    (folder / "test").rmdir()
    (folder / "test").symlink_to(folder / "train")
    with pytest.warns(SapwoodWarning, match="4 of the 4 test images"):
        data.load("folder", folder, resolution=8, memory_limit=memory_limit)


@pytest.mark.parametrize(
    "damage", ["no class", "no annotation", "binary annotation", "a folder as annotation", "elsewhere"]
)
def test_damaged_tiny_imagenet(tmp_path: Path, damage: str) -> None:
    base = tmp_path / "tiny-imagenet-200"
    for name in () if damage == "no class" else ("n1", "n2"):
        picture(base / "train" / name / "images" / "0.JPEG")
    picture(base / "val" / "images" / "0.JPEG")
    (base / "train").mkdir(exist_ok=True)
    annotations = base / "val" / "val_annotations.txt"
    annotations.write_bytes(
        {
            "no annotation": b"",
            "binary annotation": b"\xff\xfe\0",
            "elsewhere": b"../../train/n1/images/0.JPEG\tn1\n",
        }.get(damage, b"0.JPEG\tn1\t0\n")
    )
    if damage.startswith("a folder"):
        annotations.unlink()
        annotations.mkdir()
    with pytest.raises(DataError):
        data.load("tiny-imagenet", tmp_path, offline=True)


def test_damaged_arrays(tmp_path: Path) -> None:
    for rank in (1, 3, 255):
        (tmp_path / "x").write_bytes(bytes((0, 0, 8, rank)) + bytes(4 * rank))
        with pytest.raises(DataError, match="idx"):
            bundled.read_idx(tmp_path / "x")
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in bundled.CIFAR10_MD5:
        (tmp_path / "cifar-10-batches-py" / name).mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        data.load("cifar10", tmp_path)
    with pytest.raises(DataError, match="empty"):
        read([], None, 100)


@pytest.mark.parametrize(
    "wrong",
    [
        {"resolution": 10**7},
        {"resolution": 10**30},
        {"resolution": "8"},
        {"resolution": True},
        {"memory_limit": -1},
        {"root": 3},
        {"root": "a\0b"},
        {"name": 3},
        {"offline": "no"},
    ],
)
def test_wrong_arguments_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        data.load(**{"name": "digits", **wrong})
    with pytest.raises(DataError, match="memory"):
        data.load("digits", resolution=10_000)
