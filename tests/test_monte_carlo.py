"""The cheaper forms of the NTK-SAP estimator against the published one and against exact Jacobians, in float64."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import CLASSES, mlp
from sapwood import Data, FunctionalModel, Masks, NtkSap, NtkSapJvp, prune
from sapwood.batches import resized
from sapwood.criteria.monte_carlo import fresh_parameters
from sapwood.criteria.ntk_sap_jvp import squared_jvp
from sapwood.errors import ConfigError, UnsupportedModelError

SHAPE = (2, 6, 6)


class Block(nn.Module):
    """Convolutions with BatchNorm and a shortcut."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU, **norm) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, **norm)
        self.conv, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, **norm)
        self.act, self.fc = activation(), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn0(self.stem(x)))
        return self.fc(self.act(x + self.bn1(self.conv(x))).mean((2, 3)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def draws(model: nn.Module, shape=SHAPE, samples: int = 7):
    """One mini-batch: the model, masks, weights, directions and inputs."""
    net = FunctionalModel.of(model.double())
    params = fresh_parameters(net, generator(1))
    direction = {n: normal(*params[n].shape, seed=index) for index, n in enumerate(net.prunable)}
    masks = Masks({n: normal(*params[n].shape, seed=9) < 0.6 for n in net.prunable})
    return net, masks, params, direction, normal(samples, *shape, seed=2)


def close(first, second, tolerance: float = 1e-10) -> None:
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance * second[name].abs().max())


def distance(first, second) -> float:
    first, second = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (first, second))
    return ((first - second).norm() / second.norm()).item()


class TestOneComputationDoneDifferently:
    @pytest.mark.parametrize("chunk", [1, 3, 7])
    @pytest.mark.parametrize("merged", [False, True])
    def test_chunks_give_the_gradient_of_the_whole(self, chunk, merged):
        piece = draws(Block())
        whole = NtkSap(merged_statistics=merged).mask_gradient(*piece)
        close(NtkSap(merged_statistics=merged, chunk_size=chunk).mask_gradient(*piece), whole)

    @pytest.mark.parametrize("criterion", [NtkSap(), NtkSap(merged_statistics=True), NtkSapJvp()])
    def test_channels_last_changes_rounding_only(self, criterion):
        *piece, batch = draws(Block())
        last = batch.contiguous(memory_format=torch.channels_last)
        close(criterion.mask_gradient(*piece, last), criterion.mask_gradient(*piece, batch))

    def test_a_model_that_needs_contiguous_images_gets_them(self):
        class Viewing(Block):
            def forward(self, x):
                return super().forward(x.view(len(x), -1).view(x.shape))

        fields = {"density": 0.5, "input_shape": SHAPE, "rounds": 1, "samples": 8}
        torch.manual_seed(0)
        model = Viewing()
        contiguous = prune(model, layout="contiguous", **fields).masks
        assert prune(model, **fields).masks == contiguous
        with pytest.raises(UnsupportedModelError, match="view"):
            prune(model, layout="channels_last", **fields)

    def test_batchnorm_that_always_uses_its_batch_refuses_chunks(self):
        piece = draws(Block(track_running_stats=False))
        NtkSap().mask_gradient(*piece)
        with pytest.raises(UnsupportedModelError, match="chunk_size=0"):
            NtkSap(chunk_size=2).mask_gradient(*piece)

    @pytest.mark.parametrize("fields", [{"layout": "nhwc"}, {"chunk_size": -1}, {"epsilon": 0.0}, {"samples": 0}])
    def test_illegal_fields(self, fields):
        with pytest.raises(ConfigError):
            NtkSap(**fields)


