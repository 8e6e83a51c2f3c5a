"""The analytic kernel against averages over draws of wide networks, closed forms and named refusals."""

import math

import pytest
import torch
from torch import nn

from nets import NETS, mlp
from sapwood import Masks, ntk, prunable
from sapwood.errors import ConfigError, UnsupportedModelError


def cnn(width, channels=2, *, pool="global", bias=False):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if pool == "global" else [nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=bias), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=bias), nn.ReLU(),
        *head, nn.Linear(width, 2, bias=bias),
    )  # fmt: skip


class PreActivation(nn.Module):
    """A residual stream of Gaussians, functions instead of modules."""

    def __init__(self, width):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(torch.relu(self.a(torch.relu(x))))
        return self.head(nn.functional.relu(x))


CASES = {
    "mlp": (lambda width: mlp(4, width, width, 2, bias=False), (4,)),
    "mlp with biases": (lambda width: mlp(4, width, width, 2), (4,)),
    "cnn, global pooling": (cnn, (2, 4, 4)),
    "cnn, flattened, biases": (lambda width: cnn(width, pool="none", bias=True), (2, 4, 4)),
    "pre-activation residual": (PreActivation, (4,)),
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [*((name, None) for name in CASES), ("mlp with biases", "*"), ("cnn, flattened, biases", "*")],
)
def test_the_mean_over_draws_of_wide_networks_is_the_analytic_kernel(name, parameters):
    build, shape = CASES[name]
    model, x = build(96).double(), torch.randn(3, *shape, dtype=torch.float64)
    analytic = ntk.analytic_kernel(model, x, parameters=parameters)
    found = ntk.expected_kernel(model, x, parameters=parameters, draws=30, parametrization="ntk")
    assert analytic.shape == found.mean.shape
    # Of order 1 / width there is a bias; 0.03 of the largest entry covers it.
    allowed = 4 * found.error + 0.03 * analytic.max()
    assert ((found.mean - analytic).abs() <= allowed).all(), ((found.mean - analytic).abs() / allowed).max()
    assert float(found.error.max() / analytic.max()) < 0.08  # so that the comparison says something


def test_fluctuations_fall_with_the_width_and_the_mean_converges():
    """The variance of an entry falls as 1 / width; with it the distance of a mean over draws from the limit."""
    x = torch.randn(4, 4, dtype=torch.float64)
    spread, gap = {}, {}
    for width in (16, 128):
        model = mlp(4, width, width, 1, bias=False).double()
        analytic = ntk.analytic_kernel(model, x)
        found = ntk.expected_kernel(model, x, draws=50, parametrization="ntk")
        spread[width] = float((50 * found.error.square()).mean() / analytic.square().mean())
        gap[width] = ntk.distance(analytic, found.mean)
    slope = math.log(spread[128] / spread[16]) / math.log(128 / 16)
    assert -1.35 < slope < -0.65  # -1 in theory
    assert gap[128] < 0.6 * gap[16] and gap[128] < 0.08


def test_standard_parametrization_has_the_widths_as_factors():
    model, x = mlp(4, 200, 200, 2, bias=False).double(), torch.randn(3, 4, dtype=torch.float64)
    analytic = ntk.analytic_kernel(model, x, parametrization="standard")
    found = ntk.expected_kernel(model, x, draws=12)
    assert ((found.mean - analytic).abs() <= 4 * found.error + 0.02 * analytic.max()).all()
    assert ntk.alignment(analytic, found.mean, centred=False) > 0.99


def test_one_hidden_layer_in_closed_form():
    """For unit vectors at an angle: k1 and k0 written out (Cho and Saul 2009)."""
    angle = 0.7
    x = math.sqrt(2) * torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    found = ntk.analytic_kernel(mlp(2, 8, 1, bias=False), x)
    s = 2 * math.cos(angle)  # covariance of the hidden units, whose variance is 2
    k1 = (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / math.pi
    k0 = (math.pi - angle) / (2 * math.pi)
    assert found[0, 1] == pytest.approx(2 * k1 + 2 * k0 * s)
    assert found[0, 0] == pytest.approx(2 + 2)


def test_random_masks_of_density_c_scale_a_bias_free_network_by_its_layers():
    model, x = mlp(4, 10, 10, 10, 2, bias=False), torch.randn(3, 4, dtype=torch.float64)
    weights = prunable(model)
    masks = Masks({n: torch.arange(w.numel()).reshape(w.shape) % 2 == 0 for n, w in weights.items()})
    dense, sparse = ntk.analytic_kernel(model, x), ntk.analytic_kernel(model, x, masks)
    assert torch.allclose(sparse, 0.5**4 * dense)
    wide, generator = mlp(4, 256, 256, 1, bias=False).double(), torch.Generator().manual_seed(3)
    masks = Masks({n: torch.rand(w.shape, generator=generator) < 0.5 for n, w in prunable(wide).items()})
    masks = Masks({**masks, "0.weight": torch.ones(256, 4, dtype=torch.bool)})  # a fan-in of 4 is no limit
    found = ntk.expected_kernel(wide, x, masks, draws=10, parametrization="ntk")
    assert ntk.distance(ntk.analytic_kernel(wide, x, masks), found.mean) < 0.08


def test_outputs_are_independent_and_fastest():
    model, x = mlp(4, 8, 3, bias=False), torch.randn(2, 4)
    found = ntk.analytic_kernel(model, x)
    one = ntk.analytic_kernel(mlp(4, 8, 1, bias=False), x)
    assert torch.allclose(found, torch.kron(one, torch.eye(3, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        (mlp(4, 8, 2, activation=nn.Tanh), (4,), "Tanh"),
        (NETS["mlp with BatchNorm1d"][0](), (7,), "BatchNorm1d"),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)), (2, 4, 4), "MaxPool2d"),
        (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 2)), (2, 4, 4), "one group"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (4,), "end in a linear layer"),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), (4,), "no Gaussian"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (5, 4), "features"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(model, shape, said):
    with pytest.raises(UnsupportedModelError, match=said):
        ntk.analytic_kernel(model, torch.randn(2, *shape))


def test_a_post_activation_residual_block_is_refused_and_memory_is_obeyed():
    class Post(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.head(torch.relu(x + self.b(x)))

    with pytest.raises(UnsupportedModelError, match="sum"):
        ntk.analytic_kernel(Post(), torch.randn(2, 4))
    with pytest.raises(ConfigError, match="pairs of pixels"):
        ntk.analytic_kernel(cnn(4), torch.randn(2, 2, 8, 8), memory=10_000)
    with pytest.raises(ConfigError, match="parametrization"):
        ntk.analytic_kernel(cnn(4), torch.randn(2, 2, 8, 8), parametrization="mup")
    model, inputs = cnn(4).train(), torch.randn(2, 2, 4, 4)
    before, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    ntk.analytic_kernel(model, inputs)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
