"""Criteria made for trained networks, against removals one by one, full Hessians and explicit gates."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import CLASSES, Residual, Sentence, convolutional, labelled, mlp, sentences
from sapwood import (
    ConfigError,
    DataError,
    FunctionalModel,
    Masks,
    OptimalBrainDamage,
    Skeletonization,
    Snip,
    Taylor,
    UnsupportedModelError,
    prune,
)
from sapwood.batches import samples
from scoring import data, flat, generator, random_masks


@pytest.fixture
def smooth() -> nn.Module:
    return mlp(4, 5, CLASSES, activation=nn.Tanh).double()


@pytest.fixture
def batches() -> list:
    return labelled((4,), samples=9, dtype=torch.float64)


def split(batches, *sizes) -> list:
    (inputs, targets), *_ = batches
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    model = copy.deepcopy(model)
    for name, mask in masks.items():
        model.get_parameter(name).data *= mask
    return model


class TestTaylor:
    @pytest.mark.parametrize("structure", ["weights", "channels"])
    def test_equals_removals_one_by_one_to_first_order(self, smooth, batches, structure):
        """Squared change of each batch's mean loss, as its weights shrink by a small share of themselves."""
        net, parts, step = FunctionalModel.of(smooth), split(batches, 4, 5), 1e-5
        for masks in (Masks.dense(net.weights), random_masks(net)):
            scores = Taylor(structure)(net, masks, data(parts), generator())
            model = masked(smooth, masks)
            for name in net.prunable:
                shape = model.get_parameter(name).shape
                for index in itertools.product(*map(range, shape if structure == "weights" else shape[:1])):
                    expected = 0.0
                    for inputs, targets in parts:
                        losses = []
                        for sign in (1, -1):
                            changed = copy.deepcopy(model)
                            changed.get_parameter(name).data[index] *= 1 + sign * step
                            losses.append(F.cross_entropy(changed(inputs), targets).item())
                        expected += ((losses[0] - losses[1]) / (2 * step)) ** 2
                    found = scores[name][index].flatten()
                    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-4, atol=1e-12)

    def test_per_sample_is_per_batch_with_batches_of_one(self, smooth, batches):
        net = FunctionalModel.of(smooth)
        dense = Masks.dense(net.weights)
        singles = list(samples(batches[0]))
        assert len(singles) == 9
        one = flat(Taylor(per="sample")(net, dense, data(batches), generator()))
        torch.testing.assert_close(one, flat(Taylor()(net, dense, data(singles), generator())))
        whole = flat(Taylor()(net, dense, data(batches), generator()))
        assert not torch.allclose(one / one.sum(), whole / whole.sum())

    def test_on_one_batch_it_ranks_like_snip(self, smooth, batches):
        net = FunctionalModel.of(smooth)
        dense = Masks.dense(net.weights)
        snip = flat(Snip()(net, dense, data(batches), generator())) / len(batches[0][0])
        torch.testing.assert_close(flat(Taylor()(net, dense, data(batches), generator())), snip.square())

    @pytest.mark.filterwarnings("ignore::sapwood.SapwoodWarning")  # the classifier's three channels are the least
    def test_channels_of_a_convolutional_net_fall_whole(self):
        model = convolutional(2, nn.BatchNorm2d)
        masks = prune(model, method="taylor", structure="channels", density=0.5, batches=labelled((2, 6, 6))).masks
        assert masks.kept == round(0.5 * masks.total)
        parts = [row for mask in masks.values() for row in mask.flatten(1) if 0 < row.sum() < row.numel()]
        assert len(parts) <= 1


