"""Every criterion against an independent oracle in float64."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import CLASSES, Residual, TinyViT, labelled, mlp
from sapwood import FunctionalModel, Grasp, Magnitude, Masks, NtkSap, Random, SapwoodWarning, Snip, SynFlow, prune
from sapwood.criteria.ntk_sap import mask_gradient, output_change
from sapwood.errors import DataError, ScoreError, UnsupportedModelError
from sapwood.fresh import fresh_parameters
from scoring import data, flat, generator, random_masks


@pytest.fixture
def smooth() -> nn.Module:
    return mlp(4, 5, CLASSES, activation=nn.Tanh).double()


@pytest.fixture
def batches() -> list:
    return labelled((4,), samples=9, dtype=torch.float64)


class TestMagnitudeAndRandom:
    def test_magnitude_by_hand(self):
        model = nn.Linear(2, 2, bias=False)
        model.weight.data = torch.tensor([[3.0, -1.0], [0.5, -2.0]])
        assert prune(model, method="magnitude", density=0.5).masks["weight"].tolist() == [[True, False], [False, True]]

    def test_random_is_uniform_over_weights(self):
        model = mlp(40, 60, CLASSES)
        densities = [c.density for c in prune(model, method="random", density=0.3).masks.per_layer().values()]
        assert densities[0] == pytest.approx(0.3, abs=0.05)

    def test_both_are_pure(self, smooth):
        net = FunctionalModel.of(smooth)
        masks = Masks.dense(net.weights)
        for criterion in (Magnitude(), Random()):
            first, second = (flat(criterion(net, masks, data(), generator(5))) for _ in range(2))
            assert torch.equal(first, second)


class TestSnip:
    def test_equals_deleting_weights_one_by_one_to_first_order(self, smooth, batches):
        """d loss / d (share of weight j removed), by central differences on the model itself."""
        scores = Snip()(net := FunctionalModel.of(smooth), Masks.dense(net.weights), data(batches), generator())
        (inputs, targets), step = batches[0], 1e-5
        for name in net.prunable:
            weight = smooth.get_parameter(name)
            for index in itertools.product(*map(range, weight.shape)):
                losses = []
                for sign in (1, -1):
                    changed = copy.deepcopy(smooth)
                    changed.get_parameter(name).data[index] *= 1 + sign * step
                    losses.append(F.cross_entropy(changed(inputs), targets, reduction="sum").item())
                expected = abs(losses[0] - losses[1]) / (2 * step)
                assert scores[name][index].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)

    @pytest.mark.trap(10)
    def test_does_not_depend_on_how_samples_are_batched(self, smooth, batches):
        (inputs, targets), net = batches[0], FunctionalModel.of(smooth)
        parts = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
        whole, split = (flat(Snip()(net, Masks.dense(net.weights), data(b), generator())) for b in (batches, parts))
        torch.testing.assert_close(whole, split)

    @pytest.mark.trap(11)
    def test_closed_form_under_a_mask(self):
        """Two linear units, squared loss: at m = 0 the mask gradient is 0, but w*g is not; FORCE needs the latter."""
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        a, b, x, y = 0.7, -1.3, 2.0, 0.5
        model[0].weight.data.fill_(a)
        model[1].weight.data.fill_(b)
        net = FunctionalModel.of(model, loss=lambda output, target: (output - target).square().mean())
        batch = [(torch.tensor([[x]], dtype=torch.float64), torch.tensor([[y]], dtype=torch.float64))]
        dense = Masks.dense(net.weights)
        slope = 2 * (b * a * x - y)
        scores = Snip()(net, dense, data(batch), generator())
        assert scores["0.weight"].item() == pytest.approx(abs(a * slope * b * x))
        assert scores["1.weight"].item() == pytest.approx(abs(b * slope * a * x))
        pruned = Masks({"0.weight": dense["0.weight"], "1.weight": ~dense["1.weight"]})
        scores = Snip()(net, pruned, data(batch), generator())
        assert scores["0.weight"].item() == 0  # nothing passes the pruned layer
        assert scores["1.weight"].item() == pytest.approx(abs(b * -2 * y * a * x))  # the slope without it

    @pytest.mark.trap(12)
    def test_scores_the_weights_that_will_be_trained(self, smooth, batches):
        before = flat(Snip()(net := FunctionalModel.of(smooth), Masks.dense(net.weights), data(batches), generator()))
        smooth[0].weight.data *= 2
        after = flat(Snip()(net := FunctionalModel.of(smooth), Masks.dense(net.weights), data(batches), generator()))
        assert not torch.allclose(before, after)

    def test_needs_targets(self, smooth):
        with pytest.raises(DataError, match="labelled data"):
            prune(smooth, method="snip", density=0.5, input_shape=(4,))
        with pytest.raises(DataError, match="needs targets"):
            prune(smooth, method="snip", density=0.5, batches=[torch.zeros(2, 4)])


class TestForce:
    @pytest.mark.trap(16)
    def test_force_revives_and_iterative_snip_never_does(self, batches):
        model = mlp(4, 16, 16, CLASSES)
        seen: dict[str, list[Masks]] = {"force": [], "iter-snip": []}
        for method, masks in seen.items():
            prune(
                model,
                method=method,
                density=0.1,
                rounds=10,
                batches=batches,
                on_round=lambda _, m, to=masks: to.append(m),
            )
        assert all(later <= earlier for earlier, later in itertools.pairwise(seen["iter-snip"]))
        assert any(not later <= earlier for earlier, later in itertools.pairwise(seen["force"]))

    @pytest.mark.trap(16)
    def test_every_batch_counts_in_every_round(self, smooth, batches):
        """A one-shot iterator serves all rounds, and leaving out its second batch changes the scores."""
        other = labelled((4,), samples=30, dtype=torch.float64)
        both = prune(smooth, method="force", density=0.5, rounds=3, batches=iter([*batches, *other])).masks
        again = prune(smooth, method="force", density=0.5, rounds=3, batches=[*batches, *other]).masks
        assert both == again
        net = FunctionalModel.of(smooth)
        one, two = (
            flat(Snip()(net, Masks.dense(net.weights), data(b), generator())) for b in (batches, [*batches, *other])
        )
        assert not torch.allclose(one, two)


class TestGrasp:
    def oracle(
        self, model: nn.Module, net: FunctionalModel, masks: Masks, batches: list, temperature: float
    ) -> torch.Tensor:
        """w * (H g) from the full Hessian over the flattened effective weights."""
        names, effective = list(net.prunable), masks.apply(net.weights)
        sizes = [effective[n].numel() for n in names]

        def loss(vector: torch.Tensor) -> torch.Tensor:
            parts = {n: p.reshape(effective[n].shape) for n, p in zip(names, vector.split(sizes), strict=True)}
            outputs = [(torch.func.functional_call(model, parts, (x,)), y) for x, y in batches]
            return sum(F.cross_entropy(o / temperature, y, reduction="sum") for o, y in outputs)

        vector = torch.cat([effective[n].flatten() for n in names])
        return vector * (torch.func.hessian(loss)(vector) @ torch.func.grad(loss)(vector))

    @pytest.mark.trap(14)
    @pytest.mark.parametrize("temperature", [1.0, 200.0])
    def test_equals_the_full_hessian(self, smooth, batches, temperature):
        net = FunctionalModel.of(smooth)
        split = [(batches[0][0][:4], batches[0][1][:4]), (batches[0][0][4:], batches[0][1][4:])]
        for masks in (Masks.dense(net.weights), random_masks(net)):
            scores = Grasp(temperature)(net, masks, data(split), generator())
            torch.testing.assert_close(
                flat(scores), self.oracle(smooth, net, masks, split, temperature), rtol=1e-9, atol=0
            )

    @pytest.mark.trap(13)
    def test_sign_on_a_quadratic(self):
        """Pruning the lowest scores raises g'g by the first-order prediction, -score, the most."""
        model = nn.Linear(3, 1, bias=False).double()
        model.weight.data = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
        curvature = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
        inputs = torch.eye(3, dtype=torch.float64)

        def loss(output, _):  # 1/2 sum_j c_j (w_j - 1)^2, divided by the batch size
            return (curvature.flatten() * (output.flatten() - 1).square()).sum() / 2 / 3

        net = FunctionalModel.of(model, loss=loss)
        scores = Grasp(temperature=1.0)(net, Masks.dense(net.weights), data([(inputs, inputs)]), generator())["weight"]
        weight = model.weight.detach()
        torch.testing.assert_close(scores, weight * curvature * curvature * (weight - 1))
        step = 1e-6

        def flow(w):
            return (curvature * (w - 1)).square().sum() / 2

        for j in range(3):
            removed = weight.clone()
            removed[0, j] *= 1 - step
            assert ((flow(removed) - flow(weight)) / step).item() == pytest.approx(-scores[0, j].item(), abs=1e-4)


