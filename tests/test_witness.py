"""What is seen of a model before it is scored: kinds of trouble, each by several members, refused or right."""

import copy
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import sapwood
from sapwood import ntk
from sapwood.batches import Data
from sapwood.diagnosis import diagnose, effective
from sapwood.errors import SapwoodWarning, ScoreError, UnsupportedModelError
from sapwood.functional import Noise
from sapwood.isolation import isolated
from sapwood.witness import opened

DRAWS = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(8, 3, 6, 6, generator=DRAWS), torch.arange(8) % 3
ROWS = torch.randn(8, 6, generator=DRAWS)
CPU = torch.device("cpu")


def batches(x=ROWS):
    return [(x, LABELS)]


def state_of(model):
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (tensor.detach().clone(), tensor._version) for name, tensor in named.items()}


def assert_untouched(model, before):
    for name, (value, version) in state_of(model).items():
        assert torch.equal(value, before[name][0]) and version == before[name][1], name


# 1. Zeros of the parameter that are no zeros of the weight that is applied.


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-6)
        return self._conv_forward(x, w, self.bias)


class LowRankDelta(nn.Linear):
    """LoRA, merged in the forward."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.a, self.b = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.randn(sizes[1], 2))

    def forward(self, x):
        return F.linear(x, self.weight + self.b @ self.a, self.bias)


class OffsetQuantised(nn.Linear):
    def forward(self, x):
        w = self.weight
        rounded = (w / 0.1 - 0.5).round() * 0.1 + 0.05  # a grid without a zero
        return F.linear(x, w + (rounded - w).detach(), self.bias)


class Signs(nn.Linear):
    """A binary network: no weight of it is zero."""

    def forward(self, x):
        return F.linear(x, torch.where(self.weight >= 0, 1.0, -1.0) + 0 * self.weight)


class ByTheParent(nn.Module):
    """The layer is plain; its parent applies another weight."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return x @ (self.fc.weight - self.fc.weight.mean(1, keepdim=True)).T


class Einsum(nn.Linear):
    def forward(self, x):
        w = self.weight
        return torch.einsum("bi,oi->bo", x, w.exp())


class Shifted(nn.Module):
    def forward(self, w):
        return w + 0.1


def parametrised(layer, name, module):
    parametrize.register_parametrization(layer, name, module)
    return layer


