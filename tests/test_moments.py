"""Moment rules against brute force in float64: see `moments_oracle`.

Tolerances are relative, of moments averaged over channels and positions. They cover the closed form's approximations on
networks of 16 to 32 channels (terms of relative order 1 / width) and the noise of a thousand draws.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sapwood
from moments_oracle import Draws, moments, of
from sapwood import Data, FunctionalModel, Masks, NtkSapAnalytic, SapwoodWarning, UnsupportedModelError, prune
from sapwood.criteria.ntk_sap import mask_gradient
from sapwood.criteria.ntk_sap_analytic import constants, weights
from sapwood.fresh import fresh_parameters
from sapwood.moments import RULES, Moments, Side, propagate, rule, traced
from sapwood.moments.smooth import Smooth
from sapwood.moments.softmax import softmax_moments


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, **({"bias": False, "padding": 1} | options))


def normed(*layers):
    return nn.Sequential(conv(4, 16), nn.BatchNorm2d(16), *layers)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(4, 16), conv(16, 16), conv(16, 8)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])

    def forward(self, x):
        x = F.relu(self.norms[0](self.a(x)), inplace=True)
        return self.c(F.relu(self.norms[1](self.b(x)) + x))


class Dense(nn.Module):
    """Concatenation along channels, then a max-pool."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(4, 16), conv(16, 16), conv(32, 8)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])

    def forward(self, x):
        x = F.relu(self.norms[0](self.a(x)))
        x = torch.cat([x, F.relu(self.norms[1](self.b(x)))], 1)
        return self.c(F.max_pool2d(x, 2))


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(12, 32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.token = nn.Parameter(0.5 * torch.randn(1, 1, 32))
        self.head = nn.Linear(32, 6)

    def forward(self, x):
        x = self.embed(x)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        y = self.norm(x)
        return self.head(x + self.attention(y, y, y, need_weights=False)[0])


def plain(activation):
    return nn.Sequential(nn.Linear(24, 32), activation, nn.Linear(32, 32), activation, nn.Linear(32, 6))


FLATTENED = nn.Sequential(*normed(nn.ReLU()), nn.Flatten(), nn.Linear(16 * 25, 6))
NETS = {  # network, shape of a sample, inputs a draw, tolerance
    "linear": (lambda: plain(nn.ReLU()), (24,), 8, 0.08),
    "leaky": (lambda: plain(nn.LeakyReLU(0.3)), (24,), 8, 0.08),
    "gelu": (lambda: plain(nn.GELU()), (24,), 8, 0.1),
    "silu": (lambda: plain(nn.SiLU()), (24,), 8, 0.1),
    "clipped": (lambda: plain(nn.ReLU6()), (24,), 8, 0.1),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 6)), (6, 8), 8, 0.1,
    ),
    "rms norm": (lambda: nn.Sequential(nn.Linear(8, 32), nn.RMSNorm(32), nn.ReLU(), nn.Linear(32, 6)), (8,), 8, 0.1),
    "group norm": (
        lambda: nn.Sequential(conv(4, 16), nn.GroupNorm(4, 16), nn.ReLU(), conv(16, 6)), (4, 6, 6), 4, 0.08,
    ),
    "instance norm": (
        lambda: nn.Sequential(conv(4, 16), nn.InstanceNorm2d(16), nn.ReLU(), conv(16, 6)), (4, 6, 6), 4, 0.08,
    ),
    "no norm": (lambda: nn.Sequential(conv(4, 16, bias=True), nn.ReLU(), conv(16, 6)), (4, 7, 7), 4, 0.12),
    "groups, stride": (lambda: normed(nn.ReLU(), conv(16, 6, groups=2, stride=2)), (4, 7, 7), 8, 0.06),
    "depthwise": (lambda: normed(nn.ReLU(), conv(16, 16, groups=16)), (4, 5, 5), 8, 0.06),
    "conv1d, dilation": (
        lambda: nn.Sequential(nn.Conv1d(4, 16, 3, padding=2, dilation=2), nn.BatchNorm1d(16), nn.ReLU(),
                              nn.Conv1d(16, 6, 3, padding="same")), (4, 9), 16, 0.08,
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 6, 2)),
        (2, 3, 3, 3), 8, 0.08,
    ),
    "residual": (Residual, (4, 6, 6), 8, 0.1),
    "concatenation": (Dense, (4, 6, 6), 8, 0.08),
    "max-pool": (lambda: normed(nn.ReLU(), nn.MaxPool2d(2), conv(16, 6)), (4, 8, 8), 8, 0.06),
    "max-pool before relu": (lambda: normed(nn.MaxPool2d(2), nn.ReLU(), conv(16, 6)), (4, 8, 8), 8, 0.12),
    "max-pool, overlapping": (lambda: normed(nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv(16, 6)), (4, 8, 8), 8, 0.1),
    "deep": (
        lambda: normed(nn.ReLU(), *(layer for _ in range(3) for layer in (conv(16, 16), nn.BatchNorm2d(16), nn.ReLU())),
                       conv(16, 6)), (4, 6, 6), 16, 0.08,
    ),
    "average pool": (lambda: normed(nn.ReLU(), nn.AvgPool2d(2), conv(16, 6)), (4, 8, 8), 8, 0.06),
    "global pool": (
        lambda: normed(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6)), (4, 6, 6), 16, 0.08,
    ),
    "flattened map": (lambda: FLATTENED, (4, 5, 5), 16, 0.08),
    "attention": (Attentive, (9, 12), 4, 0.15),
}  # fmt: skip


