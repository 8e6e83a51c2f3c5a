"""Batches, splits and augmentation, against loops over single images."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood.data import Augmentation, Dataset, Images, batches, pruning_batches, split
from sapwood.data.augmentation import mirror, resized_crop, shifted_crop
from sapwood.errors import ConfigError, DataError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, height: int = 8, width: int = 8, classes: int = 4) -> Images:
    """Images whose label can be read from their position: label i % classes."""
    pixels = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator(9))
    return Images(pixels, torch.arange(count) % classes)


@pytest.fixture
def dataset() -> Dataset:
    return Dataset(
        name="random",
        train=random_images(50),
        test=random_images(10),
        num_classes=4,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.5),
        augmentation=Augmentation(padding=2, flip=True),
    )


# ---- batches


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.double() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.5]).view(
        3, 1, 1
    )


def test_plain_batches_are_the_images_in_order(dataset: Dataset) -> None:
    walk = batches(dataset.train, dataset, batch_size=16)
    inputs, targets = zip(*walk, strict=True)
    assert [len(x) for x in inputs] == [16, 16, 16, 2]
    assert len(walk) == 4
    assert (inputs[0].dtype, targets[0].dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(torch.cat(inputs), normalised(dataset.train.images).float())
    assert torch.equal(torch.cat(targets), dataset.train.labels)
    assert torch.equal(torch.cat([y for _, y in walk]), dataset.train.labels)  # a second walk


def test_drop_last(dataset: Dataset) -> None:
    walk = batches(dataset.train, dataset, batch_size=16, drop_last=True)
    assert [len(y) for _, y in walk] == [16, 16, 16]
    assert len(walk) == 3


def test_shuffled_walks_differ_but_hold_every_image_once(dataset: Dataset) -> None:
    walk = batches(dataset.train, dataset, batch_size=16, generator=generator())
    first, second = (torch.cat([x for x, _ in walk]).flatten(1) for _ in range(2))
    assert not torch.equal(first, second)
    expected = normalised(dataset.train.images).float().flatten(1).sum(1).sort().values
    for seen in (first, second):
        torch.testing.assert_close(seen.sum(1).sort().values, expected)


def test_labels_stay_with_their_images(dataset: Dataset) -> None:
    marked = dataset.train.labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    images = Images(marked, dataset.train.labels)
    plain = replace(dataset, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    for x, y in batches(images, plain, batch_size=7, generator=generator()):
        assert torch.equal(x[:, 0, 0, 0].round().long(), y)


@pytest.mark.trap(37)
def test_the_generator_alone_decides(dataset: Dataset) -> None:
    walks = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(walks))  # the global generator must not matter
        walks.append(list(batches(dataset.train, dataset, batch_size=16, generator=generator(seed), augment=True)))
    same = [torch.equal(a, b) for (a, _), (b, _) in zip(walks[0], walks[1], strict=True)]
    assert all(same)
    assert not torch.equal(walks[0][0][0], walks[2][0][0])


def test_padding_is_black_before_normalisation(dataset: Dataset) -> None:
    white = Images(torch.full((64, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    [(x, _)] = batches(white, dataset, batch_size=64, generator=generator(), augment=True)
    ends = normalised(torch.tensor([0, 255]).view(2, 1, 1, 1).expand(2, 3, 1, 1)).float()
    for channel in range(3):
        torch.testing.assert_close(x[:, channel].unique(), ends[:, channel].flatten())


def test_everything_happens_on_the_device(dataset: Dataset) -> None:
    crops = replace(dataset, augmentation=replace(dataset.augmentation, scale=(0.1, 1.0)))
    walk = batches(dataset.train, crops, batch_size=16, generator=generator(), augment=True, device="meta")
    assert [(x.shape, x.device.type, y.device.type) for x, y in walk][-1] == ((2, 3, 8, 8), "meta", "meta")


def test_wrong_batches_are_explained(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1, not 0"):
        batches(dataset.train, dataset, batch_size=0)
    with pytest.raises(ConfigError, match="needs a generator"):
        batches(dataset.train, dataset, batch_size=8, augment=True)
    with pytest.raises(DataError, match="leaves no batch: there are 50 images and batch_size is 64"):
        batches(dataset.train, dataset, batch_size=64, drop_last=True)


# ---- augmentation


def test_shifted_crop_against_single_images() -> None:
    images = random_images(40, 6, 9).images
    shifts = torch.randint(0, 5, (2, 40), generator=generator())
    out = shifted_crop(images, shifts, padding=2)
    for image, cropped, (down, right) in zip(images, out, shifts.T.tolist(), strict=True):
        assert torch.equal(cropped, F.pad(image, (2, 2, 2, 2))[:, down : down + 6, right : right + 9])


def test_mirror_against_single_images() -> None:
    images = random_images(20, 6, 9).images
    chosen = torch.rand(20, generator=generator()) < 0.5
    for image, out, turned in zip(images, mirror(images, chosen), chosen.tolist(), strict=True):
        assert torch.equal(out, torch.stack([image[..., 8 - i] for i in range(9)], dim=-1) if turned else image)


def test_resized_crop_against_interpolation_of_single_images() -> None:
    images = random_images(30, 16, 20).images
    size = torch.randint(2, 12, (30, 2), generator=generator())
    corner = torch.randint(0, 5, (30, 2), generator=generator(1))
    out = resized_crop(images, torch.cat([corner, size], dim=1))
    for image, cropped, (top, left), (height, width) in zip(images, out, corner.tolist(), size.tolist(), strict=True):
        box = image[None, :, top : top + height, left : left + width].float()
        expected = F.interpolate(box, size=(16, 20), mode="bilinear", align_corners=False)[0]
        # Within half an old pixel of the box's edge, ours sees the neighbours and interpolate does not.
        y, x = -(-16 // (2 * height)), -(-20 // (2 * width))
        torch.testing.assert_close(
            cropped[:, y : 16 - y, x : 20 - x], expected[:, y : 16 - y, x : 20 - x], rtol=0, atol=0.01
        )


def test_whole_image_is_a_fixed_point_of_the_resized_crop() -> None:
    images = random_images(5).images
    torch.testing.assert_close(
        resized_crop(images, torch.tensor([[0, 0, 8, 8]] * 5)), images.float(), rtol=0, atol=0.01
    )


def test_draws_of_shift_and_flip_are_uniform() -> None:
    # A picture of one white pixel shows where its window was cut and whether it was mirrored.
    images = torch.zeros(9000, 1, 7, 7, dtype=torch.uint8)
    images[:, 0, 3, 2] = 255
    out = Augmentation(padding=1, flip=True)(images, generator())
    places = out.flatten(1).argmax(dim=1).bincount(minlength=49).view(7, 7)
    expected = torch.zeros(7, 7)
    for column in (2, 4):  # unmirrored and mirrored, each with shifts of -1, 0 and 1
        expected[2:5, column - 1 : column + 2] += 9000 / 18
    assert ((places - expected).abs() <= 5 * expected.sqrt()).all()


def test_draws_of_the_resized_crop() -> None:
    """A ramp along each axis shows the box: its middle value is the centre, its slope the side."""
    side = 64
    ramp = torch.arange(side, dtype=torch.uint8)
    images = torch.stack([ramp[:, None].expand(side, side), ramp[None, :].expand(side, side)]).expand(
        4000, 2, side, side
    )
    out = Augmentation(scale=(0.1, 0.6), ratio=(0.7, 1.25))(images, generator())
    height = (out[:, 0, 40, 32] - out[:, 0, 24, 32]) / 16 * side
    width = (out[:, 1, 32, 40] - out[:, 1, 32, 24]) / 16 * side
    area, ratio = height * width / side**2, width / height
    assert area.min() > 0.09
    assert area.max() < 0.62
    assert ratio.min() > 0.66
    assert ratio.max() < 1.31
    assert area.mean().item() == pytest.approx(0.35, abs=0.01)  # uniform between the two
    assert ratio.log().mean().item() == pytest.approx((math.log(0.7) + math.log(1.25)) / 2, abs=0.01)
    centre = out[:, 0, 31:33, 32].mean(dim=1) + 0.5
    assert centre.mean().item() == pytest.approx(side / 2, abs=0.5)
    assert (centre - height / 2).min() > -1
    assert (centre + height / 2).max() < side + 1


def test_no_augmentation_changes_nothing() -> None:
    images = random_images(5).images
    assert torch.equal(Augmentation()(images, generator()), images)


# ---- split


@pytest.mark.trap(37)
def test_split_is_stratified_disjoint_and_repeatable() -> None:
    pixels = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1)
    images = Images(pixels, torch.tensor([0] * 100 + [1] * 60 + [2] * 40))
    rest, validation = split(images, 0.1, seed=3)
    assert rest.labels.bincount().tolist() == [90, 54, 36]
    assert validation.labels.bincount().tolist() == [10, 6, 4]
    assert sorted(torch.cat([rest.images, validation.images]).flatten().tolist()) == list(range(200))
    assert torch.equal(split(images, 0.1, seed=3)[1].images, validation.images)
    assert not torch.equal(split(images, 0.1, seed=4)[1].images, validation.images)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.01])
def test_impossible_splits_are_explained(fraction: float) -> None:
    with pytest.raises(DataError, match=f"cannot be split by class with fraction={fraction}"):
        split(random_images(50), fraction, seed=0)


# ---- the sample for pruning


@pytest.mark.trap(14, 16)
def test_pruning_batches_are_balanced_distinct_and_the_same_in_each_walk(dataset: Dataset) -> None:
    sample = pruning_batches(dataset, per_class=5, batch_size=8, seed=0)
    assert [len(y) for _, y in sample] == [8, 8, 4]
    inputs, targets = torch.cat([x for x, _ in sample]), torch.cat([y for _, y in sample])
    assert targets.bincount().tolist() == [5, 5, 5, 5]
    assert len(sample[0][1].unique()) > 1  # classes are mixed, not one batch each
    assert len(inputs.flatten(1).unique(dim=0)) == 20  # no image twice
    known = normalised(dataset.train.images).float()
    for x, y in zip(inputs, targets, strict=True):
        match = (known - x).abs().amax(dim=(1, 2, 3)).argmin()
        torch.testing.assert_close(x, known[match])
        assert dataset.train.labels[match] == y
    again = pruning_batches(dataset, per_class=5, batch_size=8, seed=0)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(sample, again, strict=True))
    other = pruning_batches(dataset, per_class=5, batch_size=8, seed=1)
    assert not torch.equal(sample[0][0], other[0][0])


@pytest.mark.trap(15)
def test_a_missing_class_is_named(dataset: Dataset) -> None:
    without = replace(dataset, train=dataset.train.subset((dataset.train.labels != 2).nonzero().flatten()))
    with pytest.raises(DataError, match=r"class 2 of random has 0 training images"):
        pruning_batches(without, per_class=1, seed=0)
    with pytest.raises(DataError, match=r"13 images a class was asked for, but class 2 of random has 12"):
        pruning_batches(dataset, per_class=13, seed=0)


# ---- what a data set may be


def test_wrong_images_and_data_sets_are_explained(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="one label each"):
        Images(dataset.train.images, dataset.train.labels[1:])
    with pytest.raises(DataError, match="at least one"):
        Images(dataset.train.images[:0], dataset.train.labels[:0])
    with pytest.raises(DataError, match=r"must be uint8.*float32"):
        Images(dataset.train.images.float(), dataset.train.labels)
    with pytest.raises(DataError, match=r"labels must be 0 \.\. 2, but are 0 \.\. 3"):
        replace(dataset, num_classes=3)
    with pytest.raises(DataError, match="one value for each of the 3 channels"):
        replace(dataset, mean=(0.5,))
    with pytest.raises(DataError, match="test images"):
        replace(dataset, test=random_images(10, 9, 9))
