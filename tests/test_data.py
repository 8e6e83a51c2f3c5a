"""Data sets: what `load` reads, against files that the test writes itself; nothing here leaves the machine."""

import functools
import gzip
import hashlib
import http.server
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from PIL import Image

from sapwood import data
from sapwood.data import bundled, folder
from sapwood.data.download import Remote, data_root
from sapwood.data.files import ImageFiles
from sapwood.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def jpeg(file: Path, height: int, width: int, grey: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (height, width) if grey else (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


# ---- digits


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    assert (len(digits.train), len(digits.test), digits.input_shape) == (1442, 355, (1, 8, 8))
    assert int(digits.test.labels.bincount().min()) >= 34
    ours = torch.cat([digits.train.images, digits.test.images]).flatten(1).double() * 16 / 255
    theirs = torch.from_numpy(load_digits().data)
    assert torch.equal(ours.round().unique(dim=0), theirs.unique(dim=0))  # no image lost, doubled or changed
    assert torch.equal(digits.test.images, data.load("digits").test.images)


def test_arrays_are_resized_by_area() -> None:
    whole, half, double = data.load("digits"), data.load("digits", resolution=4), data.load("digits", resolution=16)
    pixels = whole.train.images.double()
    blocks = pixels.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    assert (half.train.images - blocks).abs().max() <= 0.5
    assert torch.equal(double.train.images, whole.train.images.repeat_interleave(2, 2).repeat_interleave(2, 3))


# ---- CIFAR


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 of 20 images a file, whose checksums take the place of the published ones."""
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for name in bundled.CIFAR10_MD5:
        batch = {"data": RNG.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        content = pickle.dumps(batch)
        (base / name).write_bytes(content)
        monkeypatch.setitem(bundled.CIFAR10_MD5, name, md5(content))
    return base


def test_cifar10_is_read_in_order(cifar: Path) -> None:
    loaded = data.load("cifar10", cifar.parent, offline=True)
    assert (len(loaded.train), len(loaded.test), loaded.input_shape) == (100, 20, (3, 32, 32))
    third = pickle.loads((cifar / "data_batch_3").read_bytes())["data"][7]
    assert loaded.train.images[47, 2, 5, 30] == third[2 * 1024 + 5 * 32 + 30]  # planes R, G, B, row by row
    assert loaded.train.labels[47] == 7
    assert loaded.augmentation == data.Augmentation(padding=4, flip=True)


def test_cifar100_has_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "cifar-100-python"
    base.mkdir()
    for name in ("train", "test"):
        batch = {"data": np.zeros((100, 3072), np.uint8), "fine_labels": list(range(100)), "coarse_labels": [0] * 100}
        (base / name).write_bytes(pickle.dumps(batch))
        monkeypatch.setitem(bundled.CIFAR100_MD5, name, md5((base / name).read_bytes()))
    loaded = data.load("cifar100", tmp_path, offline=True)
    assert loaded.num_classes == 100
    assert loaded.train.labels.tolist() == list(range(100))


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.file,))


def test_a_foreign_pickle_is_never_loaded(cifar: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    content = pickle.dumps(Touch(trace))
    pickle.loads(content)
    assert trace.exists()  # the pickle does what it is meant to
    trace.unlink()
    (cifar / "data_batch_4").write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_4 is not the published file.*md5"):
        data.load("cifar10", tmp_path, offline=True)
    assert not trace.exists()


def test_an_incomplete_folder_is_named(cifar: Path) -> None:
    (cifar / "test_batch").unlink()
    with pytest.raises(DataError, match="lacks test_batch"):
        data.load("cifar10", cifar.parent)


# ---- Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> dict[str, np.ndarray]:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for part, count in (("train", 30), ("t10k", 10)):
        arrays[f"{part}-images-idx3-ubyte"] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        (raw / name).write_bytes(idx(array))
    return arrays


def test_fashion_mnist_plain(fashion: dict[str, np.ndarray], tmp_path: Path) -> None:
    loaded = data.load("fashion-mnist", tmp_path, offline=True)
    assert loaded.input_shape == (1, 28, 28)
    assert np.array_equal(loaded.train.images[:, 0].numpy(), fashion["train-images-idx3-ubyte"])
    assert np.array_equal(loaded.test.labels.numpy(), fashion["t10k-labels-idx1-ubyte"])


def test_fashion_mnist_gzipped(fashion: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, array in fashion.items():
        plain = tmp_path / "FashionMNIST" / "raw" / name
        plain.unlink()
        content = gzip.compress(idx(array))
        plain.with_name(name + ".gz").write_bytes(content)
        monkeypatch.setitem(bundled.FASHION_MNIST, name, Remote(bundled.FASHION_MNIST[name].url, md5(content)))
    loaded = data.load("fashion-mnist", tmp_path, offline=True)
    assert np.array_equal(loaded.test.images[:, 0].numpy(), fashion["t10k-images-idx3-ubyte"])


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0", idx(np.zeros((2, 3), np.uint8))[:-1], idx(np.zeros(5, np.uint8)) + b"x", b"\0\0\x0d" + b"\1" * 20],
    ids=["empty", "stub", "cut off", "too long", "floats"],
)
def test_a_damaged_idx_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match="is not an idx file"):
        bundled.read_idx(tmp_path / "x")
    (tmp_path / "y.gz").write_bytes(gzip.compress(idx(np.zeros(500, np.uint8)))[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        bundled.read_idx(tmp_path / "y.gz")


# ---- image folders


def test_folder(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("zebra", "ant"):
            for i in range(3):
                jpeg(tmp_path / part / name / f"{i}.png", 12, 10, grey=i == 1)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    loaded = data.load("folder", tmp_path)
    assert (loaded.input_shape, loaded.num_classes, len(loaded.test)) == ((3, 12, 10), 2, 3 * 2)
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]  # ant before zebra
    pixels = np.stack(
        [
            np.array(Image.open(tmp_path / f"train/{c}/{i}.png").convert("RGB"))
            for c in ("ant", "zebra")
            for i in range(3)
        ]
    )
    assert np.array_equal(loaded.train.images.numpy(), pixels.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(loaded.mean, (pixels / 255).mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(loaded.std, (pixels / 255).std(axis=(0, 1, 2)), rtol=1e-6)


def test_folder_of_several_sizes_needs_a_resolution(tmp_path: Path) -> None:
    for part in ("train", "test"):
        jpeg(tmp_path / part / "a" / "0.png", 16, 16)
        jpeg(tmp_path / part / "a" / "1.png", 32, 16)
        jpeg(tmp_path / part / "b" / "0.png", 16, 16)
    with pytest.raises(DataError, match=r"1\.png has 32x16 pixels.*give a resolution"):
        data.load("folder", tmp_path)
    loaded = data.load("folder", tmp_path, resolution=16)
    original = np.array(Image.open(tmp_path / "train/a/1.png"))
    assert np.array_equal(loaded.train.images[1].permute(1, 2, 0).numpy(), original[8:24])  # the centre
    assert data.load("folder", tmp_path, resolution=8).input_shape == (3, 8, 8)


def test_folder_that_exceeds_memory_stays_on_disk(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for i in range(7):
            jpeg(tmp_path / part / str(i % 2) / f"{i}.png", 9, 9)
    whole = data.load("folder", tmp_path, resolution=8)
    lazy = data.load("folder", tmp_path, resolution=8, memory_limit=1000)
    assert isinstance(lazy.train.images, ImageFiles)
    assert (lazy.input_shape, lazy.mean, lazy.std) == (whole.input_shape, whole.mean, whole.std)
    for loaded in (whole, lazy):
        rest, validation = data.split(loaded.train, 0.3, seed=1)
        assert len(rest) + len(validation) == 7
        generator = torch.Generator().manual_seed(5)
        parts = list(data.batches(rest, loaded, batch_size=2, generator=generator, augment=True))
        if loaded is whole:
            expected = parts
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(parts, expected, strict=True))
    with pytest.raises(DataError, match="give a resolution, or raise memory_limit"):
        data.load("folder", tmp_path, memory_limit=1000)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/a/0.png"], "must hold train/CLASS.*it has train"),
        (["a/0.png", "b/0.png"], "it has none"),
        (["train/a/0.png", "test/b/0.png"], "no counterpart in train: its classes are a"),
        (["train/a/0.png", "train/b/empty.txt", "test/a/0.png"], "holds no images"),
        (["train/a/0.png", "test/a/broken.png"], r"broken\.png cannot be decoded"),
        (["train/a/0.png", "test/a/wide.png"], "training images are .*give a resolution"),
    ],
)
def test_wrong_folders_are_explained(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        jpeg(tmp_path / name if name.endswith("png") else tmp_path / name / "x.png", 4, 6 if "wide" in name else 4)
        if "broken" in name:
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
        if "empty" in name:
            (tmp_path / name / "x.png").rename(tmp_path / name / "x.txt")
    with pytest.raises(DataError, match=message):
        data.load("folder", tmp_path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    base = tmp_path / "tiny-imagenet-200"
    for name in ("n02", "n01"):
        for i in range(2):
            jpeg(base / "train" / name / "images" / f"{name}_{i}.JPEG", 64, 64, grey=i == 1)
        (base / "train" / name / f"{name}_boxes.txt").write_text("x\t0\t0\t9\t9\n")
    for i in range(3):
        jpeg(base / "val" / "images" / f"val_{i}.JPEG", 64, 64)
    (base / "val" / "val_annotations.txt").write_text(
        "val_2.JPEG\tn02\t0\t0\t9\t9\nval_0.JPEG\tn01\t0\t0\t9\t9\nval_1.JPEG\tn02\t0\t0\t9\t9\n"
    )
    return base


def test_tiny_imagenet(tiny: Path) -> None:
    loaded = data.load("tiny-imagenet", tiny.parent, offline=True)
    assert loaded.train.labels.tolist() == [0, 0, 1, 1]
    assert loaded.test.labels.tolist() == [1, 0, 1]
    first = np.array(Image.open(tiny / "val" / "images" / "val_2.JPEG").convert("RGB"))
    assert np.array_equal(loaded.test.images[0].permute(1, 2, 0).numpy(), first)
    (tiny / "val" / "val_annotations.txt").write_text("val_2.JPEG n02\n")
    with pytest.raises(DataError, match="line 1: expected NAME<tab>CLASS"):
        data.load("tiny-imagenet", tiny.parent, offline=True)


# ---- where files come from


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, list[str]]]:
    """A web server on this machine: its folder, its address, and the paths that were asked for."""
    base, asked = tmp_path_factory.mktemp("served"), []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(base))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield base, f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_cifar_is_downloaded_once(
    cifar: Path, server: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, address, asked = server
    with tarfile.open(base / "c.tar.gz", "w:gz") as archive:
        archive.add(cifar, arcname="cifar-10-batches-py")
    monkeypatch.setattr(bundled, "CIFAR10", Remote(f"{address}/c.tar.gz", md5((base / "c.tar.gz").read_bytes())))
    root = tmp_path / "new" / "root"
    first = data.load("cifar10", root)
    second = data.load("cifar10", root, offline=True)
    assert asked == ["/c.tar.gz"]
    assert torch.equal(first.train.images, second.train.images)
    assert sorted(entry.name for entry in root.iterdir()) == ["c.tar.gz", "cifar-10-batches-py"]  # nothing else is left


def test_tiny_imagenet_is_unpacked_from_an_archive_that_is_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "elsewhere"
    root.mkdir()
    with zipfile.ZipFile(root / "t.zip", "w") as archive:
        for file in sorted(tiny.rglob("*")):
            archive.write(file, file.relative_to(tmp_path))
    monkeypatch.setattr(folder, "TINY_IMAGENET", Remote("http://127.0.0.1:9/t.zip", md5((root / "t.zip").read_bytes())))
    assert len(data.load("tiny-imagenet", root, offline=True).train) == 4


def test_a_wrong_download_is_refused_and_leaves_nothing(
    server: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, address, _ = server
    (base / "c.tar.gz").write_bytes(b"something else")
    monkeypatch.setattr(bundled, "CIFAR10", Remote(f"{address}/c.tar.gz", md5(b"the published file")))
    with pytest.raises(DataError, match="could not be downloaded"):
        data.load("cifar10", tmp_path)
    monkeypatch.setattr(bundled, "CIFAR10", Remote(f"{address}/missing.tar.gz", md5(b"")))
    with pytest.raises(DataError, match="could not be downloaded"):
        data.load("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "tiny-imagenet"])
def test_offline_without_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}.*is not there.*put the file.*or load once without offline"):
        data.load(name, tmp_path, offline=True)
    assert list(tmp_path.iterdir()) == []


def test_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_DATA", "/some/where")
    assert data_root(None) == Path("/some/where")
    assert data_root("~/mine") == Path.home() / "mine"
    monkeypatch.delenv("SAPWOOD_DATA")
    assert data_root(None) == Path(pooch.os_cache("sapwood"))


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'cifar10'.*Legal: cifar10, cifar100"):
        data.load("cifar")
    with pytest.raises(ConfigError, match="needs root"):
        data.load("folder")
    with pytest.raises(ConfigError, match="resolution must be at least 1"):
        data.load("digits", resolution=0)