def prepared(build, density: float = 0.75):
    model = build().double()
    net = FunctionalModel.of(model)
    generator = torch.Generator().manual_seed(3)
    masks = Masks({n: torch.rand(w.shape, generator=generator) < density for n, w in net.weights.items()})
    return model, net, masks


@pytest.mark.parametrize("name", NETS)
def test_moments_of_the_output_and_scores(name):
    build, shape, batch, tolerance = NETS[name]
    model, net, masks = prepared(build)
    draws = Draws(model, shape, masks, draws=200 if len(shape) > 2 else 500, batch=batch)
    leaves = {n: mask.double() for n, mask in masks.items()}
    output = propagate(traced(net, shape), weights(net, leaves, 0.0), constants(net))
    found, expected = of(output), moments(*draws.values(), output.channels[0])
    scale = expected["raw"].mean()
    for moment, estimate in expected.items():
        if moment == "mean" or (moment == "pair" and len(shape) == 2):
            continue  # noisy; attention correlates a sample's own tokens only
        floor = scale if moment == "pair" else estimate.mean()
        error = (found[moment].mean() - estimate.mean()).abs() / floor
        assert error < max(tolerance, 0.2 if moment == "to" else 0), (moment, error)
    scores = NtkSapAnalytic(epsilon=0).gradient(net, masks, Data((), shape))
    for layer, drawn in draws.gradients().items():
        closed = (scores[layer] * masks[layer]).flatten()
        if closed.abs().sum() < 0.2 * output.td.expand(output.shape).sum():
            continue  # a norm of the sample follows: F hardly depends on the layer, by terms of order 1 / width
        slope = (drawn.flatten(1) @ closed) / closed.square().sum()
        assert slope.mean().item() == pytest.approx(1, abs=2 * tolerance + 4 * slope.std().item() / len(slope) ** 0.5)


@pytest.mark.parametrize("keys", [4, 197])
@pytest.mark.parametrize("variance", [0.1, 4.0])
def test_softmax_moments(keys, variance):
    logits = variance**0.5 * torch.randn(3000, keys, dtype=torch.float64)
    changes, p = torch.randn(3000, keys, dtype=torch.float64), logits.softmax(1)
    change = p * (changes - (p * changes).sum(1, keepdim=True))
    found = softmax_moments(torch.tensor([variance]), keys)
    assert found.focus.item() == pytest.approx(p.square().sum(1).mean().item(), rel=0.05)
    assert found.response.item() == pytest.approx(change.square().sum(1).mean().item(), rel=0.1)


@pytest.mark.parametrize("mean", ["none", "bias", "everywhere"])
@pytest.mark.parametrize("function", [F.gelu, torch.tanh])
def test_smooth_activations_between_a_few_points_of_a_channel(function, mean):
    """Values and derivatives by the variance, against quadrature; means within a channel differ by two deviations."""
    shape, generator = torch.Size((1, 3, 6, 6)), torch.Generator().manual_seed(0)
    variances = (0.4 + torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    means = torch.randn(shape, generator=generator, dtype=torch.float64) / 3
    means = {"none": None, "bias": means[..., :1, :1].expand(shape), "everywhere": means}[mean]
    side = Side(variances if means is None else variances + means.square(), means)
    found = Smooth(function).at(Moments(shape, (1,), side, side), side).passed
    expected = Smooth(function).moments(means, variances.sqrt())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=3e-3)
        slopes = (torch.autograd.grad(t.sum(), variances, retain_graph=True)[0] for t in (one, other))
        torch.testing.assert_close(*slopes, rtol=2e-2, atol=2e-2)


