"""Positive flows: one function written twice has one score; no flow, no score; sums over paths by walking."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nets import Residual, TinyViT
from sapwood import PX, FunctionalModel, Masks, SynFlow, SynFlowL2, UnsupportedModelError, prune
from sapwood.diagnosis import diagnose, effective
from sapwood.flow import moves, positive
from scoring import data, flat, generator, random_masks

CRITERIA = {"synflow": SynFlow(), "synflow-l2": SynFlowL2(), "px": PX()}


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def centred(x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5)


def by_both_moments(x):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / ((x * x).mean(-1, keepdim=True) - mean**2 + 1e-5).sqrt()


def grouped(x):
    parts = x.view(len(x), 2, 4)
    variance, mean = torch.var_mean(parts, -1, correction=0, keepdim=True)
    return ((parts - mean) * (variance + 1e-5).rsqrt()).view(x.shape)


def shifted_softmax(x):
    rising = torch.exp(x - x.max(1, keepdim=True)[0])
    return rising / rising.sum(1, keepdim=True)


def cut_below(x):
    y = x.clone()
    y[y < 0] = 0.0
    return y


def in_halves(x):
    out = torch.zeros(len(x), 8)
    out[:, :4], out[:, 4:] = x[:, :4].relu(), x[:, 4:].relu()
    return out


def gated_halves(x):
    first, second = x.chunk(2, -1)
    return torch.cat([first * second.sigmoid()] * 2, -1)


RMS = nn.RMSNorm(8, eps=1e-6, elementwise_affine=False)
LAYER = nn.LayerNorm(8, elementwise_affine=False)
ROOT = math.sqrt(2 / math.pi)
PAIRS = {
    "rms by rsqrt": (RMS, lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "rms by root": (RMS, lambda x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)),
    "rms by norm": (RMS, lambda x: x / x.norm(dim=-1, keepdim=True) * math.sqrt(8)),
    "rms by normalize": (RMS, lambda x: F.normalize(x, dim=-1) * 8**0.5),
    "rms in float32": (
        RMS,
        lambda x: (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).type_as(x),
    ),
    "layer norm": (LAYER, centred),
    "layer norm by std": (
        LAYER,
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + 1e-6),
    ),
    "layer norm by moments": (LAYER, by_both_moments),
    "group norm": (nn.GroupNorm(2, 8, affine=False), grouped),
    "silu": (nn.SiLU(), lambda x: x * torch.sigmoid(x)),
    "silu by exp": (nn.SiLU(), lambda x: x / (1 + torch.exp(-x))),
    "gelu": (nn.GELU(), lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "gelu by tanh": (nn.GELU("tanh"), lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0))))),
    "mish": (nn.Mish(), lambda x: x * torch.tanh(torch.log1p(x.exp()))),
    "hardswish": (nn.Hardswish(), lambda x: x * (x + 3).clamp(0, 6) / 6),
    "hardswish by relu6": (nn.Hardswish(), lambda x: x * F.relu6(x + 3) / 6),
    "hardsigmoid": (nn.Hardsigmoid(), lambda x: F.relu6(x + 3) / 6),
    "leaky by where": (nn.LeakyReLU(0.1), lambda x: torch.where(x > 0, x, 0.1 * x)),
    "leaky by maximum": (nn.LeakyReLU(0.1), lambda x: torch.maximum(x, 0.1 * x)),
    "prelu": (nn.PReLU(), lambda x: torch.where(x >= 0, x, 0.25 * x)),
    "relu by clamp": (nn.ReLU(), lambda x: x.clamp(min=0)),
    "relu by maximum": (nn.ReLU(), lambda x: torch.maximum(x, torch.zeros_like(x))),
    "relu by a mask": (nn.ReLU(), lambda x: x * (x > 0)),
    "relu by |x|": (nn.ReLU(), lambda x: (x + x.abs()) / 2),
    "relu by assignment": (nn.ReLU(), cut_below),
    "relu into parts": (nn.ReLU(), in_halves),
    "relu row by row": (nn.ReLU(), lambda x: torch.stack([row.relu() for row in x])),
    "relu6": (nn.ReLU6(), lambda x: x.clamp(0, 6)),
    "elu": (nn.ELU(), lambda x: torch.where(x > 0, x, torch.expm1(x))),
    "softplus": (nn.Softplus(), lambda x: torch.log(1 + torch.exp(x))),
    "sigmoid": (nn.Sigmoid(), lambda x: 1 / (1 + torch.exp(-x))),
    "sigmoid by tanh": (nn.Sigmoid(), lambda x: 0.5 * (1 + torch.tanh(x / 2))),
    "tanh": (nn.Tanh(), lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())),
    "softmax": (nn.Softmax(1), lambda x: x.exp() / x.exp().sum(1, keepdim=True)),
    "softmax from the maximum": (nn.Softmax(1), shifted_softmax),
    "log-softmax": (nn.LogSoftmax(1), lambda x: x - x.exp().sum(1, keepdim=True).log()),
    "log of softmax": (nn.LogSoftmax(1), lambda x: torch.log(torch.softmax(x, 1))),
    "nothing, and log-softmax": (nn.Identity(), lambda x: F.log_softmax(x, 1)),
    "nothing, and dropout": (nn.Identity(), lambda x: F.dropout(x, 0.5)),
    "nothing, and a constant matrix": (nn.Identity(), lambda x: x @ torch.eye(8)),
    "glu": (Function(lambda x: torch.cat([F.glu(x)] * 2, -1)), gated_halves),
    "squared relu": (Function(lambda x: F.relu(x) ** 2), lambda x: F.relu(x) * F.relu(x)),
}


def around(middle: nn.Module, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=bias), middle, nn.Linear(8, 8, bias=bias), middle, nn.Linear(8, 3, bias=bias)
    )


def assert_alike(one: nn.Module, two: nn.Module, batches: list) -> None:
    """Scores, effective masks and numbers of paths of two models with the same parameters under the same masks."""
    first, second = FunctionalModel.of(one), FunctionalModel.of(two)
    masks = random_masks(first, 0.7)
    for name, criterion in CRITERIA.items():
        scores, others = (flat(criterion(net, masks, data(batches), generator())) for net in (first, second))
        assert scores.any(), name
        torch.testing.assert_close(others, scores, rtol=1e-9, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert effective(one, masks, batches=batches) == effective(two, masks, batches=batches)
    paths = [diagnose(model, masks, batches=batches).log10_paths for model in (one, two)]
    assert paths[0] == pytest.approx(paths[1], abs=1e-9)


@pytest.mark.trap(58)
@pytest.mark.parametrize("name", PAIRS)
def test_one_function_written_twice_has_one_score(name):
    module, function = PAIRS[name]
    batch = torch.randn(5, 6, generator=generator())
    assert_alike(around(module), around(Function(function)), [(batch, None)])


class Attention(nn.Module):
    """A transformer's block with everything written by hand, or by torch."""

    def __init__(self, way: str, causal: bool, tokens: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.begin = nn.Embedding(11, 8) if tokens else nn.Linear(6, 8)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 5, 8))
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)
        self.way, self.causal = way, causal
        self.register_buffer("seen", torch.ones(5, 5).tril())

    def normed(self, x):
        if self.way == "torch":
            return self.norm(x)
        return centred(x) * self.norm.weight + self.norm.bias

    def mixed(self, q, k, v):
        scores = q @ k.transpose(-2, -1) / math.sqrt(4)
        if self.way == "fill":
            scores = scores.masked_fill(self.seen == 0, -math.inf) if self.causal else scores
            return F.dropout(scores.softmax(-1), 0.1, self.training) @ v
        if self.way == "where":
            scores = torch.where(self.seen.bool(), scores, torch.finfo(scores.dtype).min) if self.causal else scores
            return scores.float().softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        scores = scores + torch.full((5, 5), -1e9).triu(1) if self.causal else scores
        return torch.einsum("bhqk,bhkd->bhqd", shifted_softmax(scores.mT).mT, v)

    def attend(self, x):
        q, k, v = (part.view(len(x), 5, 2, 4).transpose(1, 2) for part in self.qkv(x).split(8, -1))
        if self.way == "torch":
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            mixed = self.mixed(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x):
        x = self.begin(x) + self.positions
        x = x + self.attend(self.normed(x))
        hidden = self.up(self.normed(x))
        hidden = F.gelu(hidden) if self.way == "torch" else 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        return self.head(self.normed(x + self.down(hidden)).mean(1))


