"""Neural Tangent Transfer: its estimate and gradient against explicit kernels; training lowers the mismatch."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from nets import CLASSES, labelled, mlp
from sapwood import ConfigError, DataError, FunctionalModel, Masks, ScoreError, prune
from sapwood.experiments.search import needs_batches
from sapwood.methods.ntt import Ntt, mean_square_between, sketch


@pytest.fixture
def tiny():
    """A smooth net, masks, another net's weights, and two inputs: a 4 x 4 kernel, 16 vectors of signs."""
    torch.manual_seed(0)
    model, other = (mlp(3, 4, 2, activation=nn.Tanh).double() for _ in range(2))
    net = FunctionalModel.of(model)
    masks = Masks({n: torch.rand(w.shape) < 0.6 for n, w in net.weights.items()})
    teacher = {name: p.detach() for name, p in other.named_parameters()}
    return model, net, masks, teacher, torch.randn(2, 3, dtype=torch.float64)


def gram(model, params, masks, inputs):
    """J J' over the kept weights and the biases, by torch.func."""
    jacobian = jacrev(lambda p: functional_call(model, p, (inputs,)).flatten())(params)
    kept = [(j * masks[n] if n in masks else j).flatten(1) for n, j in jacobian.items()]
    rows = torch.cat(kept, 1)
    return rows @ rows.T


SIGNS = torch.tensor(list(itertools.product((1, -1), repeat=4)), dtype=torch.float64).view(16, 2, 2)


def expectation(kernel):
    """Over independent draws of two of the 16 probes: every pair of them, equal ones included."""
    pairs = [torch.tensor(pair) for pair in itertools.product(range(16), repeat=2)]
    return torch.stack([mean_square_between(kernel[pair][:, pair]) for pair in pairs]).mean()


class TestEstimate:
    def test_expectation_is_the_squared_frobenius_norm(self, tiny):
        model, net, masks, teacher, inputs = tiny
        params = masks.apply(net.params)
        exact = (gram(model, params, masks, inputs) - gram(model, teacher, {}, inputs)).square().sum()
        outputs, student = sketch(net, params, masks, inputs, SIGNS, train=False)
        found = expectation(student - sketch(net, teacher, None, inputs, SIGNS, train=False)[1])
        torch.testing.assert_close(found, exact)
        torch.testing.assert_close(outputs, functional_call(model, params, (inputs,)))

    def test_gradient_is_that_of_the_explicit_kernels(self, tiny):
        model, net, masks, teacher, inputs = tiny
        params = masks.apply(net.params)
        target = gram(model, teacher, {}, inputs)

        def exact(values):
            return (gram(model, values, masks, inputs) - target).square().sum()

        expected = torch.func.grad(exact)(params)
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        kernel = sketch(net, leaves, masks, inputs, SIGNS, train=False, create_graph=True)[1]
        loss = expectation(kernel - sketch(net, teacher, None, inputs, SIGNS, train=False)[1])
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        for name, gradient in zip(leaves, found, strict=True):
            torch.testing.assert_close(gradient, expected[name])

    def test_several_probes_average_their_pairs(self):
        kernel = torch.tensor([[9.0, 1.0, 2.0], [1.0, 9.0, 3.0], [2.0, 3.0, 9.0]])
        assert mean_square_between(kernel).item() == pytest.approx((1 + 4 + 9) / 3)