class TestClosedForms:
    def test_of_a_linear_relu_network_the_score_is_synflow_with_squared_weights(self):
        """F = (sum of fan-in / 2) Q with Q the output's second moment, so scores are a constant times dQ/dm."""
        _, net, masks = prepared(lambda: nn.Sequential(
            nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)
        ))  # fmt: skip
        scores = NtkSapAnalytic(epsilon=0).expected(net, masks, Data((), (6,)))
        leaves = [masks[n].double().requires_grad_() for n in net.prunable]
        flow = torch.ones(6, dtype=torch.float64)
        for index, (leaf, fan_in) in enumerate(zip(leaves, (6, 9, 7), strict=True)):
            flow = (leaf.square() * 2 / fan_in) @ flow / (2 if index < 2 else 1)
        for name, expected in zip(net.prunable, torch.autograd.grad(flow.sum(), leaves), strict=True):
            torch.testing.assert_close(scores[name], expected * (6 + 9 + 7) / 2)

    def test_the_first_layer_of_a_one_layer_network(self):
        """F = sum m^2: every kept weight scores 2, at any epsilon."""
        net = FunctionalModel.of(nn.Linear(5, 3).double())
        masks = Masks({"weight": torch.tensor([[True] * 4 + [False]] * 3)})
        for epsilon in (0, 1e-4, 0.1):
            scores = NtkSapAnalytic(epsilon=epsilon).expected(net, masks, Data((), (5,)))["weight"]
            torch.testing.assert_close(scores, 2 * masks["weight"].double())

    def test_finite_epsilon_against_the_published_estimator(self):
        """At a large epsilon, where the limit is off by a factor; kept weights of every layer by regression."""
        _, net, masks = prepared(lambda: normed(nn.ReLU(), conv(16, 16), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 6)))
        epsilon, batch, draws = 3e-3, 32, 150
        finite, limit = (NtkSapAnalytic(epsilon=e).gradient(net, masks, Data((), (4, 5, 5))) for e in (epsilon, 0))
        generator = torch.Generator().manual_seed(5)
        total = {n: torch.zeros_like(w) for n, w in net.weights.items()}
        for _ in range(draws):
            params = fresh_parameters(net, generator)
            noise = {
                n: epsilon**0.5 * torch.randn(params[n].shape, generator=generator, dtype=torch.float64)
                for n in net.prunable
            }
            inputs = torch.randn(batch, 4, 5, 5, generator=generator, dtype=torch.float64)
            for name, gradient in mask_gradient(net, masks, params, noise, inputs).items():
                total[name] += gradient / (epsilon * batch * draws)
        for name, drawn in total.items():
            closed, reference = (t[name] * masks[name] for t in (finite, limit))
            slope = ((drawn * closed).sum() / closed.square().sum()).item()
            assert slope == pytest.approx(1, abs=0.1)
            if name == "0.weight":
                assert closed.sum() > 1.08 * reference.sum()  # so the agreement is not that of the limit

    def test_small_epsilon_tends_to_the_limit(self):
        _, net, masks = prepared(Residual)
        limit, near = (NtkSapAnalytic(epsilon=e).expected(net, masks, Data((), (4, 6, 6))) for e in (0, 1e-9))
        for name in limit:
            torch.testing.assert_close(near[name], limit[name], rtol=1e-3, atol=1e-9)

    def test_float32_is_enough(self):
        for epsilon in (0.0, 1e-4):
            scores = []
            for dtype in (torch.float32, torch.float64):
                net = FunctionalModel.of(Residual().to(dtype))
                criterion = NtkSapAnalytic(epsilon=epsilon)
                scores.append(criterion.expected(net, Masks.dense(net.weights), Data((), (4, 6, 6))))
            for name, score in scores[0].items():
                torch.testing.assert_close(score.double(), scores[1][name], rtol=1e-3, atol=1e-6)

    def test_flat_is_exact_under_circular_padding_of_a_large_map(self):
        """Inside a large map borders hardly count, so flat and full agree."""
        _, net, masks = prepared(Residual)
        data = Data((), (4, 40, 40))
        full, flat = (NtkSapAnalytic(epsilon=0, positions=p).expected(net, masks, data) for p in ("full", "flat"))
        for name in full:
            kept = masks[name]
            assert (full[name] - flat[name])[kept].abs().mean() < 0.1 * full[name][kept].mean()