class TestMergedStatistics:
    def test_equals_two_passes_with_the_unperturbed_networks_own_statistics(self):
        """The oracle gathers each BatchNorm's input by a hook, layer after layer, in eval mode."""
        net, masks, params, direction, batch = draws(model := Block())
        got = NtkSap(merged_statistics=True, epsilon=1e-2).mask_gradient(net, masks, params, direction, batch)
        settled = copy.deepcopy(model).eval()
        settled.load_state_dict({**params, **masks.apply({n: params[n] for n in masks})}, strict=False)
        for norm in (settled.bn0, settled.bn1):  # in order: the second's input depends on the first's statistics
            seen = []
            hook = norm.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0].detach()))
            settled(batch)
            hook.remove()
            values = seen[0].transpose(0, 1).flatten(1)
            norm.running_mean.copy_(values.mean(1))
            norm.running_var.copy_(values.var(1, correction=1))
        leaves = {n: masks[n].double().requires_grad_() for n in net.prunable}
        outputs = [
            torch.func.functional_call(settled, {**params, **{n: w[n] * leaves[n] for n in leaves}}, (batch,))
            for w in (params, {n: params[n] + 0.1 * direction[n] for n in leaves})
        ]
        change = (outputs[0] - outputs[1]).square().sum()
        close(got, dict(zip(leaves, torch.autograd.grad(change, list(leaves.values())), strict=True)))

    def test_differs_from_the_published_statistics_by_one_over_n(self):
        """Biased against unbiased variance behind a BatchNorm: ten times the samples, a tenth of the difference."""
        gaps = []
        for samples in (8, 80):
            piece = draws(Block(nn.Softplus), samples=samples)
            gaps.append(distance(NtkSap(merged_statistics=True).mask_gradient(*piece), NtkSap().mask_gradient(*piece)))
        assert 0 < gaps[1] < gaps[0] < 0.1 and gaps[0] / gaps[1] == pytest.approx(10, rel=0.5)

    def test_is_exactly_the_published_score_without_batchnorm(self):
        piece = draws(mlp(4, 6, CLASSES), shape=(4,))
        close(NtkSap(merged_statistics=True).mask_gradient(*piece), NtkSap().mask_gradient(*piece), 1e-14)

    def test_a_batchnorm_in_two_places_is_refused_with_the_way_out(self):
        class Twice(Block):
            def forward(self, x):
                x = self.act(self.bn0(self.stem(x)))
                return self.fc(self.act(x + self.bn0(self.conv(x))).mean((2, 3)))

        piece = draws(Twice())
        NtkSap().mask_gradient(*piece)
        with pytest.raises(UnsupportedModelError, match="merged_statistics=False"):
            NtkSap(merged_statistics=True).mask_gradient(*piece)