class TestTraining:
    FAST = Ntt(rounds=3, interval=20, lr=1e-2)

    @pytest.mark.parametrize("straight_through", [True, False])
    def test_lowers_both_mismatches_against_pruning_alone(self, straight_through):
        model = mlp(3, 16, 2, activation=nn.Tanh).double()
        inputs = torch.randn(12, 3, dtype=torch.float64)
        dense = {name: p.detach() for name, p in model.named_parameters()}
        fields = {"rounds": 2, "interval": 50, "lr": 5e-3, "straight_through": straight_through}
        result = prune(model, method=self.FAST, density=0.7, batches=[inputs], **fields)
        start = prune(model, method="magnitude", density=0.7, allocation="uniform").masks
        kernels, outputs = [], []
        for masks, params in ((start, start.apply(dense)), (result.masks, result.params)):
            kernels.append((gram(model, params, masks, inputs) - gram(model, dense, {}, inputs)).square().sum().item())
            outputs.append((functional_call(model, params, (inputs,)) - model(inputs)).square().sum().item())
        assert kernels[1] < 0.5 * kernels[0] and outputs[1] < 0.5 * outputs[0]

    def test_gamma_zero_fits_the_outputs_alone(self):
        model = mlp(3, 16, 2, activation=nn.Tanh).double()
        inputs = torch.randn(12, 3, dtype=torch.float64)
        dense = {name: p.detach() for name, p in model.named_parameters()}
        exact = gram(model, dense, {}, inputs)
        errors = []
        for gamma in (0.0, 1.0):
            result = prune(model, method=self.FAST, density=0.7, gamma=gamma, batches=[inputs])
            errors.append((gram(model, result.params, result.masks, inputs) - exact).square().sum().item())
        assert errors[1] < errors[0]

    def test_masks_are_recomputed_and_pruned_weights_may_return(self):
        model, seen = mlp(3, 16, 2), []
        result = prune(
            model, method=self.FAST, density=0.3, batches=[torch.randn(12, 3)], on_round=lambda _, m: seen.append(m)
        )
        assert len(seen) == len(result.history) == 3 and seen[-1] == result.masks
        assert seen[0] == prune(model, method="magnitude", density=0.3, allocation="uniform").masks
        assert not seen[-1] <= seen[0]  # some came back

    def test_all_parameters_are_trained_and_pruned_ones_are_zero(self):
        model = mlp(3, 16, 2)
        result = prune(model, method=self.FAST, density=0.3, batches=[torch.randn(12, 3)])
        assert list(result.params) == [name for name, _ in model.named_parameters()]
        assert all(not result.params[n][~mask].any() for n, mask in result.masks.items())
        assert not torch.equal(result.params["0.bias"], model[0].bias)
        assert {c.density for c in result.masks.per_layer().values()} == {14 / 48, 10 / 32}

    def test_within_masks(self):
        model = mlp(3, 16, 2)
        first = prune(model, method="random", density=0.6).masks
        result = prune(model, method=self.FAST, density=0.3, within=first, batches=[torch.randn(12, 3)])
        assert result.masks <= first


def test_random_inputs_need_a_shape_only_and_real_ones_no_labels():
    quick = {"rounds": 1, "interval": 1, "density": 0.5}
    model = mlp(4, 6, CLASSES)
    assert prune(model, method="ntt", random_inputs=True, input_shape=(4,), **quick).params
    assert prune(model, method="ntt", batches=[labelled((4,))[0][0]], **quick).params
    with pytest.raises(DataError, match="real inputs"):
        prune(model, method="ntt", input_shape=(4,), **quick)
    assert needs_batches("ntt", {}) and not needs_batches("ntt", {"random_inputs": True})
    assert not needs_batches("ntk-sap", {}) and needs_batches("ntk-sap", {"random_inputs": False})
    assert needs_batches("nets:by_magnitude", {}) and not needs_batches("sapwood:Random", {})


def test_the_released_objective_trains_and_needs_two_halves():
    quick = {"rounds": 2, "interval": 30, "lr": 5e-3, "gamma": 0.1, "l2": 1e-4, "density": 0.5, "as_released": True}
    model = mlp(4, 16, CLASSES).double()
    inputs = torch.randn(12, 4, dtype=torch.float64)
    result = prune(model, method="ntt", batches=[inputs], **quick)
    start = prune(model, method="magnitude", density=0.5, allocation="uniform").masks
    dense = {name: p.detach() for name, p in model.named_parameters()}
    errors = [
        (functional_call(model, params, (inputs,)) - model(inputs)).square().mean().item()
        for params in (start.apply(dense), result.params)
    ]
    assert errors[1] < 0.5 * errors[0]
    for options in ({"batches": [inputs, inputs[:1]]}, {"batches": [inputs], "batch_size": 1}):
        with pytest.raises(DataError, match="has no two halves"):
            prune(model, method="ntt", **quick, **options)


def test_the_penalty_shrinks_what_is_kept():
    sizes = []
    for l2 in (0.0, 1.0):
        fields = {"rounds": 1, "interval": 30, "lr": 1e-2, "l2": l2}
        result = prune(mlp(4, 6, CLASSES), method="ntt", density=0.5, batches=labelled((4,)), **fields)
        sizes.append(sum(result.params[name].square().sum().item() for name in result.masks))
        torch.manual_seed(0)
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"probes": 1}, "probes is 1; it must be 2"),
        ({"lr": 0.0}, "lr is 0"),
        ({"gamma": -1.0}, "gamma is -1"),
        ({"l2": -1.0}, "l2 is -1"),
    ],
)
def test_refuses(fields, said):
    with pytest.raises(ConfigError, match=said):
        prune(mlp(4, 6, 3), method="ntt", density=0.5, batches=labelled((4,)), **fields)


def test_divergence_is_an_error():
    with pytest.raises(ScoreError, match=r"diverged in round 1: lower lr \(1e\+30\)"):
        prune(mlp(4, 6, 3), method="ntt", density=0.5, batches=labelled((4,)), lr=1e30, rounds=1, interval=3)