class TestSynFlow:
    @pytest.mark.trap(4)
    def test_conservation_whatever_mode_the_model_is_in(self):
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False), nn.ReLU(),
            nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
            nn.Flatten(), nn.Linear(32, 4, bias=False),
        )  # fmt: skip
        for mode in (True, False):
            model.train(mode)
            net = FunctionalModel.of(model)
            scores = SynFlow()(net, Masks.dense(net.weights), data(input_shape=(2, 6, 6)), generator())
            sums = torch.stack([score.sum() for score in scores.values()])
            torch.testing.assert_close(sums, sums[:1].expand(3), rtol=1e-12, atol=0)
            assert model.training is mode

    def test_equals_the_sum_over_paths(self):
        model = mlp(3, 4, 2, bias=False)
        first, second = (layer.weight.detach().double().abs() for layer in (model[0], model[2]))
        scores = SynFlow()(
            net := FunctionalModel.of(model), Masks.dense(net.weights), data(input_shape=(3,)), generator()
        )
        torch.testing.assert_close(scores["0.weight"], first * second.sum(0)[:, None])
        torch.testing.assert_close(scores["2.weight"], second * first.sum(1)[None])

    @pytest.mark.trap(5)
    def test_finite_at_depth_100_where_float32_is_not(self):
        model = mlp(*[256] * 101, bias=False)
        for layer in model[::2]:
            nn.init.normal_(layer.weight)
        net = FunctionalModel.of(model)
        masks = Masks.dense(net.weights)
        scores = SynFlow()(net, masks, data(input_shape=(256,)), generator())
        assert all(
            score.dtype == torch.float64 and score.isfinite().all() and (score > 0).all() for score in scores.values()
        )
        assert scores["0.weight"].sum() > torch.finfo(torch.float32).max
        assert all(p.dtype == torch.float32 for p in model.parameters())

    @pytest.mark.trap(6)
    def test_a_hundred_rounds_keep_every_layer_alive_at_maximal_compression(self):
        model = mlp(64, 64, 64, 64, 10, bias=False)
        density = 16 / sum(p.numel() for p in model.parameters())
        assert not prune(model, method="synflow", density=density, input_shape=(64,)).collapsed
        with pytest.warns(SapwoodWarning, match="keep no weight"):
            assert prune(model, method="synflow", density=density, rounds=1, input_shape=(64,)).collapsed

    @pytest.mark.trap(8)
    def test_zero_initialised_branches_are_scored_as_open(self):
        model = Residual(zero_gamma=True)
        with pytest.warns(SapwoodWarning, match=r"bn2\.weight"):
            net = FunctionalModel.of(model)
        opened = SynFlow()(net, Masks.dense(net.weights), data(input_shape=(3, 6, 6)), generator())
        net = FunctionalModel.of(model, zero_init="keep")
        closed = SynFlow()(net, Masks.dense(net.weights), data(input_shape=(3, 6, 6)), generator())
        assert closed["conv1.weight"].sum() == closed["conv2.weight"].sum() == 0
        assert (opened["conv1.weight"] > 0).all() and (opened["conv2.weight"] > 0).all()
        with pytest.warns(SapwoodWarning):
            assert not prune(model, method="synflow", density=0.1, input_shape=(3, 6, 6)).collapsed

    @pytest.mark.trap(9)
    def test_flow_through_gelu_layernorm_and_attention_is_positive(self):
        net = FunctionalModel.of(TinyViT())
        scores = SynFlow()(net, Masks.dense(net.weights), data(input_shape=(3, 8, 8)), generator())
        assert all(score.isfinite().all() and (score > 0).all() for score in scores.values())