class OldHook(nn.Linear):
    """A weight that a pre-hook computes, as torch.nn.utils.weight_norm does it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_forward_pre_hook(lambda module, _: setattr(module, "applied", module.weight - 0.3))

    def forward(self, x):
        return F.linear(x, self.applied, self.bias)


TRANSFORMED = {
    "standardised": lambda: nn.Sequential(Standardised(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)),
    "low-rank delta": lambda: LowRankDelta(6, 3),
    "quantised with an offset": lambda: OffsetQuantised(6, 3),
    "binary": lambda: Signs(6, 3),
    "by the parent": ByTheParent,
    "einsum of exp": lambda: Einsum(6, 3),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Linear(6, 3)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 3)),
    "weight_norm of a GRU cell": lambda: parametrizations.weight_norm(nn.GRUCell(6, 3), "weight_hh"),
    "shifted": lambda: parametrised(nn.Linear(6, 3), "weight", Shifted()),
    "hook": lambda: OldHook(6, 3),
}  # fmt: skip


@pytest.mark.trap(41)
@pytest.mark.parametrize("kind", TRANSFORMED)
@pytest.mark.parametrize("method", ["random", "snip", "ntk-sap"])
def test_a_weight_whose_zeros_are_lost_is_refused_by_name(kind, method):
    model = TRANSFORMED[kind]()
    x = IMAGES if kind == "standardised" else ROWS
    with pytest.raises(UnsupportedModelError, match=r"Zeros in the parameter '.*weight.*exclude="):
        sapwood.prune(model, method=method, sparsity=0.5, batches=batches(x))


ALONE = sorted(set(TRANSFORMED) - {"by the parent", "hook"})


@pytest.mark.trap(41)
@pytest.mark.parametrize("kind", ALONE)
def test_without_an_input_layers_are_run_by_themselves(kind):
    with pytest.raises(UnsupportedModelError, match="Zeros in the parameter"):
        sapwood.prune(TRANSFORMED[kind](), method="magnitude", sparsity=0.5)


class Scaled(nn.Linear):
    """Zeros stay: a scale, a norm, a quantisation with a zero, a transpose, a mask."""

    def __init__(self, *sizes, kind):
        super().__init__(*sizes)
        self.kind = kind
        self.gain = nn.Parameter(torch.rand(sizes[1]))

    def forward(self, x):
        w = self.weight
        if self.kind == "normalised":
            return F.linear(x, F.normalize(w, dim=1), self.bias)
        if self.kind == "scale":
            return F.linear(x, w / w.abs().max() * self.gain[:, None], self.bias)
        if self.kind == "straight-through":
            return F.linear(x, w + ((w / 0.1).round() * 0.1 - w).detach(), self.bias)
        if self.kind == "transposed":
            return x @ w.t().contiguous() / w.norm()
        if self.kind == "cut":
            return torch.cat([F.linear(x, part) for part in w.chunk(3)], 1)
        return torch.stack([(x * row).sum(1) for row in w.unbind()], 1)


@pytest.mark.parametrize("kind", ["normalised", "scale", "straight-through", "transposed", "cut", "by rows"])
def test_a_weight_whose_zeros_stay_is_pruned(kind):
    model = Scaled(6, 3, kind=kind)
    masks = sapwood.prune(model, method="snip", sparsity=0.5, batches=batches()).masks
    assert masks.kept == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sapwood.prune(model, method="magnitude", sparsity=0.5)


def test_spectral_norm_keeps_zeros_and_is_pruned():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    assert sapwood.prune(model, method="snip", sparsity=0.5, batches=batches()).masks.kept == 36


@pytest.mark.trap(41)
def test_the_other_doors_refuse_it_too():
    model = TRANSFORMED["low-rank delta"]()
    masks = sapwood.Masks({"weight": torch.rand(3, 6) > 0.5})
    for call in (
        lambda: ntk.kernel(model, ROWS, masks),
        lambda: effective(model, masks, input_shape=(6,)),
        lambda: diagnose(model, masks, input_shape=(6,)),
        lambda: sapwood.check_score(model, (6,)),
    ):
        with pytest.raises(UnsupportedModelError, match="Zeros in the parameter 'weight'"):
            call()
    assert ntk.kernel(model, ROWS, parameters="weight").shape == (24, 24)  # the dense kernel is what it is


@pytest.mark.trap(41)
@pytest.mark.parametrize("kind", sorted(set(ALONE) - {"weight_norm", "weight_norm of a GRU cell"}))
def test_masks_from_elsewhere_are_refused_when_they_are_attached(kind):
    model = TRANSFORMED[kind]()
    weights = {n: p for n, p in model.named_parameters() if n.endswith(("weight", "weight.original")) and p.dim() > 1}
    masks = sapwood.Masks({name: torch.rand(weight.shape) > 0.5 for name, weight in weights.items()})
    luck, before = torch.get_rng_state(), state_of(model)
    with pytest.raises(UnsupportedModelError, match="Zeros in the parameter"):
        sapwood.attach(masks, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_untouched(model, before)
    assert torch.equal(luck, torch.get_rng_state())


def test_weight_norm_may_be_attached_to_masks_that_leave_every_unit_a_weight():
    model = parametrizations.weight_norm(nn.Linear(6, 3))
    name = "parametrizations.weight.original1"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    some = torch.arange(18).reshape(3, 6) % 2 == 0
    sapwood.attach(sapwood.Masks({name: some}), model, optimizer)
    assert not model.weight[~some].any()
    with pytest.raises(UnsupportedModelError, match="0/0"):
        sapwood.attach(sapwood.Masks({name: some & (torch.arange(3) > 0)[:, None]}), model, optimizer)


def test_a_layer_that_cannot_be_run_alone_is_named():
    class Odd(nn.Linear):
        def forward(self, x, table):
            return F.linear(x + table["shift"], self.weight)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd(6, 3)

        def forward(self, x):
            return self.odd(x, {"shift": 1.0})

    with pytest.warns(SapwoodWarning, match=r"could not be checked .*'odd.weight'.*input_shape="):
        sapwood.prune(Net(), method="magnitude", sparsity=0.5)
    assert sapwood.prune(Net(), method="magnitude", sparsity=0.5, input_shape=(6,)).masks.kept == 9


def test_a_weight_that_no_torch_function_takes_is_refused():
    @torch.jit.script
    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, w.t())

    class Scripted(nn.Linear):
        def forward(self, x):
            return product(x, self.weight)

    with pytest.raises(UnsupportedModelError, match=r"How the parameter 'weight' is applied cannot be seen"):
        sapwood.prune(Scripted(6, 3), method="snip", sparsity=0.5, batches=batches())


# 2. A forward that reaches the user's own tensors.


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def closure():
    model = base()
    for layer in (model[0], model[1]):
        plain = layer.forward
        layer.forward = lambda x, plain=plain: plain(x)
    return model


def captured_batchnorm():
    model = base()
    norm = model[1]
    model[1].forward = lambda x: F.batch_norm(x, norm.running_mean, norm.running_var, training=True)
    return model


def hooked():
    model = base()
    other = nn.Linear(8, 8)
    model.other = other
    model[2].register_forward_hook(lambda module, inputs, output: output + other(output))
    return model


def weak():
    class Reader(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = weakref.ref(layer)

        def forward(self, x):
            return self.layer()(x)

    model = base()
    model[3] = nn.Sequential(Reader(model[0]), nn.Linear(8, 3))
    model[2] = nn.Linear(8, 6)
    return model


def bound_parameter():
    model = base()
    weight = model[3].weight
    model[3].forward = lambda x: F.linear(x, weight)
    return model


@pytest.mark.trap(42)
@pytest.mark.parametrize("build", [closure, captured_batchnorm, hooked, weak, bound_parameter])
@pytest.mark.parametrize("method", ["random", "snip", "grasp", "ntk-sap", "synflow"])
def test_a_forward_on_the_users_own_tensors_is_refused_before_it_touches_them(build, method):
    model = build().train()
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"runs on its own '[\w.]+' and not on the copy"):
        sapwood.prune(model, method=method, sparsity=0.5, batches=batches())
    assert_untouched(model, before)


class Renormalised(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.div_(self.weight.norm())
        return super().forward(x)


class ByData(nn.Linear):
    def forward(self, x):
        self.weight.data.clamp_(-0.05, 0.05)  # which no version counter shows
        return super().forward(x)


@pytest.mark.trap(43)
@pytest.mark.parametrize("kind", [Renormalised, ByData])
@pytest.mark.parametrize("method", ["magnitude", "snip", "ntk-sap"])
def test_a_layer_that_writes_into_its_weight_is_refused_and_nothing_is_written(kind, method):
    model = nn.Sequential(kind(6, 8), nn.ReLU(), nn.Linear(8, 3))
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"writes into its own parameter '0\.weight'"):
        sapwood.prune(model, method=method, sparsity=0.5, batches=batches())
    assert_untouched(model, before)
    if method == "magnitude":
        with pytest.raises(UnsupportedModelError, match=r"writes into its own parameter '0\.weight'"):
            sapwood.prune(model, method=method, sparsity=0.5)
        assert_untouched(model, before)


@pytest.mark.trap(43)
@pytest.mark.parametrize("method", ["snip", "grasp", "ntk-sap"])
@pytest.mark.parametrize("mode", [True, False])
def test_max_norm_embeddings_stay_what_they_are(method, mode):
    model = nn.Sequential(nn.EmbeddingBag(10, 4, max_norm=1.0), nn.Linear(4, 3)).train(mode)
    with torch.no_grad():
        model[0].weight.mul_(5)
    before = state_of(model)
    x = torch.randint(0, 10, (8, 5))
    masks = sapwood.prune(model, method=method, sparsity=0.5, batches=batches(x)).masks
    assert_untouched(model, before)

    with torch.no_grad():
        plain = nn.Sequential(nn.EmbeddingBag.from_pretrained(model[0].weight.detach().clone()), model[1])
        plain[0].weight.renorm_(2, 0, 1.0)
    if method != "ntk-sap":  # which draws from another number of parameters
        assert sapwood.prune(plain, method=method, sparsity=0.5, batches=batches(x)).masks == masks


def test_a_copy_that_shares_modules_with_the_model_is_refused():
    class Singleton(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(Singleton(6, 3))
    with pytest.raises(UnsupportedModelError, match=r"'0'.*its own copy"):
        sapwood.prune(model, method="magnitude", sparsity=0.5)


# 3. A forward that is random in eval mode.


class Dropped(nn.Module):
    def __init__(self, draw):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.draw = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 3), draw

    def forward(self, x):
        return self.c(self.draw(torch.tanh(self.b(self.draw(torch.tanh(self.a(x)))))))


def numpy_noise(x):
    return x * torch.from_numpy(np.random.rand(*x.shape)).to(x.dtype)


OWN = torch.Generator().manual_seed(3)
RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "noise": lambda x: x + 0.5 * torch.randn_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.7)),
    "numpy": numpy_noise,
}


def total(model, epsilon, criterion=sapwood.NtkSap):
    seen = []

    def spy(net, masks, data, generator):
        seen.append(criterion(epsilon=epsilon)(net, masks, data, generator))
        return seen[0]

    sapwood.prune(model, method=spy, sparsity=0.5, input_shape=(6,))
    return sum(float(score.sum()) for score in seen[0].values())


@pytest.mark.trap(44)
@pytest.mark.parametrize("kind", RANDOM)
def test_ntk_sap_compares_passes_of_equal_noise(kind):
    model = Dropped(RANDOM[kind])
    assert total(model, 1e-4) / total(model, 1e-6) == pytest.approx(100, rel=0.1)
    with isolated(0, CPU):
        assert opened(model, Data.collect(None, (6,), CPU)).noise is Noise.SEEDED


@pytest.mark.trap(44)
@pytest.mark.parametrize("kind", RANDOM)
def test_grasp_differentiates_one_function(kind):
    # With equal noise in both passes, w.Hg sums to d/dt |g(tw)|^2/2 at t = 1, here by differences.
    model, seen = Dropped(RANDOM[kind]).double(), {}

    def spy(net, masks, data, generator):
        seen["scores"] = sapwood.Grasp(temperature=1.0)(net, masks, data, generator)
        held = net.held()

        def half_square(scale):
            leaves = {n: (scale * w).requires_grad_() for n, w in net.weights.items()}
            loss = held.loss(leaves, data.batches[0]) * len(LABELS)
            return sum(float(g.square().sum()) for g in net.differentiate(loss, leaves).values()) / 2

        seen["slope"] = (half_square(1 + 1e-5) - half_square(1 - 1e-5)) / 2e-5
        return seen["scores"]

    sapwood.prune(model, method=spy, sparsity=0.5, batches=batches(ROWS.double()))
    found = sum(float(score.sum()) for score in seen["scores"].values())
    if kind == "dropout":  # the others draw other noise at another state of the generators
        assert abs(found) > 0
    assert np.sign(found) == np.sign(seen["slope"])


@pytest.mark.trap(44)
def test_noise_that_cannot_be_held_is_refused_by_what_compares_passes_only():
    model = Dropped(lambda x: x + torch.randn(x.shape, generator=OWN))
    for method in ("ntk-sap", "grasp"):
        with pytest.raises(UnsupportedModelError, match="other outputs in a second pass"):
            sapwood.prune(model, method=method, sparsity=0.5, batches=batches())
    assert sapwood.prune(model, method="snip", sparsity=0.5, batches=batches()).masks.kept == 656


def test_a_model_without_noise_is_not_taken_for_a_random_one():
    model = base().train()
    with isolated(0, CPU):
        net = opened(model, Data.collect(batches(), None, CPU))
    assert net.noise is Noise.NONE and net.held() is net and net.unseen == () and net.written == frozenset()


# 4. Gradients that are missing, and scores without information.


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Detached(Square):
    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0].detach() * g


class Numpy(Square):
    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(2 * ctx.saved_tensors[0].detach().numpy() * g.detach().numpy())


class Twice(Square):
    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Custom(nn.Module):
    def __init__(self, square):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.square = nn.Linear(6, 8), nn.Linear(8, 3), square

    def forward(self, x):
        return self.b(self.square(self.a(x)))


SECOND = {
    "grasp": {},
    "prospr": {},
    "obs": {"curvature": "exact", "damping": 10.0},
    "obd": {"diagonal": "hutchinson"},
}


@pytest.mark.trap(45)
@pytest.mark.parametrize("function", [Square, Detached, Numpy])
@pytest.mark.parametrize("method", SECOND)
def test_a_second_derivative_that_was_not_recorded_is_no_zero(function, method):
    model = Custom(function.apply)
    with pytest.raises(UnsupportedModelError, match=r"twice|[Ss]econd derivative"):
        sapwood.prune(model, method=method, sparsity=0.5, batches=batches(), **SECOND[method])


@pytest.mark.parametrize("method", SECOND)
def test_a_custom_function_with_second_derivatives_scores_like_the_operator(method):
    one, other = (
        sapwood.prune(Custom(square), method=method, sparsity=0.5, batches=batches(), **SECOND[method]).masks
        for square in (Twice.apply, lambda x: x * x)
    )
    assert one == other


@pytest.mark.parametrize("function", [Square, Detached, Numpy])
def test_first_derivatives_of_such_functions_are_right(function):
    one, other = (
        sapwood.prune(Custom(square), method="snip", sparsity=0.5, batches=batches()).masks
        for square in (function.apply, lambda x: x * x)
    )
    assert one == other


class Auxiliary(nn.Module):
    """A second head that runs in training mode only."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.relu(self.body(x))
        return self.head(hidden) + self.auxiliary(hidden) if self.training else self.head(hidden)