class TestOptimalBrainDamage:
    def oracle(self, model, net, masks, batches) -> torch.Tensor:
        """w^2 h / 2 from the full Hessian over the flattened effective weights."""
        names, effective = list(net.prunable), masks.apply(net.weights)
        sizes = [effective[n].numel() for n in names]

        def loss(vector):
            parts = {n: p.reshape(effective[n].shape) for n, p in zip(names, vector.split(sizes), strict=True)}
            outputs = [(torch.func.functional_call(model, parts, (x,)), y) for x, y in batches]
            return sum(F.cross_entropy(o, y, reduction="sum") for o, y in outputs)

        vector = flat(effective)
        return vector.square() * torch.func.hessian(loss)(vector).diagonal() / 2

    def test_exact_equals_the_full_hessian(self, smooth, batches):
        net, parts = FunctionalModel.of(smooth), split(batches, 4, 5)
        for masks in (Masks.dense(net.weights), random_masks(net)):
            scores = flat(OptimalBrainDamage("exact")(net, masks, data(parts), generator()))
            torch.testing.assert_close(scores, self.oracle(smooth, net, masks, parts), rtol=1e-9, atol=1e-15)

    def test_hutchinson_converges_at_the_rate_of_its_variance(self, smooth, batches):
        net = FunctionalModel.of(smooth)
        dense = Masks.dense(net.weights)
        exact = self.oracle(smooth, net, dense, batches)

        def error(probes: int) -> float:
            runs = [OptimalBrainDamage("hutchinson", probes)(net, dense, data(batches), generator(s)) for s in range(6)]
            return torch.stack([(flat(run) - exact).square() for run in runs]).mean().sqrt().item()

        few, many = error(2), error(64)
        assert few / many == pytest.approx(32**0.5, rel=0.35)
        assert many < 0.3 * exact.abs().max()

    def test_fisher_equals_explicit_gradients_of_every_sample(self, smooth, batches):
        net = FunctionalModel.of(smooth)
        masks = random_masks(net)
        inputs, targets = batches[0]
        effective = masks.apply(net.weights)

        def loss(params, x, y):
            return F.cross_entropy(torch.func.functional_call(smooth, params, (x[None],)), y[None])

        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(effective, inputs, targets)
        expected = {n: effective[n].square() * g.square().sum(0) / 2 for n, g in gradients.items()}
        scores = OptimalBrainDamage("fisher")(net, masks, data(split(batches, 4, 5)), generator())
        torch.testing.assert_close(flat(scores), flat(expected))

    def test_fisher_holds_batchnorm_at_the_statistics_of_the_batch(self):
        model = Residual(zero_gamma=False).double()
        (inputs, targets), *_ = labelled((3, 6, 6), dtype=torch.float64)
        frozen = copy.deepcopy(model)
        for norm in (frozen.bn0, frozen.bn1, frozen.bn2):
            norm.momentum = 1.0
        frozen.train()(inputs)
        frozen.eval()
        net, at_rest = FunctionalModel.of(model), FunctionalModel.of(frozen)
        dense, seen = Masks.dense(net.weights), data([(inputs, targets)])
        one = flat(OptimalBrainDamage()(net, dense, seen, generator()))
        torch.testing.assert_close(
            one, flat(OptimalBrainDamage(batch_statistics=False)(at_rest, dense, seen, generator()))
        )
        assert not torch.allclose(one, flat(OptimalBrainDamage(batch_statistics=False)(net, dense, seen, generator())))

    def test_predicts_what_removal_costs_at_the_minimum_of_a_quadratic(self):
        """LeCun et al.'s premise: no gradient, no interaction; then the saliency is the loss itself."""
        model = nn.Linear(3, 1, bias=False).double()
        model.weight.data = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
        inputs = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        targets = model(inputs).detach()
        net = FunctionalModel.of(model, loss=nn.MSELoss())
        dense = Masks.dense(net.weights)
        for diagonal in ("exact", "hutchinson"):  # no interaction: one probe is exact
            scores = OptimalBrainDamage(diagonal, probes=1)(net, dense, data([(inputs, targets)]), generator())[
                "weight"
            ]
            for j in range(3):
                removed = copy.deepcopy(model)
                removed.weight.data[0, j] = 0
                cost = F.mse_loss(removed(inputs), targets, reduction="sum").item()
                assert scores[0, j].item() == pytest.approx(cost)

    def test_a_loss_without_curvature(self):
        net = FunctionalModel.of(nn.Linear(3, 2), loss=lambda output, _: output.mean())
        batch = [(torch.ones(2, 3), torch.zeros(2))]
        for diagonal in ("exact", "hutchinson"):
            assert not flat(OptimalBrainDamage(diagonal)(net, Masks.dense(net.weights), data(batch), generator())).any()

    def test_exact_refuses_what_is_too_large(self, batches):
        with pytest.raises(UnsupportedModelError, match=r"14,000 prunable.*10,000.*hutchinson"):
            prune(mlp(4, 2000, 3), method="obd", diagonal="exact", density=0.5, batches=batches)

    def test_bad_fields_are_refused(self):
        with pytest.raises(ConfigError, match="Did you mean 'fisher'"):
            OptimalBrainDamage("fischer")
        with pytest.raises(ConfigError, match="probes is 0"):
            OptimalBrainDamage(probes=0)


