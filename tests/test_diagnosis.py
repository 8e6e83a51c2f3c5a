"""Effective sparsity against a search for paths in the network's graph."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nets import NETS, Residual
from sapwood import Masks, prune
from sapwood.diagnosis import effective
from sapwood.errors import DataError, MaskError
from sapwood.methods import prunable


def mask_like(shape, density, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def on_paths(matrices):
    """Kept entries of a chain of matrices (outputs x inputs) on a path: every path is walked."""
    units = [matrices[0].shape[1], *(m.shape[0] for m in matrices)]
    kept = [torch.zeros_like(m) for m in matrices]
    for path in itertools.product(*(range(n) for n in units)):
        steps = list(enumerate(itertools.pairwise(path)))
        if all(matrices[i][b, a] for i, (a, b) in steps):
            for i, (a, b) in steps:
                kept[i][b, a] = True
    return kept


@pytest.mark.trap(36)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.9), st.sampled_from([nn.ReLU, nn.GELU, nn.Tanh]))
def test_mlp_agrees_with_walking_every_path(seed, density, activation):
    model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3))
    masks = Masks({name: mask_like(w.shape, density, seed + i) for i, (name, w) in enumerate(prunable(model).items())})
    found = effective(model, masks, input_shape=(4,))
    for name, expected in zip(masks, on_paths(list(masks.values())), strict=True):
        assert torch.equal(found[name], expected), name


@pytest.mark.trap(36)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.02, 0.5))
def test_cnn_with_max_pooling_agrees_with_walking_channels(seed, density):
    """On images larger than the kernels, a kernel weight is on a path just if its channels are."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveMaxPool2d(1),
        nn.Flatten(), nn.Linear(3, 2),
    )  # fmt: skip
    masks = Masks({name: mask_like(w.shape, density, seed + i) for i, (name, w) in enumerate(prunable(model).items())})
    found = effective(model, masks, input_shape=(2, 8, 8))
    channels = [mask.flatten(2).any(2) if mask.dim() == 4 else mask for mask in masks.values()]
    for (name, mask), live in zip(masks.items(), on_paths(channels), strict=True):
        assert torch.equal(found[name], mask & live.reshape(*live.shape, *[1] * (mask.dim() - 2))), name


def test_a_shortcut_is_a_path():
    model = Residual()
    masks = dict(Masks.dense(prunable(model)).items())
    masks["conv1.weight"] = torch.zeros_like(masks["conv1.weight"])
    found = effective(model, Masks(masks), input_shape=(3, 6, 6))
    assert found.collapsed == ("conv1.weight", "conv2.weight")  # behind conv1 nothing comes in any more
    assert found["stem.weight"].all() and found["fc.weight"].all()  # the shortcut goes on


def test_a_kernel_on_one_pixel_has_one_weight_that_sees_it():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2, 2))
    found = effective(model, Masks.dense(prunable(model)), input_shape=(1, 1, 1))
    assert found["0.weight"].nonzero()[:, 2:].tolist() == [[1, 1]] * 2


@pytest.mark.parametrize("name", NETS)
def test_every_weight_of_a_dense_network_is_on_a_path(name):
    build, shape = NETS[name]
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert effective(model, Masks.dense(prunable(model)), input_shape=shape).sparsity == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("depth", [3, 100])
def test_depth_neither_overflows_nor_vanishes(depth):
    blocks = itertools.chain.from_iterable((nn.Linear(64, 64), nn.ReLU()) for _ in range(depth))
    model = nn.Sequential(*blocks)
    masks = Masks.dense(prunable(model))
    assert effective(model, masks, input_shape=(64,)) == masks


def test_values_do_not_matter():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    nn.init.zeros_(model[0].weight)
    assert effective(model, Masks.dense(prunable(model)), input_shape=(3,)).sparsity == 0


def test_ways_to_say_the_input_and_refusals():
    build, shape = NETS["mlp without norm"]
    model = build()
    masks = prune(model, method="random", density=0.2).masks
    found = effective(model, masks, input_shape=shape)
    assert found <= masks and found.kept < masks.kept
    assert effective(torch.compile(model), masks, batches=[(torch.randn(4, *shape), None)]) == found
    with pytest.raises(DataError, match="input_shape"):
        effective(model, masks)
    with pytest.raises(MaskError, match="another model"):
        effective(Residual(), masks, input_shape=(3, 6, 6))