class Frozen(Auxiliary):
    def forward(self, x):
        hidden = torch.relu(self.body(x))
        return self.head(hidden) + self.auxiliary(hidden).detach()


@pytest.mark.trap(46)
@pytest.mark.parametrize("kind", [Auxiliary, Frozen])
@pytest.mark.parametrize("method", ["snip", "grasp", "ntk-sap", "taylor", "synflow", "iter-snip"])
def test_a_layer_that_nothing_depends_on_is_named(kind, method):
    with pytest.raises(ScoreError, match=r"nothing to score 'auxiliary.weight'.*exclude=\('auxiliary.weight',\)"):
        sapwood.prune(kind(), method=method, sparsity=0.5, batches=batches())
    masks = sapwood.prune(kind(), method=method, sparsity=0.5, batches=batches(), exclude=("auxiliary.weight",)).masks
    assert list(masks) == ["body.weight", "head.weight"]


def test_a_layer_that_nothing_runs_is_said_where_nothing_is_differentiated():
    with pytest.warns(SapwoodWarning, match=r"are not run by the forward.*'auxiliary.weight'"):
        sapwood.prune(Auxiliary(), method="magnitude", sparsity=0.5, input_shape=(6,))


def saturated(output, target):
    return (output * 0).relu().sum() + output.sum() * 0


