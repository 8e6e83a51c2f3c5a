"""PX and SynFlow-L2 against sums over enumerated paths."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import CLASSES, Residual, TinyViT, labelled, mlp
from sapwood import PX, DataError, FunctionalModel, Masks, SynFlow, SynFlowL2, UnsupportedModelError, prune
from scoring import data, flat, generator, random_masks


class Written(nn.Module):
    """Two layers and a ReLU, written in one of the ways in which people write it."""

    def __init__(self, relu, source: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.relu = source[0], source[2], relu

    def forward(self, x):
        return self.second(self.relu(self.first(x)))


WAYS = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "leaky": nn.LeakyReLU(0.1),
}


def paths_oracle(model, masks, inputs):
    """S for a two-layer network by the definition, one path at a time."""
    first, second = (model[i].weight.detach().double() for i in (0, 2))
    kept = [masks[f"{i}.weight"] for i in (0, 2)]
    bias = model[0].bias.detach().double()
    gates = (inputs.double() @ (first * kept[0]).T + bias > 0).double()
    scores = [torch.zeros_like(w) for w in (first, second)]
    sizes = (range(first.shape[1]), range(first.shape[0]), range(second.shape[0]))
    activated, values = torch.zeros(len(second)).double(), {}
    for i, h, k in itertools.product(*sizes):
        if kept[0][h, i] and kept[1][k, h]:
            activated[k] += (gates[:, h] * inputs[:, i].double() ** 2).sum()
            values[i, h, k] = first[h, i] ** 2 * second[k, h] ** 2
    for (i, h, k), value in values.items():
        scores[0][h, i] += activated[k] * value
        scores[1][k, h] += activated[k] * value
    return torch.cat([score.flatten() for score in scores])


def unbiased(model):
    """A copy with zero biases."""
    model = copy.deepcopy(model)
    for layer in model[::2]:
        nn.init.zeros_(layer.bias)
    return model


@pytest.fixture
def model() -> nn.Module:
    return mlp(4, 6, CLASSES).double()


@pytest.fixture
def batches() -> list:
    return labelled((4,), samples=7, dtype=torch.float64)


class TestPX:
    @pytest.mark.trap(23)
    def test_equals_the_sum_over_paths(self, model, batches):
        net = FunctionalModel.of(model)
        for masks in (Masks.dense(net.weights), random_masks(net)):
            scores = flat(PX()(net, masks, data(batches), generator()))
            torch.testing.assert_close(scores, paths_oracle(model, masks, batches[0][0]), rtol=1e-12, atol=0)

    @pytest.mark.trap(23)
    @pytest.mark.parametrize("way", WAYS)
    def test_sees_rectifiers_however_they_are_written(self, model, batches, way):
        written = Written(WAYS[way], model)
        net = FunctionalModel.of(written)
        masks = random_masks(net)
        scores = flat(PX()(net, masks, data(batches), generator()))
        named = Masks({f"{i}.weight": masks[n] for i, n in zip((0, 2), masks, strict=True)})
        torch.testing.assert_close(scores, paths_oracle(model, named, batches[0][0]), rtol=1e-12, atol=0)

    @pytest.mark.trap(23)
    def test_torch_is_as_it_was_also_after_an_error(self, model, batches):
        relus = F.relu, torch.relu, torch.Tensor.relu

        def fails(x):
            if x.dtype == torch.float64 and len(x) == 1:  # the third of the three passes
                raise RuntimeError("boom")
            return F.relu(x)

        with pytest.raises(UnsupportedModelError, match="boom"):
            prune(Written(fails, model), method="px", density=0.5, batches=batches)
        assert relus == (F.relu, torch.relu, torch.Tensor.relu)
        x = torch.tensor([-1.0, 2.0])
        assert F.relu(x).tolist() == x.relu().tolist() == [0, 2]

    def test_does_not_depend_on_how_samples_are_batched(self, model, batches):
        (inputs, targets), net = batches[0], FunctionalModel.of(model)
        parts = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
        whole, split = (flat(PX()(net, Masks.dense(net.weights), data(b), generator())) for b in (batches, parts))
        torch.testing.assert_close(whole, split)

    def test_is_conserved_and_positive_on_a_convolutional_net(self):
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Flatten(), nn.Linear(32, 4),
        )  # fmt: skip
        net = FunctionalModel.of(model)
        scores = PX()(net, Masks.dense(net.weights), data(labelled((2, 6, 6))), generator())
        sums = torch.stack([score.sum() for score in scores.values()])
        torch.testing.assert_close(sums, sums[:1].expand(3), rtol=1e-12, atol=0)
        assert all((score >= 0).all() for score in scores.values())

    def test_data_matter_once_outputs_have_lost_weights(self, model, batches):
        net = FunctionalModel.of(model)
        (inputs, targets), *_ = batches
        for masks, same in ((Masks.dense(net.weights), True), (random_masks(net), False)):
            one, two = (flat(PX()(net, masks, data([(x, targets)]), generator())) for x in (inputs, inputs.flip(1) + 1))
            l2 = flat(SynFlowL2()(FunctionalModel.of(unbiased(model)), masks, data(input_shape=(4,)), generator()))
            assert torch.allclose(one / one.sum(), two / two.sum()) is same
            assert torch.allclose(one / one.sum(), l2 / l2.sum()) is same

    @pytest.mark.parametrize("build", [TinyViT, lambda: Residual(zero_gamma=False)])
    def test_bits_of_modern_networks(self, build):
        model = build()
        net = FunctionalModel.of(model)
        scores = PX()(net, Masks.dense(net.weights), data(labelled((3, 8, 8))), generator())
        assert all(score.isfinite().all() and (score >= 0).all() and score.any() for score in scores.values())

    def test_needs_inputs_and_no_labels(self, model, batches):
        with pytest.raises(DataError, match="real inputs"):
            prune(model, method="px", density=0.5, input_shape=(4,))
        assert prune(model, method="px", density=0.5, rounds=2, batches=[x for x, _ in batches]).masks.kept == 21

    def test_a_forward_that_depends_on_values_is_refused(self, model, batches):
        big = [(100 * x, y) for x, y in batches]  # squared inputs are above 1000, the weighted ones are not
        fickle = Written(lambda x: x.relu() if (x > 1000).any() else x, model)
        with pytest.raises(UnsupportedModelError, match="synflow-l2"):
            prune(fickle, method="px", density=0.5, batches=big)


class TestSynFlowL2:
    def test_equals_the_sum_of_squares_over_paths(self):
        model = mlp(3, 4, 2, bias=False)
        first, second = (layer.weight.detach().double().square() for layer in (model[0], model[2]))
        net = FunctionalModel.of(model)
        scores = SynFlowL2()(net, Masks.dense(net.weights), data(input_shape=(3,)), generator())
        torch.testing.assert_close(scores["0.weight"], first * second.sum(0)[:, None])
        torch.testing.assert_close(scores["2.weight"], second * first.sum(1)[None])

    def test_is_synflow_of_the_squared_network(self):
        model = Residual(zero_gamma=False)
        model.bn1.running_var.fill_(4.0)
        squared = Residual(zero_gamma=False)
        squared.load_state_dict({n: t.square() if t.is_floating_point() else t for n, t in model.state_dict().items()})
        one, two = FunctionalModel.of(model), FunctionalModel.of(squared)
        seen, dense = data(input_shape=(3, 6, 6)), Masks.dense(one.weights)
        torch.testing.assert_close(
            flat(SynFlowL2()(one, dense, seen, generator())),
            flat(SynFlow()(two, dense, seen, generator())),
            rtol=1e-6,
            atol=0,
        )

    def test_is_px_where_all_outputs_count_the_same(self, batches):
        """One output, no bias: J is one number, and the rankings agree."""
        model = mlp(4, 6, 1, bias=False).double()
        net = FunctionalModel.of(model)
        dense = Masks.dense(net.weights)
        px = flat(PX()(net, dense, data(batches), generator()))
        l2 = flat(SynFlowL2()(net, dense, data(input_shape=(4,)), generator()))
        torch.testing.assert_close(px / px.sum(), l2 / l2.sum())

    def test_a_hundred_rounds_keep_every_layer_alive(self):
        model = mlp(64, 64, 64, 64, 10, bias=False)
        density = 24 / sum(p.numel() for p in model.parameters())
        assert not prune(model, method="synflow-l2", density=density, input_shape=(64,)).collapsed