class TestCriterion:
    def test_excluded_layers_are_random_but_neither_masked_nor_perturbed(self):
        model = nn.Sequential(nn.Linear(6, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False)).double()
        net = FunctionalModel.of(model, exclude="2")
        masks = Masks.dense(net.weights)
        scores = NtkSapAnalytic(epsilon=0).expected(net, masks, Data((), (6,)))
        # F = sum over outputs and units of (2/32) * 1/2 * sum of inputs m^2
        torch.testing.assert_close(scores["0.weight"], torch.full((32, 6), 4 * 2 / 32 / 2 * 2, dtype=torch.float64))

    @pytest.mark.parametrize("epsilon", [0, 1e-4])
    def test_units_without_inputs_and_empty_layers_score_zero_and_finite(self, epsilon):
        _, net, masks = prepared(Residual)
        dead = {n: m.clone() for n, m in masks.items()}
        dead["b.weight"][:3] = False
        dead["a.weight"][5] = False
        scores = NtkSapAnalytic(epsilon=epsilon).expected(net, Masks(dead), Data((), (4, 6, 6)))
        assert all(score.isfinite().all() for score in scores.values())
        assert not scores["b.weight"][:3].any() and not scores["a.weight"][5].any()
        empty = {**dead, "b.weight": torch.zeros_like(dead["b.weight"])}
        scores = NtkSapAnalytic(epsilon=epsilon).expected(net, Masks(empty), Data((), (4, 6, 6)))
        assert all(score.isfinite().all() for score in scores.values()) and scores["c.weight"].any()
        cut = {**dead, "c.weight": torch.zeros_like(dead["c.weight"])}  # no path to the output
        scores = NtkSapAnalytic(epsilon=epsilon).expected(net, Masks(cut), Data((), (4, 6, 6)))
        assert not any(score.any() for score in scores.values())

    def test_noise(self):
        net = FunctionalModel.of(Residual())
        masks, data = Masks.dense(net.weights), Data((), (4, 6, 6))
        expected = NtkSapAnalytic().expected(net, masks, data)["a.weight"]

        def factor(seed: int, **fields) -> torch.Tensor:
            scores = NtkSapAnalytic(**fields)(net, masks, data, torch.Generator().manual_seed(seed))
            return scores["a.weight"] / expected

        assert torch.equal(factor(1), factor(1)) and not torch.equal(factor(1), factor(2))
        assert factor(1).mean().item() == pytest.approx(1, abs=0.2)
        assert factor(1, noise="lognormal", strength=0.3).log().std().item() == pytest.approx(0.3, rel=0.15)
        for strength in (0, -1):
            with pytest.raises(sapwood.errors.ConfigError, match="tied"):
                NtkSapAnalytic(strength=strength)
        for wrong in ({"noise": "gauss"}, {"positions": "some"}, {"epsilon": -1}):
            with pytest.raises(sapwood.errors.ConfigError):
                NtkSapAnalytic(**wrong)

    def test_average_taps(self):
        _, net, masks = prepared(Residual)
        data = Data((), (4, 6, 6))
        plain_scores = NtkSapAnalytic().expected(net, masks, data)["b.weight"]
        averaged = NtkSapAnalytic(average_taps=True)(net, masks, data, torch.Generator().manual_seed(1))["b.weight"]
        raw = NtkSapAnalytic()(net, masks, data, torch.Generator().manual_seed(1))["b.weight"]
        kept, noise = masks["b.weight"], raw / plain_scores
        mean = (plain_scores * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True)
        torch.testing.assert_close(averaged[kept], (mean * noise)[kept])

    def test_zero_gamma_branches_are_scored_as_open(self):
        closed, opened = Residual(), Residual()
        opened.load_state_dict(closed.state_dict())
        nn.init.zeros_(closed.norms[1].weight)
        with pytest.warns(SapwoodWarning, match="scored as ones"):
            one = prune(closed, method="ntk-sap-analytic", density=0.3, input_shape=(4, 6, 6)).masks
        assert one == prune(opened, method="ntk-sap-analytic", density=0.3, input_shape=(4, 6, 6)).masks

    def test_a_trained_model_is_told_that_its_weights_are_ignored(self):
        model = Residual()
        model(torch.randn(8, 4, 6, 6))
        with pytest.warns(SapwoodWarning, match="ignores the trained ones") as caught:
            prune(model, method="ntk-sap-analytic", density=0.3, input_shape=(4, 6, 6))
        assert len(caught) == 1


