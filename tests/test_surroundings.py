"""What surrounds a call leaves its masks as they are: default dtype and device, and tensors made in inference mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import sapwood
from sapwood import METHODS, Masks, data
from sapwood.methods.table import settings

IMAGES, LABELS = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
SLOW = ("obs", "ntt")


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    return nn.Sequential(*layers).float()


def masks_of(method: str, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor] = (IMAGES, LABELS)) -> Masks:
    quick = {"rounds": 2, "resamples": 1, "samples": 8, "steps": 1}
    fields = {name: value for name, value in quick.items() if name in settings(METHODS[method])}
    return sapwood.prune(model, method=method, density=0.3, input_shape=(3, 4, 4), batches=[batch], **fields).masks


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


AROUND = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "within meta": lambda: torch.device("meta"),
    "default meta": lambda: default_device("meta"),
    "inference": torch.inference_mode,
}


@pytest.mark.trap(86)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in SLOW])
def test_masks_do_not_depend_on_what_is_around(method: str) -> None:
    model = net()
    expected = masks_of(method, model)
    for name, around in AROUND.items():
        with around():
            found = masks_of(method, model)
        assert found == expected, name
        assert not any(mask.is_inference() for mask in found.values())


@pytest.mark.trap(86)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in SLOW])
def test_models_and_batches_made_in_inference_mode(method: str) -> None:
    expected = masks_of(method, net())
    with torch.inference_mode():
        model, batch = net(), (IMAGES + 0, LABELS + 0)
    assert masks_of(method, model, batch) == expected
    assert all(parameter.is_inference() for parameter in model.parameters())  # the model itself is as it was


@pytest.mark.trap(86)
def test_files_and_batches_do_not_depend_on_it_either(tmp_path) -> None:
    masks = masks_of("random", net())
    masks.save(tmp_path / "m")
    for around in AROUND.values():
        with around():
            loaded = Masks.load(tmp_path / "m")
        assert loaded == masks and not any(mask.is_inference() for mask in loaded.values())
    digits = data.load("digits")
    with default_dtype(torch.float64):
        images, _ = next(iter(data.batches(digits.train, digits, batch_size=4)))
    assert images.dtype == torch.float32
