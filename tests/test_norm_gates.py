"""Taylor's channels behind norms, against gates written into the networks by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets import Residual
from sapwood import FunctionalModel, Masks, ProsPr, Taylor, UnsupportedModelError, prune
from sapwood.criteria.norm_gates import NormGates
from sapwood.models import create
from scoring import data, generator, random_masks
from test_prune import same, state_of

X = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=generator())
Y = torch.tensor([0, 1, 2, 0, 1, 2])
BATCHNORM = nn.modules.batchnorm._BatchNorm


class Net(nn.Module):
    """A network with a forward pass of its own: layer `c`, mostly a norm `bn` behind it, and a head `h`."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)
        for norm in self.modules():  # as if trained
            if isinstance(norm, BATCHNORM):
                if norm.running_mean is not None:
                    norm.running_mean.normal_()
                    norm.running_var.uniform_(0.5, 2)
                if norm.affine:
                    nn.init.uniform_(norm.weight, 0.5, 2)
                    nn.init.normal_(norm.bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.h(flat_mean(self.run(self, x)))


def flat_mean(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2) if x.dim() > 2 else x


def conv(inputs: int = 2, outputs: int = 4, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **{"bias": False, **options})


def plain(m: Net, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.c(x)))


def two_ways(m: Net, x: Tensor) -> Tensor:
    y = m.c(x)
    return F.relu(m.b2(y)) + m.bn(y).sin()


def half(m: Net, x: Tensor) -> Tensor:
    left, right = m.c(x).chunk(2, 1)
    return F.relu(torch.cat([m.bn(left), right], 1))


def twice(m: Net, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.c(x))) + F.relu(m.bn(m.c(x.flip(2).sin())))


def rows(m: Net, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.c(x.flatten(2)).reshape(-1, 7))).view(len(x), 2, 7).mean(1)


def head(channels: int = 4) -> nn.Linear:
    return nn.Linear(channels, 3)


def pair() -> dict[str, nn.Module]:
    return {"c": conv(), "bn": nn.BatchNorm2d(4), "h": head()}


BEHIND = {
    "a bias": (lambda: Net(plain, c=conv(bias=True), bn=nn.BatchNorm2d(4), h=head()), ["bn"]),
    "no affine": (lambda: Net(plain, c=conv(), bn=nn.BatchNorm2d(4, affine=False), h=head()), ["bn"]),
    "no running statistics": (
        lambda: Net(plain, c=conv(), bn=nn.BatchNorm2d(4, track_running_stats=False), h=head()),
        ["bn"],
    ),
    "InstanceNorm": (lambda: Net(plain, c=conv(), bn=nn.InstanceNorm2d(4, affine=True), h=head()), ["bn"]),
    "GroupNorm of single channels": (lambda: Net(plain, c=conv(), bn=nn.GroupNorm(4, 4), h=head()), ["bn"]),
    "groups": (lambda: Net(plain, c=conv(groups=2), bn=nn.BatchNorm2d(4), h=head()), ["bn"]),
    "a norm of the input": (
        lambda: Net(lambda m, x: plain(m, m.b0(x)), b0=nn.BatchNorm2d(2), **pair()),
        ["bn"],
    ),
    "flatten": (lambda: Net(lambda m, x: m.bn(m.c(x).flatten(2)), **{**pair(), "bn": nn.BatchNorm1d(4)}), ["bn"]),
    "channels last": (
        lambda: Net(
            lambda m, x: F.relu(m.bn(m.c(x.flatten(2)).mT)), c=nn.Linear(25, 7), bn=nn.BatchNorm1d(7), h=head(7)
        ),
        ["bn"],
    ),
    "positions as samples": (lambda: Net(rows, c=nn.Linear(25, 7), bn=nn.BatchNorm1d(7), h=head(7)), ["bn"]),
    "a rectifier between": (lambda: Net(lambda m, x: m.bn(F.relu(m.c(x))), **pair()), ["bn"]),
    "max-pooling between": (lambda: Net(lambda m, x: m.bn(F.max_pool2d(m.c(x), 2)), **pair()), ["bn"]),
    "padded average pooling between": (
        lambda: Net(lambda m, x: F.relu(m.bn(F.avg_pool2d(m.c(x), 3, padding=1))), **pair()),
        ["bn"],
    ),
    "dropout between": (lambda: Net(lambda m, x: m.bn(m.d(m.c(x))).sin(), d=nn.Dropout(0.3), **pair()), ["bn"]),
    "a norm behind the norm": (
        lambda: Net(lambda m, x: F.relu(m.b2(F.relu(m.bn(m.c(x))))), b2=nn.BatchNorm2d(4), **pair()),
        ["b2"],
    ),
    "two norms side by side": (lambda: Net(two_ways, b2=nn.BatchNorm2d(4), **pair()), ["bn", "b2"]),
    "a depthwise convolution between": (
        lambda: Net(lambda m, x: F.relu(m.bn(m.d(m.c(x)))), d=conv(4, 4, groups=4), **pair()),
        ["bn"],
    ),
    "layer and norm called twice": (lambda: Net(twice, **pair()), ["bn"]),
}