class TestNtkSap:
    def fixed(self, model: nn.Module, shape=(4,), samples: int = 6):
        net = FunctionalModel.of(model)
        params = fresh_parameters(net, generator(1))
        batch = torch.randn(samples, *shape, generator=generator(2), dtype=torch.float64)
        noise = {
            n: 1e-2 * torch.randn(params[n].shape, generator=generator(4), dtype=torch.float64) for n in net.prunable
        }
        return net, params, batch, noise

    @pytest.mark.trap(21)
    def test_objective_tends_to_the_jacobian_norm(self, smooth):
        """Over an orthonormal basis of perturbations, objective / epsilon sums to ||J||_F^2 in the limit."""
        net, params, batch, _ = self.fixed(smooth)
        jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(smooth, {**params, **w}, (batch,)))(
            {n: params[n] for n in net.prunable}
        )
        exact = sum(block.square().sum() for block in jacobian.values()).item()
        ones = {n: torch.ones_like(params[n]) for n in net.prunable}

        def measured(epsilon: float) -> float:
            total = 0.0
            for name in net.prunable:
                for j in range(params[name].numel()):
                    noise = {n: torch.zeros_like(params[n]) for n in net.prunable}
                    noise[name].view(-1)[j] = epsilon**0.5
                    total += output_change(net, ones, params, noise, batch, net.buffers).item() / epsilon
            return total

        errors = [abs(measured(epsilon) / exact - 1) for epsilon in (1e-4, 1e-8)]
        assert errors[0] < 0.02 and errors[1] < 1e-4 and errors[1] < errors[0]

    def test_mask_gradient_against_central_differences(self, smooth):
        net, params, batch, noise = self.fixed(smooth)
        masks = random_masks(net)
        gradient = mask_gradient(net, masks, params, noise, batch)
        for name in net.prunable:
            for j in range(params[name].numel()):
                values = []
                for step in (1e-5, -1e-5):
                    moved = {n: masks[n].double() for n in net.prunable}
                    moved[name].view(-1)[j] += step
                    values.append(output_change(net, moved, params, noise, batch, net.buffers).item())
                assert gradient[name].view(-1)[j].item() == pytest.approx(
                    (values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-9
                )

    @pytest.mark.trap(22)
    def test_smooth_net_reaches_the_exact_directional_derivative(self, smooth):
        """As epsilon goes to 0 gradient / epsilon is that of || J dw ||^2 by forward-mode autodiff."""
        net, params, batch, noise = self.fixed(smooth)
        direction = {n: noise[n] / 1e-2 for n in noise}

        def exact(masks):
            def outputs(weights):
                return torch.func.functional_call(
                    smooth, {**params, **{n: weights[n] * masks[n] for n in masks}}, (batch,)
                )

            return torch.func.jvp(outputs, ({n: params[n] for n in masks},), (direction,))[1].square().sum()

        ones = {n: torch.ones_like(params[n]) for n in net.prunable}
        limit = flat(torch.func.grad(exact)(ones))
        correlations = []
        for sd in (1e-2, 1e-4):
            gradient = flat(
                mask_gradient(net, Masks.dense(net.weights), params, {n: sd * d for n, d in direction.items()}, batch)
            )
            correlations.append(torch.corrcoef(torch.stack([gradient, limit]))[0, 1].item())
        assert correlations[0] > 0.99 and correlations[1] > 0.999999

    @pytest.mark.trap(18)
    def test_does_not_depend_on_the_mode_or_statistics_that_come_in(self):
        model = Residual(zero_gamma=False)
        first = prune(model, density=0.2, input_shape=(3, 6, 6), rounds=2).masks
        model.eval()
        model.bn0.running_mean.fill_(3.0)
        assert prune(model, density=0.2, input_shape=(3, 6, 6), rounds=2).masks == first

    @pytest.mark.trap(20)
    def test_fresh_draws_reach_parametrized_weights(self):
        model = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)).double().eval()
        net = FunctionalModel.of(model)
        assert net.prunable == ("parametrizations.weight.original",)
        inputs = torch.randn(3, 6, dtype=torch.float64)
        one, two = (net.outputs(fresh_parameters(net, generator(seed)), inputs) for seed in (1, 2))
        assert not torch.allclose(one, two)

    def test_fresh_weights_have_the_kaiming_variance(self):
        model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ConvTranspose2d(16, 32, 3), nn.LSTM(50, 20))
        net = FunctionalModel.of(model)
        drawn = fresh_parameters(net, generator())
        for name, fan_in in {"0.weight": 72, "1.weight": 144, "2.weight_ih_l0": 50, "2.weight_hh_l0": 20}.items():
            assert drawn[name].var().item() == pytest.approx(2 / fan_in, rel=0.15)
        assert torch.equal(drawn["0.bias"], model[0].bias)

    @pytest.mark.trap(21)
    def test_the_estimate_settles_as_draws_grow(self, smooth):
        net = FunctionalModel.of(smooth)
        masks = Masks.dense(net.weights)

        def spread(resamples: int) -> float:
            criterion = NtkSap(resamples=resamples, samples=8)
            runs = torch.stack([flat(criterion(net, masks, data(input_shape=(4,)), generator(s))) for s in range(12)])
            return (runs / resamples).std(0).mean().item()

        assert spread(32) < 0.5 * spread(2)

    def test_ablations_change_what_they_say(self, smooth, batches):
        net = FunctionalModel.of(smooth)
        masks, seen = Masks.dense(net.weights), data(batches)

        def score(seed: int, **fields) -> torch.Tensor:
            return flat(NtkSap(resamples=1, **fields)(net, masks, seen, generator(seed)))

        assert not torch.allclose(score(0), score(0, fresh_weights=False))
        assert not torch.allclose(score(0), score(0, random_inputs=False))
        assert not torch.allclose(score(0, samples=9), score(0, samples=9, batch_size=1))
        frozen = NtkSap(resamples=1, fresh_weights=False, random_inputs=False, epsilon=1e-12)
        one, two = (flat(frozen(net, masks, seen, generator(s))) for s in (0, 1))
        assert not torch.equal(one, two)  # the perturbation is still random

    def test_works_from_the_inputs_of_batches(self, batches):
        model = mlp(4, 8, CLASSES)
        assert prune(model, density=0.5, batches=[x for x, _ in batches], rounds=2).masks.kept == 28
        with pytest.raises(DataError, match="input's shape"):
            prune(model, density=0.5)
        with pytest.raises(DataError, match="real inputs"):
            prune(model, density=0.5, input_shape=(4,), random_inputs=False)

    def test_a_batch_of_one_is_refused_clearly_where_batchnorm_cannot_take_it(self):
        with pytest.raises(UnsupportedModelError, match="more than 1 value per channel"):
            prune(mlp(7, 5, 3, norm=nn.BatchNorm1d), density=0.5, input_shape=(7,), batch_size=1)


@pytest.mark.trap(34)
def test_infinite_scores_name_the_layer_and_the_criterion():
    model = mlp(*[512] * 120, bias=False)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=2.0)
    with pytest.raises(ScoreError, match=r"SynFlow.*'0\.weight'"):
        prune(model, method="synflow", density=0.5, input_shape=(512,), rounds=1)
