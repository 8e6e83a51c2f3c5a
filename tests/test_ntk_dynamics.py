"""Linearised training in closed form against gradient descent itself."""

import pytest
import torch
from torch import nn

from nets import NETS, mlp
from sapwood import Masks, ntk, prunable, prune
from sapwood.errors import ConfigError, DataError


def test_a_linear_model_trains_exactly_as_predicted():
    model, x = nn.Linear(6, 3).double(), torch.randn(5, 6, dtype=torch.float64)
    y = torch.randn(5, 3, dtype=torch.float64)
    before = [p.clone() for p in model.parameters()]
    found = ntk.train_dynamics(model, x, y, steps=40)
    assert found.loss == pytest.approx(found.predicted, rel=1e-9)
    assert max(found.drift) < 1e-12 and min(found.kept_alignment) == 1.0
    assert found.loss[-1] < 0.5 * found.loss[0] and len(found.loss) == 41
    assert found.rate == found.largest_stable_rate / 4
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_real_training_is_plain_sgd():
    model, x = mlp(6, 8, 3).double(), torch.randn(5, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1])
    masks = prune(model, method="random", density=0.5).masks
    found = ntk.train_dynamics(model, x, labels, masks, "*", rate=0.01, steps=10)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(11):
        loss = 0.5 * (model(x) - nn.functional.one_hot(labels, 3)).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name, mask in masks.items():
            model.get_parameter(name).grad.mul_(mask)
        optimizer.step()
    assert found.loss == pytest.approx(losses)


def test_a_wide_network_follows_its_kernel_and_a_narrow_one_does_not():
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    gaps, drifts = [], []
    for width in (16, 1024):
        found = ntk.train_dynamics(mlp(6, width, 2).double(), x, y, parametrization="ntk", steps=60)
        gaps.append(max(abs(a - b) for a, b in zip(found.loss, found.predicted, strict=True)) / found.loss[0])
        drifts.append(found.drift[-1])
    assert gaps[1] < 0.05 < gaps[0] or gaps[1] < 0.2 * gaps[0]
    assert drifts[1] < 0.3 * drifts[0]


@pytest.mark.parametrize(("factor", "grows"), [(0.95, False), (1.05, True)])
def test_two_over_the_largest_eigenvalue_is_the_edge_of_stability(factor, grows):
    model, x = nn.Linear(6, 3).double(), torch.randn(5, 6, dtype=torch.float64)
    stable = ntk.spectrum(ntk.kernel(model, x)).largest_stable_lr
    found = ntk.train_dynamics(model, x, torch.ones(5, 3), rate=factor * stable, steps=200, kernel_steps=[])
    assert (found.loss[-1] > found.loss[0]) == grows
    assert found.kernel_steps == (0,)


def test_masks_and_batchnorm():
    build, shape = NETS["mlp with BatchNorm1d"]
    model, x = build().double(), torch.randn(9, *shape, dtype=torch.float64)
    masks = prune(model, method="random", density=0.5).masks
    labels = torch.arange(9) % 3
    dense = ntk.train_dynamics(model, x, labels, batchnorm="train", steps=20)
    sparse = ntk.train_dynamics(model, x, labels, masks, batchnorm="train", steps=20)
    for found in (dense, sparse):
        assert found.loss[-1] < found.loss[0] and len(found.drift) == len(found.kernel_steps) == 6
        assert found.drift[0] == 0 and found.kept_alignment[0] == 1 and -1 <= min(found.target_alignment) <= 1
    everything = Masks.dense(prunable(model))
    assert ntk.train_dynamics(model, x, labels, everything, batchnorm="train", steps=20).loss == pytest.approx(
        dense.loss
    )


def test_refusals():
    model, x = nn.Linear(6, 3), torch.randn(5, 6)
    with pytest.raises(DataError, match="targets"):
        ntk.train_dynamics(model, x, torch.randn(5, 4))
    with pytest.raises(DataError, match="Class numbers"):
        ntk.train_dynamics(model, x, torch.full((5,), 3))
    with pytest.raises(ConfigError, match="steps"):
        ntk.train_dynamics(model, x, torch.zeros(5, 3), steps=0)
    with pytest.raises(ConfigError, match="kernel_steps"):
        ntk.train_dynamics(model, x, torch.zeros(5, 3), steps=5, kernel_steps=[6])
    with pytest.raises(DataError, match="15 outputs"):
        ntk.linearised(torch.eye(15), torch.zeros(15), torch.zeros(14), 0.1, 1)