@pytest.mark.trap(46)
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), {"batches": [(ROWS, torch.zeros(8).long())]}),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), {"batches": batches(), "loss": saturated}),
        (nn.Sequential(nn.Linear(6, 3)), {"batches": [(ROWS, LABELS)], "loss": lambda o, t: o.mean() * 0}),
    ],
)
def test_scores_that_are_all_zero_are_an_error(model, options):
    for method in ("snip", "taylor", "force"):
        with pytest.raises(ScoreError, match="every weight that is left the score 0"):
            sapwood.prune(model, method=method, sparsity=0.5, **options)


def test_a_dead_network_is_an_error_and_a_dead_layer_none():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # every unit is off: only the last bias matters
    with pytest.raises(ScoreError, match="the score 0"):
        sapwood.prune(model, method="snip", sparsity=0.5, batches=batches())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(ScoreError, match="the score 0"):
        sapwood.prune(model, method="magnitude", sparsity=0.5)


@pytest.mark.trap(46)
def test_a_budget_that_ends_among_scores_of_zero_says_so():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias[2:] = -100.0  # six of eight units are off
    with pytest.warns(SapwoodWarning, match=r"36 of the 54 .* score 0 .* position only"):
        sapwood.prune(model, method="snip", density=0.75, batches=batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sapwood.prune(model, method="snip", density=18 / 72, batches=batches())  # as many as matter


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a, self.m, self.b, self.reentrant = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), reentrant

    def forward(self, x):
        return self.b(checkpoint(lambda t: torch.relu(self.m(t)), self.a(x), use_reentrant=self.reentrant))


