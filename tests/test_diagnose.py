"""Paths, dead and bottleneck units against walking every path, gradients against the exact Jacobian."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nets import NETS, Residual, mlp
from sapwood import Masks, ntk, prunable, prune
from sapwood.diagnosis import diagnose
from sapwood.diagnosis.counting import count
from sapwood.errors import DataError
from sapwood.functional import FunctionalModel
from test_diagnosis import mask_like


def walked(matrices):
    """All paths of a chain of matrices (outputs x inputs), as tuples of unit numbers."""
    units = [matrices[0].shape[1], *(m.shape[0] for m in matrices)]
    return [
        path
        for path in itertools.product(*(range(n) for n in units))
        if all(matrices[i][b, a] for i, (a, b) in enumerate(itertools.pairwise(path)))
    ]


def random_masks(model, density, seed):
    return Masks({name: mask_like(w.shape, density, seed + i) for i, (name, w) in enumerate(prunable(model).items())})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
def test_mlp_agrees_with_walking_every_path(seed, density):
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    masks = random_masks(model, density, seed)
    paths = walked(list(masks.values()))
    found = diagnose(model, masks, input_shape=(4,))
    assert found.log10_paths == pytest.approx(math.log10(len(paths)) if paths else -math.inf)
    for depth, (name, mask) in enumerate(masks.items(), start=1):
        through = [sum(path[depth] == unit for path in paths) for unit in range(len(mask))]
        layer = found.layers[name]
        assert (layer.kept, layer.units) == (int(mask.sum()), len(mask))
        assert layer.dead == sum(not n for n in through)
        assert layer.bottlenecks == tuple(i for i, n in enumerate(through) if paths and n == len(paths))
        assert layer.busiest == pytest.approx(max(through) / len(paths) if paths else 0)
    assert found.dead == sum(layer.dead for layer in found.layers.values())


def unrolled(function, inputs):
    """The matrix of a linear map on images, outputs x inputs."""
    basis = torch.eye(math.prod(inputs), dtype=torch.float64).view(-1, *inputs)
    return function(basis).flatten(1).T


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(2)])
def test_cnn_agrees_with_matrices_pixel_by_pixel(pool):
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3, eps=0), nn.ReLU(), pool,
        nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
    )  # fmt: skip
    with torch.no_grad():
        model[1].running_var.fill_(7)
        model[1].weight.fill_(-3)
    masks = random_masks(model, 0.5, 4)
    first, second, last = (m.double() for m in masks.values())
    chain = [
        unrolled(lambda x: F.conv2d(x, first, padding=1), (2, 4, 4)),
        unrolled(lambda x: 4 * F.avg_pool2d(x, 2), (3, 4, 4)),
        unrolled(lambda x: F.conv2d(x, second, padding=1), (3, 2, 2)),
        unrolled(lambda x: x.sum((2, 3)), (3, 2, 2)),
        last,
    ]
    total = torch.ones(32, dtype=torch.float64)
    for matrix in chain:
        total = matrix @ total
    found = diagnose(model, masks, input_shape=(2, 4, 4))
    assert 10**found.log10_paths == pytest.approx(float(total.sum()))


def test_shortcuts_are_paths():
    model = Residual(zero_gamma=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    masks = dict(Masks.dense(prunable(model)).items())
    masks["conv1.weight"] = torch.zeros_like(masks["conv1.weight"])
    masks["fc.weight"] = masks["fc.weight"].clone()
    masks["fc.weight"][:, 1:] = False
    found = diagnose(model, Masks(masks), input_shape=(3, 6, 6))
    border = sum(len(range(max(0, y - 1), min(6, y + 2))) for y in range(6)) ** 2  # 3x3 kernels on 6x6 pixels
    assert 10**found.log10_paths == pytest.approx(3 * border * 3)  # input channels, outputs
    assert found.bottlenecks == {"stem.weight": (0,)} and found.layers["conv1.weight"].dead == 8
    assert found.layers["stem.weight"].dead == 7 and "no path" not in found.sentence()
    nothing = Masks({**masks, "fc.weight": torch.zeros_like(masks["fc.weight"])})
    assert "no path" in diagnose(model, nothing, input_shape=(3, 6, 6)).table()


@pytest.mark.parametrize(("depth", "known"), [(5, True), (200, True), (400, False)])
def test_very_many_paths(depth, known):
    model = nn.Sequential(*itertools.chain.from_iterable((nn.Linear(30, 30), nn.ReLU()) for _ in range(depth)))
    net = FunctionalModel.of(model)
    masks = Masks.dense(prunable(model))
    found = count(net, masks, torch.ones(1, 30))
    expected = (depth + 1) * math.log10(30)
    assert found.log10 == (pytest.approx(expected) if known else math.inf) or expected < 600
    if known:
        for shares in found.shares.values():
            assert float(shares.sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_network_is_probed_and_left_alone(name):
    build, shape = NETS[name]
    model = build()
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    masks = random_masks(model, 0.5, 0)
    found = diagnose(model, masks, input_shape=shape)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert math.isfinite(found.log10_paths) and list(found.layers) == list(masks)
    assert all(layer.gradient >= 0 for layer in found.layers.values())
    assert found.table().count("\n") == len(masks) + 1


def test_gradients_are_the_roots_of_the_layers_traces():
    model, x = mlp(7, 12, 12, 3).double(), torch.randn(8, 7, dtype=torch.float64)
    masks = prune(model, method="random", density=0.5).masks
    exact = ntk.trace(model, x, masks).by_layer
    squares = dict.fromkeys(masks, 0.0)
    for seed in range(25):
        for name, layer in diagnose(model, masks, batches=[x], seed=seed).layers.items():
            squares[name] += layer.gradient**2 / 25
    for name, value in exact.items():
        assert squares[name] == pytest.approx(value / 8, rel=0.2)


def test_result_carries_a_diagnosis_when_asked():
    model = mlp(7, 12, 3)
    result = prune(model, method="random", density=0.1, input_shape=(7,), diagnosed=True)
    assert result.diagnosis.effective <= result.masks
    assert result.diagnosis.sentence() in result.report()
    plain = prune(model, method="random", density=0.1)
    assert plain.diagnosis is None and "paths" not in str(plain)
    with pytest.raises(DataError, match="input_shape"):
        prune(model, method="random", density=0.1, diagnosed=True)


def test_transposed_convolutions_have_their_units_in_the_second_dimension():
    model = nn.Sequential(nn.ConvTranspose2d(2, 5, 2), nn.Flatten(), nn.Linear(5 * 9, 2))
    masks = Masks({"0.weight": torch.ones(2, 5, 2, 2, dtype=torch.bool)})
    cut = masks["0.weight"].clone()
    cut[:, 3] = False
    layer = diagnose(model, Masks({"0.weight": cut}), input_shape=(2, 2, 2)).layers["0.weight"]
    assert (layer.units, layer.dead) == (5, 1)
