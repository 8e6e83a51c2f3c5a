"""The sets that come as one array each: CIFAR-10, CIFAR-100, Fashion-MNIST and scikit-learn's digits."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import math
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sapwood.data.augmentation import Augmentation
from sapwood.data.download import Remote, Source, fetch, unpacked
from sapwood.data.images import Dataset, Images, channel_statistics
from sapwood.errors import DataError

CIFAR10 = Remote("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
CIFAR100 = Remote("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR100_MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}

_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST = {
    "train-images-idx3-ubyte": Remote(_FASHION + "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    "train-labels-idx1-ubyte": Remote(_FASHION + "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
    "t10k-images-idx3-ubyte": Remote(_FASHION + "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
    "t10k-labels-idx1-ubyte": Remote(_FASHION + "t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
}


def cifar10(source: Source) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009) from `root/cifar-10-batches-py`: 50,000 and 10,000 32x32 RGB images, 10 classes."""
    folder = unpacked(CIFAR10, source, "cifar-10-batches-py", tuple(CIFAR10_MD5))
    *train, test = (_cifar_batch(folder / name, md5, "labels") for name, md5 in CIFAR10_MD5.items())
    return Dataset(
        name="cifar10",
        train=Images(torch.cat([images for images, _ in train]), torch.cat([labels for _, labels in train])),
        test=Images(*test),
        num_classes=10,
        mean=(0.491, 0.482, 0.447),
        std=(0.247, 0.243, 0.262),
        augmentation=Augmentation(padding=4, flip=True),
    )


def cifar100(source: Source) -> Dataset:
    """CIFAR-100 (Krizhevsky 2009) from `root/cifar-100-python`: 50,000 and 10,000 32x32 images, 100 classes."""
    folder = unpacked(CIFAR100, source, "cifar-100-python", tuple(CIFAR100_MD5))
    train, test = (_cifar_batch(folder / name, md5, "fine_labels") for name, md5 in CIFAR100_MD5.items())
    return Dataset(
        name="cifar100",
        train=Images(*train),
        test=Images(*test),
        num_classes=100,
        mean=(0.507, 0.487, 0.441),
        std=(0.267, 0.256, 0.276),
        augmentation=Augmentation(padding=4, flip=True),
    )


def fashion_mnist(source: Source) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017) from `root/FashionMNIST/raw`: 60,000 and 10,000 28x28 images, 10 classes."""
    arrays = {}
    for name, remote in FASHION_MNIST.items():
        plain = source.root / "FashionMNIST" / "raw" / name
        arrays[name] = read_idx(plain if plain.is_file() else fetch(remote, plain.parent, offline=source.offline))
    parts = {}
    for part in ("train", "t10k"):
        images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
        parts[part] = Images(images.unsqueeze(1), labels.long())
    return Dataset(
        name="fashion-mnist",
        train=parts["train"],
        test=parts["t10k"],
        num_classes=10,
        mean=(0.2860,),
        std=(0.3530,),
        augmentation=Augmentation(padding=4, flip=True),
    )


def digits(source: Source) -> Dataset:
    """The 1,797 8x8 grey digits that scikit-learn brings along, 10 classes; nothing is looked for in the root.

    Test images are every fifth of each class (355 in all), the others are for training: a fixed split with all writers
    in both parts. Augmentation shifts by up to one pixel.
    """
    pixels, target = _digits_of_scikit_learn()
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        is_test[(labels == label).nonzero().flatten()[4::5]] = True
    train, test = Images(images[~is_test], labels[~is_test]), Images(images[is_test], labels[is_test])
    mean, std = channel_statistics(train)
    return Dataset("digits", train, test, num_classes=10, mean=mean, std=std, augmentation=Augmentation(padding=1))


def _digits_of_scikit_learn() -> tuple[np.ndarray, np.ndarray]:
    """The pixels, 0 to 16, and the labels. Read from its file, because scikit-learn takes a second to import."""
    spec = importlib.util.find_spec("sklearn")
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz" if spec and spec.origin else Path()
    if not file.is_file():  # another version may keep it elsewhere
        from sklearn.datasets import load_digits

        pixels, target = load_digits(return_X_y=True)
        return pixels, target
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1], table[:, -1].astype(int)


def read_idx(file: Path) -> Tensor:
    """An idx file of bytes (http://yann.lecun.com/exdb/mnist), plain or .gz, as a uint8 tensor.

    Raises:
        DataError: If its magic number or its length is not that of such a file.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{file} cannot be read ({error}): delete it to have it downloaded again.") from error
    rank = content[3] if len(content) > 3 else 0
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    start = 4 + 4 * rank
    if content[:3] != b"\0\0\x08" or not math.prod(shape) or not rank or len(content) != start + math.prod(shape):
        raise DataError(
            f"{file} is not an idx file of bytes, or is cut off: it starts with {content[:4].hex() or 'nothing'} "
            f"and has {len(content)} bytes, where 0000080n and {start + math.prod(shape)} bytes were expected. "
            "Delete it to have it downloaded again."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


def _cifar_batch(file: Path, md5: str, label_key: str) -> tuple[Tensor, Tensor]:
    """One batch of CIFAR. A pickle can run any code, so nothing but the published bytes is unpickled."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error}): delete {file.parent} to have it downloaded again."
        ) from error
    if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise DataError(
            f"{file} is not the published file: its md5 is {found} and not {md5}, so it was not read. "
            f"Delete {file.parent} to have it downloaded again."
        )
    batch = pickle.loads(content, encoding="latin1")
    return torch.from_numpy(batch["data"]).view(-1, 3, 32, 32), torch.tensor(batch[label_key])