@pytest.mark.trap(47)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["snip", "grasp", "ntk-sap", "synflow", "prospr", "ntk-sap-jvp"])
def test_recomputation_is_refused_with_the_way_to_turn_it_off(reentrant, method):
    model = Checkpointed(reentrant)
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"set_grad_checkpointing\(False\)|method='ntk-sap'"):
        sapwood.prune(model, method=method, sparsity=0.5, batches=batches())
    assert_untouched(model, before)


@pytest.mark.trap(47)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_kernels_of_recomputing_models_are_refused_too(reentrant):
    for call in (ntk.kernel, ntk.trace):
        with pytest.raises(UnsupportedModelError, match=r"set_grad_checkpointing\(False\)"):
            call(Checkpointed(reentrant), ROWS)


def test_the_look_leaves_no_trace():
    model = base().train()
    model.counter = 0
    before, luck, modes = state_of(model), torch.get_rng_state(), [m.training for m in model.modules()]
    twin = copy.deepcopy(model)
    sapwood.prune(model, sparsity=0.5, input_shape=(6,))
    assert_untouched(model, before)
    assert torch.equal(luck, torch.get_rng_state()) and modes == [m.training for m in model.modules()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in twin.named_modules()]


# Found by tests/test_any_model.py.

FEW = {"ntk-sap": {"rounds": 1, "resamples": 1}} | {flow: {"rounds": 2} for flow in ("synflow", "synflow-l2", "px")}
"""Fields that make the slow methods quick."""


