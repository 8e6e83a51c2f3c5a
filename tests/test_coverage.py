"""Matrices that are no layer's weight: said in the report, pruned on request, never given a fan-in that is a guess."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import TinyViT, mlp
from sapwood import UnsupportedModelError, imp, ntk, prunable, prune
from sapwood.coverage import Coverage
from sapwood.diagnosis import diagnose
from sapwood.prunable import all_weights, select


class Experts(nn.Module):
    """Stacks of matrices (experts, out, in) with a router, as mixtures of experts hold them."""

    def __init__(self, width: int, hidden: int, count: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(count, width) / width**0.5)
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * hidden, width) / width**0.5)
        self.down_proj = nn.Parameter(torch.randn(count, width, hidden) / hidden**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = torch.softmax(F.linear(x, self.router), -1)
        gate, up = torch.einsum("...i,eoi->...eo", x, self.gate_up_proj).chunk(2, -1)
        down = torch.einsum("...ei,eoi->...eo", F.silu(gate) * up, self.down_proj)
        return (shares[..., None] * down).sum(-2)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Experts(8, 6, 3), "proj": nn.Linear(8, 8)}) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 20, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["mlp"](layer["proj"](x))
        return self.head(self.norm(x)).mean(1)


def batches():
    rng = torch.Generator().manual_seed(0)
    return [(torch.randint(20, (8, 5), generator=rng), torch.randint(20, (8,), generator=rng))]


EXPERTS = 3 * (12 * 8 + 8 * 6)


@pytest.mark.trap(70)
def test_the_report_says_what_is_left_dense_and_what_share_of_the_model_is_pruned():
    torch.manual_seed(0)
    model = Mixture()
    result = prune(model, method="snip", density=0.5, batches=batches())
    whole = sum(p.numel() for p in model.parameters())
    assert result.coverage == Coverage(
        result.masks.total - result.masks.kept,
        whole,
        {
            "embed.weight": 160,
            "layers.*.mlp.router": 48,
            "layers.*.mlp.gate_up_proj": 2 * 3 * 12 * 8,
            "layers.*.mlp.down_proj": 2 * 3 * 8 * 6,
        },
        {},
    )
    report = str(result)
    pruned = result.masks.total - result.masks.kept
    assert f"{pruned:,} of the model's {whole:,} parameters are pruned, {pruned / whole:.2%}" in report
    assert f"{160 + 48 + 2 * EXPERTS:,} weights" in report and "layers.*.mlp.gate_up_proj (576)" in report
    assert "include=" in report and "norm" not in report


@pytest.mark.trap(70)
def test_what_it_prints_is_what_include_takes():
    torch.manual_seed(0)
    model = Mixture()
    left = prune(model, method="random", density=0.5).coverage.left_out
    result = prune(model, method="snip", density=0.5, batches=batches(), include=tuple(left), exclude="head")
    assert result.coverage.left_out == {} and result.coverage.excluded == {"head.weight": 160}
    assert result.masks.total == 160 + 48 + 2 * (EXPERTS + 64)
    assert "left dense by exclude=: 160 weights" in str(result)
    for name, parameter in model.named_parameters():
        assert (name in result.masks) == (parameter.dim() > 1 and name != "head.weight")


@pytest.mark.trap(70)
def test_a_glob_that_would_take_vectors_as_well_is_not_printed():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    assert list(prune(model, method="random", density=0.5).coverage.left_out) == ["0.weight"]


def test_tokens_and_scales_are_no_matrices_and_ordinary_networks_have_one_line():
    coverage = prune(TinyViT(), method="random", density=0.5).coverage
    assert list(coverage.left_out) == ["positions"]
    plain = prune(mlp(4, 6, 3), method="random", density=0.5)
    assert plain.coverage.left_out == plain.coverage.excluded == {} and "left dense" not in str(plain)


def test_many_groups_are_cut_short():
    text = str(Coverage(5, 1000, {f"w{i}": 10 * i for i in range(1, 9)}, {}))
    assert "w8 (80)" in text and "and 3 more" in text and "w1 " not in text


def test_imp_reports_the_same():
    torch.manual_seed(0)
    model = Mixture()
    result = imp(model, train=lambda model, masks: None, density=0.5, levels=1, exclude="head")
    assert result.coverage == prune(model, method="magnitude", density=0.5, exclude="head").coverage


@pytest.mark.trap(71)
def test_fan_ins_are_those_of_the_dense_layer_or_refused():
    torch.manual_seed(0)
    weights = {w.name: w for w in all_weights(Mixture())}
    assert weights["head.weight"].fan_in == 8
    for name in ("layers.0.mlp.gate_up_proj", "layers.0.mlp.router", "embed.weight"):
        with pytest.raises(UnsupportedModelError, match=rf"'{name}' of shape .* fan-in is not known"):
            weights[name].fan_in  # noqa: B018  # it raises

    class Stacked(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.weight = nn.Parameter(torch.randn(2, 3, 4))

    (stack, bias) = all_weights(Stacked())
    assert not stack.is_layer_weight and stack.layout is None and bias.layout is not None


@pytest.mark.trap(71)
def test_a_transposed_linear_layer_is_known_by_what_it_is():
    class Conv1D(nn.Module):
        """Hugging Face's."""

        def __init__(self, outputs, inputs):
            super().__init__()
            self.nf, self.weight = outputs, nn.Parameter(torch.randn(inputs, outputs))

    theirs = all_weights(Conv1D(3, 5))[0]
    assert theirs.is_layer_weight and theirs.fan_in == 5 and theirs.layout.output == 1
    own = Conv1D(3, 5)
    own.weight = nn.Parameter(torch.randn(3, 5, 2))  # somebody else's class of that name
    assert not all_weights(own)[0].is_layer_weight


@pytest.mark.trap(71)
def test_whole_channels_of_a_stack_are_refused_and_a_diagnosis_counts_no_units():
    torch.manual_seed(0)
    model = Mixture()
    include = "layers.*.mlp.*_proj"
    with pytest.raises(UnsupportedModelError, match=r"'layers\.0\.mlp\.gate_up_proj' .* output channels"):
        prune(model, method="taylor", density=0.5, batches=batches(), include=include, structure="channels")
    masks = prune(model, method="snip", density=0.5, batches=batches(), include=include).masks
    layers = diagnose(model, masks, batches=batches()).layers
    assert layers["layers.0.mlp.gate_up_proj"].units == 0 and layers["layers.0.proj.weight"].units == 8


@pytest.mark.trap(71)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_by_name_with_the_remedy(dtype):
    model = mlp(4, 6, 3)
    model[2].weight = nn.Parameter(torch.ones(3, 6).to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"'2\.weight' holds .* exclude='2\.weight'"):
        prune(model, method="random", density=0.5)
    assert list(prunable(model, exclude="2.weight")) == ["0.weight"]
    assert [weight.name for weight in select(model, exclude="2")] == ["0.weight"]
    left = prune(model, method="random", density=0.5, exclude="2").coverage
    assert left.excluded == {"2.weight": 18}


@pytest.mark.trap(71)
def test_a_kernel_of_all_parameters_is_of_those_that_have_derivatives():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.order = nn.Linear(4, 3), nn.Parameter(torch.arange(4), requires_grad=False)

        def forward(self, x):
            return self.fc(x[:, self.order])

    model, x = Indexed(), torch.randn(2, 4)
    expected = torch.kron(x @ x.T + 1, torch.eye(3))
    torch.testing.assert_close(ntk.kernel(model, x, parameters="*").detach(), expected, check_dtype=False)
