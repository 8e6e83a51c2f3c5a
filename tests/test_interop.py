import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel

from nets import labelled, mlp
from sapwood import MaskError, Masks, UnsupportedModelError, from_torch_prune, prune, to_torch_prune
from sapwood.names import Names


@pytest.mark.trap(28)
def test_there_and_back_again():
    model = mlp(6, 8, 3)
    masks = prune(model, method="snip", density=0.4, batches=labelled((6,))).masks
    twin = to_torch_prune(masks, copy.deepcopy(model))
    assert {"0.weight_orig", "0.weight_mask"} <= set(twin.state_dict())
    assert from_torch_prune(twin) == masks
    assert from_torch_prune(twin.state_dict()) == masks
    torch_prune.remove(twin[0], "weight")
    torch.testing.assert_close(twin[0].weight, model[0].weight * masks["0.weight"], rtol=0, atol=0)


def test_masks_that_torch_made():
    model = mlp(6, 8, 3)
    torch_prune.global_unstructured(
        [(model[0], "weight"), (model[2], "weight")], torch_prune.L1Unstructured, amount=0.5
    )
    masks = from_torch_prune(model)
    assert masks.kept == 36 and masks["0.weight"].shape == (8, 6)


def test_masks_in_a_parametrization():
    class Sparse(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight):
            return weight * self.mask

    model = mlp(6, 8, 3)
    mask = torch.rand(8, 6) < 0.5
    parametrize.register_parametrization(model[0], "weight", Sparse(mask.float()))
    masks = from_torch_prune(model)
    assert list(masks) == ["0.weight"] and torch.equal(masks["0.weight"], mask)


def test_nothing_to_read_and_nothing_to_fit():
    with pytest.raises(MaskError, match="No masks found"):
        from_torch_prune(mlp(6, 8, 3))
    with pytest.raises(MaskError, match="another model"):
        to_torch_prune(prune(mlp(6, 8, 3), method="random", density=0.5).masks, mlp(6, 9, 3))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(5, 6, batch_first=True, **options)
        self.fc = nn.Linear(12 if options else 6, 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0].mean(1))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed, self.fc = nn.Linear(5, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.wide = bool(options)

    def forward(self, x):
        query = self.embed(x)
        other = x if self.wide else query
        return self.fc(self.attention(query, other, other, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    """Its layers have a path of their own in eval mode, which calls none of their parts."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Linear(5, 8), nn.Linear(8, 3)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.fc(self.encoder(self.embed(x)).mean(1))


class Tied(nn.Module):
    """One weight of two layers, one of them called under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        self.b.weight, self.c = self.a.weight, self.a

    def forward(self, x):
        return self.fc(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))).mean(1))


class NeverCalled(nn.Module):
    """Its weights are in modules that are not called: a layer's, a bare holder's, and those of containers."""

    def __init__(self):
        super().__init__()
        self.qkv, self.fc, self.holder = nn.Linear(5, 6, bias=False), nn.Linear(6, 3), nn.Module()
        self.holder.inner = nn.ModuleList([nn.Module()])
        self.holder.inner[0].w = nn.Parameter(torch.randn(6, 6))
        self.listed = nn.ParameterList([torch.randn(6, 6)])
        self.named = nn.ParameterDict({"k": torch.randn(6, 6)})
        self.own = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        x = torch.relu(F.linear(x, self.qkv.weight)) @ self.holder.inner[0].w @ self.listed[0] @ self.named["k"]
        return self.fc(torch.relu(x @ self.own).mean(1))


class Rewritten(nn.Module):
    def __init__(self, rewrite):
        super().__init__()
        self.a, self.fc = rewrite(nn.Linear(5, 6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.a(x)).mean(1))


MODELS = {
    "rnn": lambda: Recurrent(nn.RNN),
    "lstm": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attention,
    "attention of other widths": lambda: Attention(kdim=5, vdim=5),
    "encoder": Encoder,
    "tied": Tied,
    "never called": NeverCalled,
    "spectral norm": lambda: Rewritten(parametrizations.spectral_norm),
    "old spectral norm": lambda: Rewritten(nn.utils.spectral_norm),
    "tied and compiled": lambda: torch.compile(Tied(), backend="eager"),
    "averaged part": lambda: nn.Sequential(AveragedModel(Attention()), nn.Linear(3, 3)),
}