class TestRefusals:
    def refused(self, model, message, shape=(8,), **options):
        with pytest.raises(UnsupportedModelError, match=message) as error:
            prune(model, method="ntk-sap-analytic", density=0.5, input_shape=shape, **options)
        assert 'method="ntk-sap"' in str(error.value)

    def test_an_operation_without_a_rule_is_named_with_its_place(self):
        class Odd(nn.Linear):
            def forward(self, x):
                return torch.sort(super().forward(x))[0]

        self.refused(Odd(8, 4), r"no moment rule for torch\.sort \(at 'weight'\)")

    def test_a_graph_that_depends_on_values(self):
        class Branching(nn.Linear):
            def forward(self, x):
                return super().forward(x) if x.sum() > 0 else super().forward(-x)

        class Leaving(nn.Linear):
            def forward(self, x):
                return super().forward(x) * x.abs().max().item()

        self.refused(Branching(8, 4), "cannot be traced")
        self.refused(Leaving(8, 4), "cannot be traced")

    def test_a_view_of_a_tensor_that_is_changed_in_place(self):
        class Aliased(nn.Linear):
            def forward(self, x):
                y = super().forward(x)
                view = y.view(-1)
                y.relu_()
                return view.view(y.shape)

        self.refused(Aliased(8, 4), "changed in place")

    def test_shared_and_rewritten_weights(self):
        shared = nn.Linear(8, 8)
        self.refused(nn.Sequential(shared, nn.ReLU(), shared), "serves several layers")
        self.refused(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)), "parametrization")
        self.refused(Residual(), "not the plain weight of a layer", (4, 6, 6), include=nn.BatchNorm2d)

    def test_products_of_tensors_and_masked_attention(self):
        class Gated(nn.Linear):
            def forward(self, x):
                y = super().forward(x)
                return y * torch.sigmoid(y)

        class Causal(nn.Linear):
            def forward(self, x):
                y = super().forward(x)[None]
                return F.scaled_dot_product_attention(y, y, y, is_causal=True)

        self.refused(Gated(8, 4), "product of two tensors")
        self.refused(Causal(8, 4), "mask", (5, 8))

    def test_nothing_is_refused_that_a_user_gave_a_rule(self):
        class Odd(nn.Linear):
            def forward(self, x):
                return torch.special.expit(super().forward(x)) - 0.5

        self.refused(Odd(8, 4), "expit")
        rule(torch.special.expit)(lambda call, x: x)
        try:
            assert prune(Odd(8, 4), method="ntk-sap-analytic", density=0.5, input_shape=(8,)).masks.kept == 16
        finally:
            del RULES[torch.special.expit]


class TestCheckScore:
    def test_a_network_that_it_fits(self):
        check = sapwood.check_score(normed(nn.ReLU(), conv(16, 6)), (4, 6, 6), draws=40)
        assert check.trusted and set(check.ratios) == {"0.weight", "3.weight"}
        assert "ntk-sap-analytic" in check.recommendation and "3.weight" in str(check)

    def test_a_rule_that_is_wrong_is_found_out(self):
        old = RULES[F.tanh]
        RULES[torch.tanh] = lambda call, x: sapwood.moments.sums.scaled(x, 5.0)

        class Model(nn.Sequential):
            def forward(self, x):
                return self[1](torch.tanh(self[0](x)))

        try:
            check = sapwood.check_score(Model(nn.Linear(8, 32), nn.Linear(32, 4)), (8,), draws=40)
        finally:
            RULES[torch.tanh] = old
        assert not check.trusted and 'method="ntk-sap"' in check.recommendation

    def test_ratio_and_scatter_of_a_known_estimator(self):
        """Scores that are the closed form's, times 1 in one draw and times 3 in the next."""
        model, times = normed(nn.ReLU(), conv(16, 6)), iter([1.0, 3.0])

        def estimator(net, masks, inputs, epsilon, generator):
            closed = NtkSapAnalytic(epsilon=epsilon).gradient(net, masks, Data((), (4, 6, 6)))
            factor = next(times) * len(inputs) * epsilon
            return {name: factor * score for name, score in closed.items()}

        check = sapwood.check_score(model, (4, 6, 6), draws=2, estimator=estimator)
        assert list(check.ratios.values()) == pytest.approx([1 / 2] * 2)
        assert list(check.scatter.values()) == pytest.approx([2.0] * 2)
        assert list(check.errors.values()) == pytest.approx([0.5] * 2)

    def test_few_draws_are_not_decisive(self):
        check = sapwood.check_score(Residual(), (4, 6, 6), draws=2, batch_size=2, epsilon=1e-10)
        assert check.trusted or "Not decided" in check.recommendation

    def test_bad_input(self):
        with pytest.raises(sapwood.errors.ConfigError, match="2 or more"):
            sapwood.check_score(Residual(), (4, 6, 6), draws=1)