class Product(nn.Linear):
    """A square weight that is rearranged before it is applied, so that its shape does not tell."""

    def __init__(self, move):
        super().__init__(6, 6)
        self.move = move

    def forward(self, x):
        return self.move(x, self.weight)


REARRANGED = {
    "transposed": lambda x, w: x @ w.T,
    "transposed and scaled": lambda x, w: x @ (w / w.norm()).t(),
    "addmm": lambda x, w: torch.addmm(x, x, w.t()),
    "flipped": lambda x, w: F.linear(x, w.flip(0, 1)),
    "rolled": lambda x, w: F.linear(x, w.roll(1, 0)),
    "shuffled": lambda x, w: F.linear(x, w[torch.tensor([3, 1, 0, 2, 5, 4])]),
    "by columns": lambda x, w: sum(x[:, i : i + 1] * w[:, i] for i in range(6)),
    "by columns, copied": lambda x, w: sum(x[:, i : i + 1] * (2 * w)[:, [i]].mT for i in range(6)),
    "sparse": lambda x, w: torch.sparse.mm(w.to_sparse(), x.T).T,
    "in frequencies": lambda x, w: torch.fft.irfft(torch.fft.rfft(x) @ torch.fft.rfft(w)[:4].mT, n=6),
    "as a kernel": lambda x, w: F.conv1d(x[:, :, None], w.t()[:, :, None])[:, :, 0],
}


@pytest.mark.trap(41)
@pytest.mark.parametrize("kind", REARRANGED)
def test_a_square_weight_may_be_rearranged(kind):
    model = nn.Sequential(Product(REARRANGED[kind]), nn.Tanh(), nn.Linear(6, 3))
    assert sapwood.prune(model, method="snip", sparsity=0.5, batches=batches()).masks.kept == 27


@pytest.mark.trap(41)
@pytest.mark.parametrize(
    "add", [lambda w: w.t() + 0.1, lambda w: w.flip(0) - w.mean(), lambda w: w.t() + w, F.softplus]
)
def test_a_rearranged_weight_whose_zeros_are_lost_is_refused(add):
    model = nn.Sequential(Product(lambda x, w: x @ add(w)), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(UnsupportedModelError, match=r"Zeros in the parameter '0\.weight'"):
        sapwood.prune(model, method="random", sparsity=0.5, batches=batches())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["snip", "obd", "ntk-sap", "synflow"])
def test_statistics_in_half_precision_follow_their_weights(dtype, method):
    """A BatchNorm of float32 weights and half statistics is one that torch does not run."""
    half = base().to(dtype)
    fields = {"method": method, "sparsity": 0.5, "batches": [(ROWS.to(dtype), LABELS)], **FEW.get(method, {})}
    before = state_of(half)
    found = sapwood.prune(half, **fields).masks
    assert_untouched(half, before)
    assert found == sapwood.prune(copy.deepcopy(half).float(), **fields).masks