class Gated(nn.Module):
    """A small network with an attentional gate before each of its layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model[::2])
        self.gates = nn.ParameterList([torch.ones(layer.in_features).double() for layer in self.layers])

    def forward(self, x):
        for i, (layer, gate) in enumerate(zip(self.layers, self.gates, strict=True)):
            x = layer((x if i == 0 else x.tanh()) * gate)
        return x


class TestSkeletonization:
    @pytest.mark.parametrize("error", ["linear", "loss"])
    def test_equals_the_derivative_in_explicit_gates(self, batches, error):
        model = mlp(4, 6, 5, CLASSES, activation=nn.Tanh).double()
        net = FunctionalModel.of(model)
        inputs, targets = batches[0]
        for masks in (Masks.dense(net.weights), random_masks(net)):
            gated = Gated(masked(model, masks))
            outputs = gated(inputs)
            if error == "linear":
                total = (F.one_hot(targets, CLASSES) - outputs.softmax(1)).abs().sum()
            else:
                total = F.cross_entropy(outputs, targets, reduction="sum")
            relevance = [-g for g in torch.autograd.grad(total, list(gated.gates))]
            scores = Skeletonization(error)(net, masks, data(split(batches, 4, 5)), generator())
            for score, expected in zip(scores.values(), relevance, strict=True):
                torch.testing.assert_close(score, expected[None].expand_as(score))

    def test_to_first_order_it_is_the_error_without_the_unit_minus_that_with_it(self, batches):
        model = mlp(4, 6, CLASSES, activation=nn.Tanh).double()
        inputs, targets = batches[0]
        relevance = Skeletonization()(
            net := FunctionalModel.of(model), Masks.dense(net.weights), data(batches), generator()
        )["2.weight"][0]
        share = 1e-6

        def error(net):
            return (F.one_hot(targets, CLASSES) - net(inputs).softmax(1)).abs().sum().item()

        for unit in range(6):
            weaker = copy.deepcopy(model)
            weaker[2].weight.data[:, unit] *= 1 - share
            assert (error(weaker) - error(model)) / share == pytest.approx(relevance[unit].item(), abs=1e-4)

    def test_a_useless_unit_goes_first_and_whole(self, batches):
        model = mlp(4, 6, CLASSES, activation=nn.Tanh).double()
        inputs, _ = batches[0]
        with torch.no_grad():
            model[0].weight[2] = model[0].bias[2] = 0  # its output is zero: no error depends on it
        targets = model(inputs).argmax(1)
        masks = prune(
            model, method="skeletonization", error="loss", density=15 / 18, exclude="0", batches=[(inputs, targets)]
        ).masks["2.weight"]
        whole = [unit for unit in range(6) if not masks[:, unit].any()]
        scores = Skeletonization("loss")(
            net := FunctionalModel.of(model, exclude="0"),
            Masks.dense(net.weights),
            data([(inputs, targets)]),
            generator(),
        )["2.weight"][0]
        assert scores[2] == 0 and whole == [int(scores.argmin())]

    def test_real_targets_and_targets_of_every_position(self, batches):
        model = nn.Linear(4, 2, bias=False).double()
        net = FunctionalModel.of(model)
        inputs = batches[0][0]
        targets = model(inputs).detach() + 1  # every output is 1 too low
        scores = Skeletonization()(net, Masks.dense(net.weights), data([(inputs, targets)]), generator())["weight"]
        expected = (inputs.sum(0) * model.weight.detach()).sum(0)  # dE/do = -1
        torch.testing.assert_close(scores, expected[None].expand(2, -1))
        with pytest.raises(DataError, match=r"\(9, 2\).*\(9, 1\).*error='loss'"):
            Skeletonization()(net, Masks.dense(net.weights), data([(inputs, targets[:, :1])]), generator())
        with pytest.raises(DataError, match="do not fit"):
            Skeletonization()(
                net, Masks.dense(net.weights), data([(inputs, torch.zeros(3, 3, dtype=torch.long))]), generator()
            )

        sentence, (batch, *_) = Sentence(), sentences()
        net = FunctionalModel.of(sentence)
        ignored = {**batch, "labels": torch.full_like(batch["labels"], -100)}
        found = Skeletonization()(net, Masks.dense(net.weights), data([ignored]), generator())
        assert not flat(found).any()
        assert flat(Skeletonization()(net, Masks.dense(net.weights), data([batch]), generator())).any()

    def test_bad_fields_are_refused(self):
        with pytest.raises(ConfigError, match="Legal: linear, loss"):
            Skeletonization("quadratic")


def test_janowskys_rule_removes_the_weakest_bonds():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[3.0, -1.0], [0.5, -2.0]])
    assert prune(model, method="janowsky", density=0.5).masks["weight"].tolist() == [[True, False], [False, True]]