class TestJvp:
    def jacobian(self, model, net, masks, params, batch):
        """d outputs / d effective weights, by reverse mode, one column block a weight tensor."""
        effective = masks.apply({n: params[n] for n in net.prunable})

        def outputs(weights):
            return torch.func.functional_call(model, {**params, **weights}, (batch,)).flatten()

        return torch.func.jacrev(outputs)(effective)

    def test_a_basis_of_directions_sums_to_the_squared_frobenius_norm(self):
        """Which is the expectation over directions: E (u'A u) = trace A for every quadratic form."""
        model = mlp(4, 5, CLASSES)
        net, masks, params, _, batch = draws(model, shape=(4,), samples=3)
        exact = sum(
            (block * masks[n]).square().sum() for n, block in self.jacobian(model, net, masks, params, batch).items()
        )
        real = {n: masks[n].double() for n in net.prunable}
        total = 0.0
        for name in net.prunable:
            for j in range(params[name].numel()):
                direction = {n: torch.zeros_like(params[n]) for n in net.prunable}
                direction[name].view(-1)[j] = 1
                total += squared_jvp(net, real, params, direction, batch).item()
        assert total == pytest.approx(exact.item(), rel=1e-12)

    def test_expectation_is_the_gradient_of_the_squared_frobenius_norm(self):
        """The gradient is quadratic in the direction too: a basis of directions sums to its expectation."""
        model = mlp(3, 4, 2, activation=nn.Softplus)
        net, masks, params, _, batch = draws(model, shape=(3,), samples=3)

        def norm(real):
            def outputs(weights):
                return torch.func.functional_call(model, {**params, **weights}, (batch,))

            blocks = torch.func.jacrev(outputs)({n: params[n] * real[n] for n in real})
            return sum((blocks[n] * real[n]).square().sum() for n in real)

        exact = torch.func.grad(norm)({n: masks[n].double() for n in net.prunable})
        total = {n: torch.zeros_like(params[n]) for n in net.prunable}
        for name, j in [(n, j) for n in net.prunable for j in range(params[n].numel())]:
            direction = {n: torch.zeros_like(params[n]) for n in net.prunable}
            direction[name].view(-1)[j] = 1
            for n, gradient in NtkSapJvp().mask_gradient(net, masks, params, direction, batch).items():
                total[n] += gradient
        close(total, exact)

    def test_mask_gradient_against_central_differences_through_batchnorm(self):
        """Statistics are constants: the oracle holds them where they are at the masks."""
        net, masks, params, direction, batch = draws(Block(nn.Softplus))
        gradient = NtkSapJvp().mask_gradient(net, masks, params, direction, batch)
        buffers = net.own_buffers()
        net.calibrating({**params, **masks.apply({n: params[n] for n in masks})}, batch, record=buffers)

        def value(real):
            def outputs(weights):
                return net.outputs({**params, **weights}, batch, buffers=buffers)

            primal, tangent = ({n: of[n] * real[n] for n in real} for of in (params, direction))
            step = 1e-5
            ends = [outputs({n: primal[n] + sign * step * tangent[n] for n in real}) for sign in (1, -1)]
            return ((ends[0] - ends[1]) / (2 * step)).square().sum().item()

        for name in net.prunable:
            for j in range(0, params[name].numel(), 11):
                values = []
                for step in (1e-4, -1e-4):
                    moved = {n: masks[n].double() for n in net.prunable}
                    moved[name].view(-1)[j] += step
                    values.append(value(moved))
                assert gradient[name].view(-1)[j].item() == pytest.approx(
                    (values[0] - values[1]) / 2e-4, rel=1e-4, abs=1e-5
                )

    @pytest.mark.trap(22)
    def test_is_the_limit_of_the_finite_difference_on_a_smooth_net(self):
        piece = draws(Block(nn.Softplus))
        exact = NtkSapJvp().mask_gradient(*piece)
        gaps = []
        for epsilon in (1e-4, 1e-6, 1e-8):
            change = NtkSap(epsilon=epsilon, merged_statistics=True).mask_gradient(*piece)
            gaps.append(distance({n: g / epsilon for n, g in change.items()}, exact))
        assert all(later < earlier / 5 for earlier, later in itertools.pairwise(gaps)) and gaps[-1] < 1e-3

    def test_two_seeds_agree_more_on_layer_sums_than_the_published_draws_do(self):
        """Many small draws: the point of the defaults, at equal numbers of inputs."""
        torch.manual_seed(0)
        net = FunctionalModel.of(mlp(8, 16, 16, CLASSES, norm=nn.BatchNorm1d).double())
        masks, data = Masks.dense(net.weights), Data((), (8,))

        def spread(**fields):
            criterion = NtkSapJvp(**fields)
            sums = [[s.sum().log() for s in criterion(net, masks, data, generator(i)).values()] for i in range(8)]
            return torch.tensor(sums).std(0).mean()

        assert spread(resamples=8, samples=16) < 0.7 * spread(resamples=1, samples=128, batch_size=128)

    def test_an_operation_without_forward_mode_names_the_way_out(self):
        model = nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.Linear(3, CLASSES))
        with pytest.raises(UnsupportedModelError, match="method='ntk-sap'"):
            prune(model, method="ntk-sap-jvp", density=0.5, input_shape=(4,), rounds=1)
        assert prune(model, density=0.5, input_shape=(4,), rounds=1).masks.density == pytest.approx(0.5, abs=0.05)

    def test_recurrent_nets_leave_torchs_settings_alone(self):
        class Last(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn = nn.LSTM(3, 4, batch_first=True)

            def forward(self, x):
                return self.rnn(x)[0][:, -1]

        before = torch.backends.mkldnn.enabled
        prune(Last(), method="ntk-sap-jvp", density=0.5, input_shape=(5, 3), rounds=1, resamples=2)
        assert torch.backends.mkldnn.enabled == before

    def test_batch_of_one_is_refused_where_batchnorm_cannot_take_it(self):
        with pytest.raises(UnsupportedModelError, match="more than 1 value per channel"):
            prune(
                mlp(7, 5, 3, norm=nn.BatchNorm1d),
                method="ntk-sap-jvp",
                density=0.5,
                input_shape=(7,),
                batch_size=1,
                rounds=1,
            )


def test_frozen_statistics_of_the_users_own_are_not_touched():
    """F.batch_norm in eval mode, as in FrozenBatchNorm, is not one of the layers that take the batch's statistics."""

    class Frozen(Block):
        def forward(self, x):
            mean, variance = torch.full((4,), 0.3).to(x), torch.full((4,), 2.0).to(x)
            x = self.act(F.batch_norm(self.stem(x), mean, variance))
            return self.fc(self.act(x + self.bn1(self.conv(x))).mean((2, 3)))

    net, masks, params, direction, batch = draws(Frozen(nn.Softplus), samples=200)
    piece = (net, masks, params, direction, batch)
    assert distance(NtkSap(merged_statistics=True).mask_gradient(*piece), NtkSap().mask_gradient(*piece)) < 0.01
    assert resized(batch, 3).shape[0] == 3