@pytest.mark.trap(59)
@pytest.mark.parametrize("way", ["fill", "where"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_hand_is_torch_s_also_under_a_mask(way, causal):
    batch = torch.randn(4, 5, 6, generator=generator())
    assert_alike(Attention("torch", causal), Attention(way, causal), [(batch, None)])


@pytest.mark.trap(59)
def test_a_flow_begins_at_the_rows_of_an_embedding():
    ids = torch.randint(0, 11, (4, 5), generator=generator())
    assert_alike(Attention("torch", True, tokens=True), Attention("fill", True, tokens=True), [{"x": ids}])


@pytest.mark.trap(59)
def test_under_a_causal_mask_nothing_flows_back():
    """The last token does not reach the first output."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            x = torch.stack([self.early(x), self.late(x)], 1)
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]

    scores = SynFlow()(
        net := FunctionalModel.of(First()), Masks.dense(net.weights), data(input_shape=(4,)), generator()
    )
    assert scores["early.weight"].all() and not scores["late.weight"].any()


class Convolutional(nn.Module):
    """BatchNorm, depthwise layer, GroupNorm, squeeze-and-excitation and pools by hand, or by torch."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.deep = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn, self.gn = nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.squeeze, self.excite, self.fc = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 3)
        with torch.no_grad():
            for tensor in (self.bn.running_mean, self.bn.weight, self.bn.bias):
                tensor.normal_()
            self.bn.running_var.uniform_(0.5, 2)
        self.by_hand = by_hand

    def forward(self, x):
        return self.hand(x) if self.by_hand else self.torch(x)

    def torch(self, x):
        x = F.hardswish(self.bn(self.stem(x)))
        y = self.gn(self.deep(x))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.fc(F.max_pool2d(F.relu(x + y), 2).mean((2, 3)))

    def hand(self, x):
        mean, var, scale, shift = (
            t.view(1, -1, 1, 1) for t in (self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        )
        x = (self.stem(x) - mean) / torch.sqrt(var + self.bn.eps) * scale + shift
        x = x * F.relu6(x + 3) / 6
        y = self.deep(x)
        parts = y.reshape(len(y), 2, -1)
        parts = parts - parts.mean(-1, keepdim=True)
        parts = parts / (parts.square().mean(-1, keepdim=True) + self.gn.eps).sqrt()
        y = parts.view(y.shape) * self.gn.weight[:, None, None] + self.gn.bias[:, None, None]
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        x = (x + y * (gate + 3).clamp(0, 6) / 6).clamp_min(0)
        return self.fc(F.max_pool2d(x, 2).flatten(2).mean(-1))


@pytest.mark.trap(58)
def test_a_convolutional_network_by_hand():
    batch = torch.randn(4, 2, 6, 6, generator=generator())
    assert_alike(Convolutional(by_hand=False), Convolutional(by_hand=True), [(batch, None)])


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return gradient * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


NO_FLOWS = {
    "cos": (torch.cos, "linear.*turns round"),
    "sin": (torch.sin, "linear.*turns round"),
    "a bell": (lambda x: torch.exp(-x * x), "falls"),
    "a falling function": (lambda x: 1 / (1 + x.abs()), "falls"),
    "one minus a gate": (lambda x: 1 - x.sigmoid(), "falls"),
    "the negative side": (lambda x: F.relu(-x), "vanishes"),
    "a difference of absolute values": (lambda x: x.abs() - x.relu(), "sub.*subtracts one flow from another"),
    "a difference of parts": (lambda x: torch.cat([x[:, :4] - x[:, 4:]] * 2, 1), "sub.*subtracts one flow"),
    "a quotient of parts": (lambda x: torch.cat([x[:, :4] / x[:, 4:]] * 2, 1), "div.*divides by a flow"),
    "an order": (lambda x: x.sort(-1)[0], "sort.*not known"),
    "complex numbers": (lambda x: torch.fft.fft(x).real, "fft.*complex"),
    "values in Python": (lambda x: x / x.norm().item(), "item.*into Python"),
    "a function of one's own": (Swish.apply, "SwishBackward.*cannot look"),
}


@pytest.mark.trap(60)
@pytest.mark.parametrize("name", NO_FLOWS)
def test_what_is_no_flow_is_refused_by_name(name):
    function, message = NO_FLOWS[name]
    model = around(Function(function))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    net = FunctionalModel.of(model)
    masks, batches = Masks.dense(net.weights), [(torch.randn(5, 6), None)]
    for criterion in CRITERIA.values():
        with pytest.raises(UnsupportedModelError, match=message):
            criterion(net, masks, data(batches), generator())
    with pytest.raises(UnsupportedModelError, match=message):
        effective(model, masks, input_shape=(6,))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


WRONG = {
    "saturates": (lambda x: x / (1 + x), "saturates"),
    "normalises": (lambda x: x / x.norm(), "saturates|falls"),
    "is centred": (lambda x: x - x.mean(), "falls|negative"),
}


@pytest.mark.trap(61)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_found_by_what_it_computes(name, monkeypatch):
    """Whatever the rules say of an operation, the premise is checked on the numbers."""
    function, message = WRONG[name]

    def wrong(mode, call):
        return mode.fresh(function(call.values[0].flow), object())

    monkeypatch.setitem(positive.RULES, "relu", wrong)
    for criterion in (SynFlow(), SynFlowL2()):
        net = FunctionalModel.of(around(nn.ReLU()))
        with pytest.raises(UnsupportedModelError, match=message):
            criterion(net, Masks.dense(net.weights), data(input_shape=(6,)), generator())


def test_an_unknown_operation_is_tried(monkeypatch):
    monkeypatch.delitem(positive.RULES, "flip")
    model = around(Function(lambda x: x.flip(1)))
    net = FunctionalModel.of(model)
    scores = flat(SynFlow()(net, random_masks(net), data(input_shape=(6,)), generator()))
    monkeypatch.setitem(positive.RULES, "flip", moves.moved)
    known = flat(SynFlow()(net, random_masks(net), data(input_shape=(6,)), generator()))
    assert torch.equal(scores, known)


class Mixed(nn.Module):
    """A forward with precisions of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.dtype, self.scale = dtype, torch.rand(8, 8)

    def forward(self, x):
        x = self.first(x).to(self.dtype)
        state = torch.zeros(len(x), 8, dtype=self.dtype)
        x = torch.baddbmm(state[:, None], x[:, None], self.scale.to(self.dtype).expand(len(x), 8, 8))[:, 0]
        return self.second(
            torch.cat([x[:, :4], torch.ones(len(x), 4, dtype=self.dtype)], 1).to(self.first.weight.dtype)
        )


@pytest.mark.trap(62)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_forward_s_own_precision_does_not_meet_float64(dtype):
    one, two = FunctionalModel.of(Mixed(dtype)), FunctionalModel.of(Mixed(torch.float64).double())
    for criterion in (SynFlow(), SynFlowL2()):
        scores, exact = (
            flat(criterion(net, random_masks(one), data(input_shape=(6,)), generator())) for net in (one, two)
        )
        torch.testing.assert_close(scores, exact, rtol=1e-12, atol=0)
    assert prune(Mixed(torch.float32), method="synflow", density=0.5, input_shape=(6,), diagnosed=True).diagnosis


def plain_synflow(model, shape):
    """The published procedure on a model that is its own positive flow: abs_ of the state, eval mode, float64."""
    model = model.double().eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.abs_()
    model(torch.ones(1, *shape, dtype=torch.float64)).sum().backward()
    return {name: (p * p.grad).abs().detach() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.trap(4)
def test_on_batchnorm_and_relu_it_is_the_published_procedure_to_the_bit():
    model = Residual(zero_gamma=False)
    net = FunctionalModel.of(model)
    scores = SynFlow()(net, Masks.dense(net.weights), data(input_shape=(3, 6, 6)), generator())
    plain = plain_synflow(model, (3, 6, 6))
    assert all(torch.equal(score, plain[name]) for name, score in scores.items())


MIDDLES = [
    nn.ReLU,
    nn.GELU,
    nn.Tanh,
    lambda: Function(centred),
    lambda: Function(lambda x: x * x.sigmoid()),
    nn.Softmax,
]


@pytest.mark.trap(58)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.sampled_from(MIDDLES), min_size=1, max_size=3), st.floats(0.3, 1.0))
def test_scores_are_sums_over_walked_paths(seed, middles, density):
    """Norms and activations of whatever writing pass; a softmax over n divides by n. And the law of conservation."""
    torch.manual_seed(seed)
    modules = [middle(-1) if middle is nn.Softmax else middle() for middle in middles]
    layers = [nn.Linear(3, 4, bias=False)]
    for module in modules:
        layers += [module, nn.Linear(4, 4, bias=False)]
    net = FunctionalModel.of(nn.Sequential(*layers))
    masks = random_masks(net, density)
    factor = 0.25 ** sum(isinstance(module, nn.Softmax) for module in modules)
    for criterion, positive_part in ((SynFlow(), torch.abs), (SynFlowL2(), torch.square)):
        weights = [positive_part(w.double()) * masks[n] for n, w in net.weights.items()]
        expected = [torch.zeros_like(w) for w in weights]
        for path in itertools.product(range(3), *(range(4) for _ in weights)):
            steps = list(enumerate(itertools.pairwise(path)))
            value = factor * math.prod(float(weights[i][b, a]) for i, (a, b) in steps)
            for i, (a, b) in steps:
                expected[i][b, a] += value
        scores = criterion(net, masks, data(input_shape=(3,)), generator())
        for found, wanted in zip(scores.values(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-300)
            torch.testing.assert_close(found.sum(), expected[0].sum(), rtol=1e-9, atol=1e-300)


def test_a_transformer_is_probed_by_all_of_them():
    model = TinyViT()
    net = FunctionalModel.of(model)
    for criterion in CRITERIA.values():
        batches = [(torch.randn(2, 3, 8, 8), None)]
        scores = criterion(net, Masks.dense(net.weights), data(batches), generator())
        assert all(score.isfinite().all() and (score >= 0).all() and score.any() for score in scores.values())


@pytest.mark.trap(58)
def test_a_network_that_ends_in_log_softmax_has_paths():
    model = nn.Sequential(around(nn.ReLU()), nn.LogSoftmax(1))
    found = prune(model, method="random", density=0.9, input_shape=(6,), diagnosed=True).diagnosis
    assert "no path" not in found.sentence() and found.dead == 0