class Counting(nn.Module):
    """A forward that counts its passes in an integer buffer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.passes += 1
        return self.fc(x)


@pytest.mark.trap(42)
@pytest.mark.parametrize("method", ["synflow", "synflow-l2", "px", "snip", "ntk-sap", "obd"])
def test_a_pass_counts_in_no_buffer_of_the_user(method):
    model = Counting()
    before = state_of(model)
    sapwood.prune(model, method=method, sparsity=0.5, batches=batches(), **FEW.get(method, {}))
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["obd", "obs"])
def test_a_norm_without_statistics_of_one_sample_says_so(method):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(UnsupportedModelError, match=r"none of a single sample.*running statistics.*'snip'"):
        sapwood.prune(model, method=method, sparsity=0.5, batches=batches())


@pytest.mark.trap(47)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_tangents_of_recomputing_models_are_refused_in_words(reentrant):
    with pytest.raises(UnsupportedModelError, match=r"set_grad_checkpointing\(False\)"):
        sapwood.prune(Checkpointed(reentrant), method="ntt", sparsity=0.5, batches=batches(), rounds=1, interval=1)


def test_forward_mode_names_the_way_out_where_a_layer_writes():
    model = nn.Sequential(nn.EmbeddingBag(10, 4, max_norm=1.0), nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match=r"method='ntk-sap'"):
        sapwood.prune(model, method="ntk-sap-jvp", sparsity=0.5, batches=batches(torch.randint(0, 10, (8, 5))))


class OpenNormed(Custom):
    """It does not take a single sample."""

    def __init__(self, square):
        super().__init__(square)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, x):
        return self.b(self.square(self.norm(self.a(x))))


class InFloat(Custom):
    """It does not run in float64."""

    def forward(self, x):
        return F.linear(self.square(self.a(x)).float(), self.b.weight, self.b.bias)


@pytest.mark.trap(45)
@pytest.mark.parametrize("kind", [OpenNormed, InFloat])
@pytest.mark.parametrize("method", ["grasp", "prospr"])
def test_second_derivatives_are_looked_at_however_the_model_runs(kind, method):
    for function in (Detached, Numpy):
        with pytest.raises(UnsupportedModelError, match=r"Second derivatives|not be differentiated|twice"):
            sapwood.prune(kind(function.apply), method=method, sparsity=0.5, batches=batches())
    one, other = (
        sapwood.prune(kind(square), method=method, sparsity=0.5, batches=batches()).masks
        for square in (Twice.apply, lambda x: x * x)
    )
    assert one == other


class Mixed(nn.Module):
    """Layers in float32 and float64, in either order."""

    def __init__(self, first, second):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, dtype=first))
        self.a, self.b = nn.Linear(6, 8).to(first), nn.Linear(8, 3).to(second)

    def forward(self, x):
        return self.b(torch.relu(self.a(x * self.scale)).to(self.b.weight.dtype))


class Behind(Mixed):
    """The first layer that is pruned is not the first that is run."""

    def __init__(self, first, second):
        super().__init__(second, first)

    def forward(self, x):
        shift = self.b(torch.cat([x, x], 1)[:, :8]).mean(1, keepdim=True)
        return self.a((x + shift).to(self.a.weight.dtype))


@pytest.mark.parametrize("kind", [Mixed, Behind])
@pytest.mark.parametrize("precisions", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("method", ["snip", "grasp", "ntk-sap", "synflow"])
def test_the_precision_of_inputs_is_found_by_looking(kind, precisions, method):
    model = kind(*precisions)
    whole = copy.deepcopy(model).double()
    for x in (ROWS, ROWS.double()):
        fields = {"method": method, "sparsity": 0.5, "batches": batches(x), **FEW.get(method, {})}
        masks = sapwood.prune(model, **fields).masks
        if method != "ntk-sap":  # whose draws in float32 are others
            assert masks == sapwood.prune(whole, **fields).masks
    assert sapwood.prune(model, method="ntk-sap", sparsity=0.5, input_shape=(6,), rounds=1, samples=4).masks
