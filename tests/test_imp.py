"""Pruning after training with one's own loop."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sapwood
from nets import Residual, labelled, mlp
from sapwood import ConfigError, MaskError, Masks, attach, imp, prune
from sapwood.methods.imp import level_densities

X, Y = labelled((4,), samples=24)[0]


def trainer(steps=5, lr=0.1, seen=None):
    def train(model, masks):
        if seen is not None:
            seen.append((copy.deepcopy(model), masks))
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        with attach(masks, model, optimizer):
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(model(X), Y).backward()
                optimizer.step()

    return train


@pytest.fixture
def model():
    return mlp(4, 12, 3)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class TestLevels:
    def test_densities(self):
        assert level_densities(0.8**3, 0.2) == [0.8, 0.64, 0.8**3]
        assert level_densities(0.1, 0.2)[-3:] == [round(0.8**9, 12), round(0.8**10, 12), 0.1]
        assert level_densities(0.1, None) == [0.1] and level_densities(1.0, 0.2) == [1.0]
        assert level_densities(0.9, 0.2) == [0.9]
        with pytest.raises(ConfigError, match=r"rate is 1\.5"):
            level_densities(0.1, 1.5)

    def test_by_hand(self, model):
        """Two levels of magnitude pruning with weight rewinding, written out."""
        result = imp(model, train=trainer(), density=0.25, levels=2)
        by_hand, initial = copy.deepcopy(model), weights(model)
        masks = Masks.dense(sapwood.prunable(model))
        for kept in (42, 21):
            trainer()(by_hand, masks)
            scores = torch.cat([(p.abs() * masks[n]).flatten() for n, p in by_hand.named_parameters() if n in masks])
            threshold = scores.sort(descending=True).values[kept - 1]
            masks = Masks({n: (p.abs() >= threshold) & masks[n] for n, p in by_hand.named_parameters() if n in masks})
            by_hand.load_state_dict(masks.apply(initial))
        assert result.masks == masks and equal(result.params, weights(by_hand))
        assert [r.kept for r in result.history] == [42, 21]

    def test_weights_at_each_level_equal_the_masked_rewind_weights(self, model):
        seen, initial = [], weights(model)
        result = imp(model, train=trainer(seen=seen), density=0.2, levels=3, min_per_layer=3)
        assert len(seen) == 3
        for at_level, masks in seen:
            assert equal(weights(at_level), masks.apply(initial))
        assert equal(result.params, result.masks.apply(initial))
        levels = [masks for _, masks in seen] + [result.masks]
        assert levels[0].density == 1 and all(b <= a for a, b in itertools.pairwise(levels))

    def test_rewinding_to_a_later_point(self, model):
        seen = []
        result = imp(
            model,
            train=trainer(seen=seen),
            until_rewind=lambda m: trainer(2)(m, Masks.dense(sapwood.prunable(m))),
            density=0.5,
            levels=2,
        )
        early = copy.deepcopy(model)
        trainer(2)(early, Masks.dense(sapwood.prunable(model)))
        assert equal(weights(seen[0][0]), weights(early))
        assert equal(result.params, result.masks.apply(weights(early)))

    def test_without_rewinding_weights_stay_as_trained(self, model):
        seen = []
        result = imp(model, train=trainer(seen=seen), density=0.5, levels=2, rewind=False)
        first = copy.deepcopy(model)
        trainer()(first, seen[0][1])
        assert equal(weights(seen[1][0]), seen[1][1].apply(weights(first)))
        trainer()(first := seen[1][0], seen[1][1])
        assert equal(result.params, result.masks.apply(weights(first)))

    def test_twenty_percent_a_level_unless_said(self, model):
        result = imp(model, train=trainer(1), sparsity=0.5)
        assert [r.density for r in result.history] == [0.8, 0.64, 0.512, 0.5]


def test_new_weights_of_a_method_are_trained_on_unless_rewound(model):
    seen = []
    options = {"method": "obs", "density": 0.5, "levels": 2, "batches": [(X, Y)]}
    result = imp(model, train=trainer(seen=seen), rewind=False, **options)
    first = copy.deepcopy(model)
    trainer()(first, seen[0][1])
    obs = prune(first, method="obs", density=0.5**0.5, batches=[(X, Y)])
    assert seen[1][1] == obs.masks
    assert torch.equal(seen[1][0][0].weight, obs.params["0.weight"])
    rewound = imp(model, train=trainer(), **options)
    assert equal(rewound.params, rewound.masks.apply(weights(model))) and result.masks.kept == 42


def test_the_model_is_left_alone_and_the_result_goes_into_it():
    model = Residual(zero_gamma=False)
    before = copy.deepcopy(model.state_dict())

    def train(net, masks):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with attach(masks, net, optimizer):
            net(torch.randn(4, 3, 6, 6)).square().sum().backward()
            optimizer.step()

    result = imp(model, train=train, density=0.3, levels=1, rewind=False, exclude=model.fc)
    assert equal(before, model.state_dict()) and "fc.weight" not in result.masks
    assert not torch.equal(result.params["bn0.running_mean"], before["bn0.running_mean"])
    result.load_into(model)
    assert torch.equal(model.bn0.running_mean, result.params["bn0.running_mean"])
    sapwood.assert_masked(model, result.masks)


def test_a_training_that_revives_weights_is_refused(model):
    def careless(net, masks):
        with torch.no_grad():
            net[0].weight.add_(1.0)

    with pytest.raises(MaskError, match="not zero"):
        imp(model, train=careless, density=0.2, levels=2, min_per_layer=3)


@pytest.mark.parametrize(
    ("options", "said"), [({"levels": 0}, "levels is 0"), ({"method": "magnitde"}, "Did you mean 'magnitude'")]
)
def test_refuses(model, options, said):
    with pytest.raises(ConfigError, match=said):
        imp(model, train=trainer(1), density=0.5, **options)


@pytest.mark.parametrize("name", ["imp", "magnitude-after", "lr-rewinding"])
def test_prune_says_who_does_it(name):
    with pytest.raises(ConfigError, match=r"call sapwood\.imp"):
        prune(nn.Linear(3, 3), method=name, density=0.5)