def trajectory(model, masks, steps=3):
    """Outputs before each step of SGD, then twice in eval mode; masked by hand where masks are given."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 4, 5, generator=generator), torch.randn(4, 3, generator=generator)
    optimizer, outputs = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(steps):
        with torch.no_grad():
            for name, parameter in Names.of(model).parameters.items():
                if name in masks:
                    parameter.mul_(masks[name])
        outputs.append(model.train()(x))
        optimizer.zero_grad()
        F.mse_loss(outputs[-1], y).backward()
        optimizer.step()
    with torch.no_grad():
        for name, parameter in Names.of(model).parameters.items():
            if name in masks:
                parameter.mul_(masks[name])
        return [*(output.detach() for output in outputs), model.eval()(x), model(x)]


@pytest.mark.trap(72)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_converted_model_trains_as_one_that_is_masked_by_hand(build):
    torch.manual_seed(0)
    model = build()
    generator = torch.Generator().manual_seed(1)
    parameters = Names.of(model).parameters
    masks = Masks({n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in parameters.items() if p.dim() > 1})
    converted = to_torch_prune(masks, copy.deepcopy(model))
    assert from_torch_prune(converted) == masks
    for by_hand, theirs in zip(trajectory(model, masks), trajectory(converted, {}), strict=True):
        torch.testing.assert_close(by_hand, theirs, rtol=1e-5, atol=1e-6)
    assert from_torch_prune(converted) == masks
    for module in list(converted.modules()):
        for leaf in [key.removesuffix("_mask") for key in module._buffers if key.endswith("_mask")]:
            torch_prune.remove(module, leaf)
    for by_hand, theirs in zip(trajectory(model, masks, 0), trajectory(converted, {}, 0), strict=True):
        torch.testing.assert_close(by_hand, theirs, rtol=1e-5, atol=1e-6)


def in_a_container(model):
    model.kept = {"weights": [model[1].weight]}


def in_a_closure(model):
    weight = model[1].weight
    model.kept = lambda x: F.linear(x, weight)


def in_a_module_of_its_own(model):
    twin = nn.Linear(6, 3)
    twin.weight = model[1].weight
    model.kept = [twin]


@pytest.mark.trap(72)
@pytest.mark.parametrize("hold", [in_a_container, in_a_closure, in_a_module_of_its_own])
def test_a_weight_that_the_forward_holds_past_its_module_is_refused_and_nothing_is_changed(hold):
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    hold(model)
    masks = prune(model, method="random", density=0.5).masks
    with pytest.raises(UnsupportedModelError, match=r"'1\.weight' is also held by the attribute 'kept' of 'the model'"):
        to_torch_prune(masks, model)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.trap(72)
def test_a_tied_weight_that_is_masked_in_part_has_no_mask():
    model = Tied()
    one, other = (torch.rand(5, 5, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in (0, 1))
    torch_prune.custom_from_mask(model.a, "weight", one)
    for source in (model, model.state_dict()):
        with pytest.raises(MaskError, match=r"'a\.weight' and 'b\.weight' are one tied weight"):
            from_torch_prune(source)
    torch_prune.custom_from_mask(model.b, "weight", other)
    for source in (model, model.state_dict()):
        with pytest.raises(MaskError, match=r"'a\.weight' and 'b\.weight' are one tied weight"):
            from_torch_prune(source)
    model.b.weight_mask = one.float()
    for source in (model, model.state_dict()):
        assert from_torch_prune(source) == Masks({"a.weight": one})


def test_a_mask_that_scales_is_no_mask():
    model = mlp(6, 8, 3)
    torch_prune.custom_from_mask(model[0], "weight", torch.full((8, 6), 0.5))
    with pytest.raises(MaskError, match=r"'0\.weight_mask' holds other values than 0 and 1"):
        from_torch_prune(model)


def test_state_dicts_of_wrapped_models_have_the_names_of_the_bare_one():
    own = nn.Sequential()
    own.add_module("module", nn.Linear(6, 3))
    own.add_module("fc", nn.Linear(3, 3))
    masks = prune(own, method="random", density=0.5).masks
    for wrap in (lambda m: m, AveragedModel, nn.DataParallel, lambda m: torch.compile(m, backend="eager")):
        model = to_torch_prune(masks, wrap(copy.deepcopy(own)))
        assert from_torch_prune(model.state_dict()) == masks == from_torch_prune(model)