def gates(model: Net, at: list[str], train: bool) -> Tensor:
    """The gradient of the loss in gates on the outputs of modules, one gate a channel of layer `c`."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.training = train and isinstance(module, BATCHNORM)
    gate = torch.ones(len(model.c.weight), dtype=torch.float64, requires_grad=True)

    def through(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return output * gate.view(1, -1, *[1] * (output.dim() - 2))

    for name in at:
        model.get_submodule(name).register_forward_hook(through)
    return torch.autograd.grad(F.cross_entropy(model(X), Y), gate)[0]


def channel_scores(model: nn.Module, criterion: Taylor, name: str = "c.weight", masks: Masks | None = None) -> Tensor:
    net = FunctionalModel.of(model)
    scores = criterion(net, masks or Masks.dense(net.weights), data([(X, Y)]), generator())
    return scores[name].flatten(1)[:, 0]


@pytest.mark.trap(77)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("case", BEHIND)
def test_the_gate_stands_behind_the_norm(case, train):
    build, at = BEHIND[case]
    model = build()
    found = channel_scores(model, Taylor("channels", batch_statistics=train))
    torch.testing.assert_close(found, gates(model, at, train).square(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("train", [True, False])
def test_what_no_norm_follows_has_its_own_sum(train):
    """GELU is in the way, the norm normalises over channels, or there is none."""
    for between in (lambda m, x: m.bn(F.gelu(m.c(x))), lambda m, x: m.g(m.c(x)), lambda m, x: m.c(x).sin()):
        model = Net(between, g=nn.GroupNorm(2, 4).double(), **pair())
        found = channel_scores(model, Taylor("channels", batch_statistics=train))
        torch.testing.assert_close(found, gates(model, ["c"], train).square(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("train", [True, False])
def test_half_of_a_layer_behind_a_norm(train):
    model = Net(half, **{**pair(), "bn": nn.BatchNorm2d(2)})
    found = channel_scores(model, Taylor("channels", batch_statistics=train))
    own = gates(model, ["c"], train)
    moved = copy.deepcopy(model)
    moved.c = nn.Identity()
    moved.c.weight = model.c.weight
    moved.run = lambda m, x: F.relu(m.c(torch.cat([m.bn(model.c(x)[:, :2]), model.c(x)[:, 2:]], 1)))
    behind = gates(moved, ["c"], train)
    torch.testing.assert_close(found, behind.square(), rtol=1e-9, atol=1e-12)
    assert not train or own[:2].abs().max() < 1e-3 * behind[:2].abs().max()


@pytest.mark.parametrize("train", [True, False])
def test_a_stem_that_goes_into_a_norm_and_around_it_has_a_gate_on_both_ways(train):
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.c(x)
        return F.relu(m.a(y) + m.c2(F.relu(m.a(m.bn(y)))))

    model = Net(forward, a=nn.Identity(), c2=conv(4, 4), **pair())
    found = channel_scores(model, Taylor("channels", batch_statistics=train))
    torch.testing.assert_close(found, gates(model, ["a"], train).square(), rtol=1e-9, atol=1e-12)


def test_a_layer_whose_channels_a_reshape_splits_has_every_part_behind_the_norm():
    def forward(m: Net, x: Tensor) -> Tensor:
        return F.relu(m.a(m.bn(m.c(x).reshape(len(x), 8, -1)))).view(len(x), 4, -1)

    model = Net(forward, c=nn.Conv2d(2, 4, 2, bias=False), a=nn.Unflatten(1, (4, 2)), bn=nn.BatchNorm1d(8), h=head())
    found = channel_scores(model, Taylor("channels"))
    torch.testing.assert_close(found, gates(model, ["a"], True).square(), rtol=1e-9, atol=1e-12)


def test_a_norm_that_takes_two_channels_for_one_undoes_none():
    def forward(m: Net, x: Tensor) -> Tensor:
        return F.relu(m.bn(m.c(x).reshape(len(x), 2, -1))).view(len(x), 4, -1)

    model = Net(forward, c=nn.Conv2d(2, 4, 2, bias=False), bn=nn.BatchNorm1d(2), h=head())
    found = channel_scores(model, Taylor("channels"))
    torch.testing.assert_close(found, gates(model, ["c"], True).square(), rtol=1e-9, atol=1e-12)


def test_a_transposed_convolution_has_its_channels_in_another_dimension():
    model = Net(plain, c=nn.ConvTranspose2d(2, 6, 3, groups=2, bias=False), bn=nn.BatchNorm2d(6), h=head(6))
    net = FunctionalModel.of(model)
    scores = Taylor("channels")(net, Masks.dense(net.weights), data([(X, Y)]), generator())["c.weight"]
    model.c.weight = nn.Parameter(model.c.weight.flatten(0, 1).unsqueeze(1))  # six entries, as `gates` counts them
    model.run = lambda m, x: F.relu(m.bn(F.conv_transpose2d(x, m.c.weight.view(2, 3, 3, 3), groups=2)))
    expected = gates(model, ["bn"], True).square()
    torch.testing.assert_close(scores[..., 0, 0].flatten(), expected, rtol=1e-9, atol=1e-12)


def test_under_masks_and_for_every_sample():
    model = Net(plain, **pair())
    net = FunctionalModel.of(model)
    masks = random_masks(net)
    pruned = copy.deepcopy(model)
    for name, mask in masks.items():
        pruned.get_parameter(name).data *= mask
    found = channel_scores(model, Taylor("channels"), masks=masks)
    torch.testing.assert_close(found, gates(pruned, ["bn"], True).square(), rtol=1e-9, atol=1e-12)
    found = channel_scores(model, Taylor("channels", per="sample"))
    with torch.no_grad():  # BatchNorm at the batch's statistics, unbiased, as a train-mode pass leaves them
        model.bn.momentum = 1.0
        model.train()(X)
    model.eval()
    bias, gate = model.bn.bias.detach(), torch.ones(4, dtype=torch.float64, requires_grad=True)
    total = torch.zeros(4, dtype=torch.float64)
    for x, y in zip(X, Y, strict=True):
        behind = model.bn(model.c(x[None])) * gate.view(1, 4, 1, 1)
        loss = F.cross_entropy(model.h(flat_mean(F.relu(behind))), y[None])
        total += torch.autograd.grad(loss, gate)[0].square()
    assert bias.any()
    torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::sapwood.SapwoodWarning")
def test_every_layer_of_a_deep_network_keeps_channels_in_float32():
    """Before, a global budget took every channel in front of a BatchNorm before one weight of the classifier."""
    model = create("resnet20", num_classes=10)
    batch = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    net = FunctionalModel.of(model)
    look = NormGates.of(net, data([batch]), generator())
    found = look.followings
    assert look.norms == len(found) == 21 and [f.norm for f in found] == list(range(21))
    assert all(torch.equal(f.channel, torch.arange(f.gates)) for f in found)
    assert {f.source for f in found} == {name for name in net.prunable if name != "fc.weight"}
    masks = prune(model, method="taylor", structure="channels", density=0.9, batches=[batch]).masks
    assert min(layer.density for layer in masks.per_layer().values()) > 0.3


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), padding=1)


class StandardisedByBatchNorm(nn.Conv2d):
    """As timm's: the norm is called on the weights."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        rows = F.batch_norm(rows, None, None, training=True, momentum=0.0)
        return F.conv2d(x, rows.reshape_as(self.weight), padding=1)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("at", ["a", "bn"])
def test_a_norm_of_the_weights(at, train):
    def forward(m: Net, x: Tensor) -> Tensor:
        return F.relu(m.get_submodule(at)(m.c(x)))

    layers = {"c": StandardisedByBatchNorm(2, 4, 3), "a": nn.Identity(), "bn": nn.BatchNorm2d(4), "h": head()}
    model = Net(forward, **layers)
    found = channel_scores(model, Taylor("channels", batch_statistics=train))
    torch.testing.assert_close(found, gates(model, [at], train).square(), rtol=1e-9, atol=1e-12)


def by_hand(m: Net, x: Tensor) -> Tensor:
    y = m.c(x)
    return F.relu((y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), keepdim=True) + 1e-5).sqrt())


class TestRefused:
    @pytest.mark.parametrize(
        "build",
        [
            lambda: Net(by_hand, c=conv(), h=head()),
            lambda: Net(lambda m, x: F.relu(m.c(x)), c=Standardised(2, 4, 3), h=head()),
        ],
        ids=["a norm written out", "standardised weights"],
    )
    def test_what_undoes_the_scale_unseen(self, build):
        with pytest.raises(UnsupportedModelError, match=r"scale of the channels of 'c\.weight' has no effect"):
            channel_scores(build(), Taylor("channels"))

    def test_and_the_model_is_untouched(self):
        model = Net(by_hand, c=conv(), h=head())
        before = state_of(model)
        with pytest.raises(UnsupportedModelError, match="scale of the channels"):
            prune(model, method="taylor", structure="channels", density=0.5, batches=[(X, Y)])
        assert same(before, state_of(model))
        assert prune(model, method="taylor", density=0.5, batches=[(X, Y)]).masks.kept

    def test_prospr_without_steps_behind_batchnorm(self):
        model = Net(plain, **pair())
        with pytest.raises(UnsupportedModelError, match="scale of the channels"):
            prune(model, method="prospr", steps=0, structure="channels", density=0.5, batches=[(X, Y)])
        for fields in ({"steps": 1, "structure": "channels"}, {"steps": 0}):
            assert prune(model, method="prospr", density=0.5, batches=[(X, Y)], **fields).masks.kept
        net = FunctionalModel.of(Net(lambda m, x: m.c(x).sin(), c=conv(), h=head()))  # no norm: it means something
        assert ProsPr(steps=0, structure="channels")(net, Masks.dense(net.weights), data([(X, Y)]), generator())

    def test_skeletonization_of_what_a_depthwise_convolution_reads(self):
        model = Net(lambda m, x: F.relu(m.bn(m.c(x.sin()))), c=conv(2, 2, groups=2), bn=nn.BatchNorm2d(2), h=head(2))
        with pytest.raises(
            UnsupportedModelError, match=r"scale of the channels of 'c\.weight'.*batch_statistics=False"
        ):
            prune(model, method="skeletonization", density=0.5, batches=[(X, Y)])
        fields = {"density": 0.7, "batches": [(X, Y)], "min_per_layer": 1}
        assert prune(model, method="skeletonization", batch_statistics=False, **fields).masks.kept
        assert prune(Net(plain, **pair()), method="skeletonization", **fields).masks.kept

    def test_norms_that_come_and_go(self):
        model = Net(lambda m, x: m.bn(m.c(x)) if len(x) > 4 else m.c(x), **pair())
        with pytest.raises(UnsupportedModelError, match="does not call the same normalisations"):
            prune(model, method="taylor", structure="channels", density=0.5, batches=[(X, Y)])


def test_the_model_is_untouched():
    model = Residual(zero_gamma=False)
    batch = torch.randn(6, 3, 6, 6), Y
    before = state_of(model)
    prune(model, method="taylor", structure="channels", density=0.7, batches=[batch])
    assert same(before, state_of(model))
