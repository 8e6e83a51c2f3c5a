"""The front door: contracts that hold for every method."""

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import sapwood
from nets import NETS, QUICK, REFUSED, Residual, Sentence, labelled, mlp, sentences
from sapwood import (
    METHODS,
    BudgetError,
    ConfigError,
    DataError,
    Masks,
    Method,
    SapwoodWarning,
    ScoreError,
    UnsupportedModelError,
    prune,
)


def state_of(model: nn.Module) -> dict:
    """Everything about a model that scoring must leave alone."""
    return {
        "tensors": {
            n: (t.data_ptr(), t.clone())
            for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()
        },
        "keys": list(model.state_dict()),
        "modes": [m.training for m in model.modules()],
        "types": [type(m) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
        "momentum": [getattr(m, "momentum", None) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1]),
        "modes of torch": (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads()),
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) if a.dtype != torch.float32 else torch.equal(a.view(torch.int32), b.view(torch.int32))
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(params=NETS)
def case(request):
    build, shape = NETS[request.param]
    return build(), shape, request.param


@pytest.mark.filterwarnings("ignore::sapwood.SapwoodWarning")
class TestEveryMethodOnEveryNet:
    @pytest.mark.trap(19)
    @pytest.mark.trap(31)
    @pytest.mark.parametrize("method", METHODS)
    def test_exact_budget_and_an_untouched_model(self, case, method):
        model, shape, name = case
        model.train()
        next(iter(model.modules())).eval()  # a mixture of modes
        next(model.parameters()).requires_grad_(False)
        before = state_of(model)
        fields = {"input_shape": shape, "batches": labelled(shape), **QUICK.get(method, {})}
        if (method, name) in REFUSED:
            with pytest.raises(UnsupportedModelError, match='method="ntk-sap"'):
                prune(model, method=method, density=0.3, **fields)
            assert same(before, state_of(model))
            return
        result = prune(model, method=method, density=0.3, **fields)
        assert result.masks.kept == round(0.3 * result.masks.total)
        assert same(before, state_of(model))

    @pytest.mark.parametrize("method", METHODS)
    def test_mapping_batches(self, method):
        model, batches = Sentence(), sentences()
        before = state_of(model)
        fields = QUICK.get(method, {}) | ({"loss": sentence_loss} if method == "grasp" else {})
        if (method, "sentence") in REFUSED:
            with pytest.raises(UnsupportedModelError, match='method="ntk-sap"'):
                prune(model, method=method, density=0.3, batches=batches, **fields)
            assert same(before, state_of(model))
            return
        result = prune(model, method=method, density=0.3, batches=batches, **fields)
        assert result.masks.kept == round(0.3 * result.masks.total)
        assert "embed.weight" not in result.masks
        assert same(before, state_of(model))

    @pytest.mark.trap(7)
    @pytest.mark.trap(17)
    @pytest.mark.parametrize("method", [m for m in METHODS if m not in ("random", "erk", "magnitude", "janowsky")])
    def test_untouched_when_scoring_raises(self, method):
        model = Residual()
        model.fc.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
        before = state_of(model)
        with pytest.raises(UnsupportedModelError, match="boom"):
            prune(model, method=method, density=0.3, input_shape=(3, 6, 6), batches=labelled((3, 6, 6)))
        assert same(before, state_of(model))

    @pytest.mark.trap(1)
    @pytest.mark.parametrize("method", [m for m in METHODS if m not in ("force", "ntt")])
    def test_masks_are_nested_along_the_rounds(self, method):
        seen: list[Masks] = []
        result = prune(
            Residual(), method=method, density=0.05, rounds=6, input_shape=(3, 6, 6), batches=labelled((3, 6, 6)),
            on_round=lambda _, masks: seen.append(masks),
        )  # fmt: skip
        assert len(seen) == 6 and seen[-1] == result.masks
        assert all(later <= earlier for earlier, later in itertools.pairwise(seen))
        assert [r.kept for r in result.history] == [m.kept for m in seen]

    @pytest.mark.trap(37)
    @pytest.mark.parametrize("method", METHODS)
    def test_one_seed_one_result(self, method):
        model = Residual()
        runs = []
        for start in (1, 2):
            torch.manual_seed(start)  # the surroundings do not matter
            fields = {"input_shape": (3, 6, 6), "batches": labelled((3, 6, 6)), **QUICK.get(method, {})}
            runs.append(prune(model, method=method, density=0.2, seed=7, **fields).masks)
        assert runs[0] == runs[1]
        assert runs[0].provenance == runs[1].provenance


@pytest.mark.trap(76)
@pytest.mark.filterwarnings("ignore::sapwood.SapwoodWarning")
@pytest.mark.parametrize("method", METHODS)
def test_who_says_that_it_needs_no_data_looks_at_none(method):
    model = mlp(7, 12, 12, 3)
    fields = QUICK.get(method, {})
    if getattr(METHODS[method], "needs_data", True):
        with pytest.raises(DataError, match="give batches"):
            prune(model, method=method, density=0.5, input_shape=(7,), **fields)
    else:
        with_shape = prune(model, method=method, density=0.5, input_shape=(7,), **fields).masks
        batches = [(torch.full((4, 7), torch.nan), None)]  # whoever looked would say so
        assert prune(model, method=method, density=0.5, input_shape=(7,), batches=batches, **fields).masks == with_shape


def sentence_loss(output, batch):
    return nn.functional.cross_entropy(output.flatten(0, 1), batch["labels"].flatten())


class TestBudget:
    @pytest.mark.trap(3)
    @pytest.mark.parametrize("method", METHODS)
    def test_density_one_keeps_everything(self, method):
        result = prune(mlp(4, 6, 3), method=method, sparsity=0, input_shape=(4,), batches=labelled((4,)))
        assert result.masks.density == 1 and result.history == ()

    def test_the_three_words_agree(self):
        model = mlp(10, 10, 10)
        words = [{"density": 0.25}, {"sparsity": 0.75}, {"compression": 4}]
        assert len({prune(model, method="magnitude", **word).masks.kept for word in words}) == 1

    @pytest.mark.parametrize(("rounding", "kept"), [("nearest", 67), ("up", 67), ("down", 66)])
    def test_rounding_is_named_with_the_masks(self, rounding, kept):
        model = mlp(10, 10, 10)  # a third of 200 weights
        for method in ("magnitude", "synflow", "erk"):
            fields = {"rounding": rounding, "input_shape": (10,)}
            result = prune(model, method=method, density=1 / 3, **fields)
            assert result.masks.kept == kept == result.history[-1].kept
            assert result.masks.provenance["fields"]["rounding"] == rounding

    def test_wrong_words(self):
        model = mlp(10, 10, 10)
        with pytest.raises(BudgetError, match=r"sparsity is 1\.2"):
            prune(model, sparsity=1.2)
        with pytest.raises(BudgetError, match="exactly one"):
            prune(model)

    def test_a_collapsed_layer_is_reported_and_warned_about_once(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        model[0].weight.data.mul_(0.01)
        with pytest.warns(SapwoodWarning, match=r"0\.weight") as caught:
            result = prune(model, method="magnitude", density=0.2, rounds=5)
        assert len(caught) == 1 and result.collapsed == ("0.weight",)
        assert "collapsed layers: 0.weight" in str(result)
        kept = prune(model, method="magnitude", density=0.2, rounds=5, min_per_layer=3).masks.per_layer()
        assert kept["0.weight"].kept == 3 and sum(c.kept for c in kept.values()) == 26

    def test_like_masks_brings_its_own_density(self):
        model = mlp(10, 20, 10)
        first = prune(model, method="magnitude", density=0.2).masks
        control = prune(model, method="random", allocation=first).masks
        assert control.per_layer() == first.per_layer() and control != first


class TestSelection:
    def names(self, model, **options):
        return list(sapwood.prunable(model, **options))

    def test_default_takes_layer_weights_only(self):
        model, _ = NETS["vit"]
        names = self.names(model())
        assert (
            "patches.weight" in names
            and "encoder.layers.0.self_attn.in_proj_weight" in names
            and "head.weight" in names
        )
        assert not any(word in name for name in names for word in ("bias", "norm", "positions", "cls_token"))
        assert self.names(NETS["lstm"][0]())[:4] == [
            "rnn.weight_ih_l0",
            "rnn.weight_hh_l0",
            "rnn.weight_ih_l1",
            "rnn.weight_hh_l1",
        ]

    def test_by_name_glob_type_and_module(self):
        model = Residual()
        everything = self.names(model)
        assert everything == ["stem.weight", "conv1.weight", "conv2.weight", "fc.weight"]
        assert self.names(model, exclude="fc") == self.names(model, exclude=nn.Linear) == everything[:-1]
        assert self.names(model, exclude=("conv*", model.stem)) == ["fc.weight"]
        assert self.names(model, exclude="fc.weight") == everything[:-1]
        assert "bn2.weight" in self.names(model, include=nn.BatchNorm2d)
        assert self.names(model, include="*.bias", exclude="*.weight")[-1] == "fc.bias"

    def test_a_pattern_that_matches_nothing_is_an_error(self):
        for options, message in [
            ({"exclude": "conv_1"}, "Did you mean 'conv1"),
            ({"include": nn.LSTM}, "LSTM"),
            ({"exclude": nn.Linear(1, 1)}, "Linear"),
        ]:
            with pytest.raises(ConfigError, match=message):
                self.names(Residual(), **options)

    @pytest.mark.trap(30)
    @pytest.mark.trap(27)
    def test_tied_weights_count_once(self):
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False), nn.Linear(6, 3))
        model[2].weight = model[0].weight
        assert self.names(model) == ["0.weight", "3.weight"]
        result = prune(model, method="snip", density=0.5, batches=labelled((6,)))
        assert result.masks.total == 54 and result.masks.kept == 27
        assert self.names(model, exclude="2") == ["3.weight"]  # its other name counts

    @pytest.mark.trap(30)
    def test_a_head_tied_to_an_embedding_is_pruned_only_when_asked(self):
        assert "embed.weight" not in self.names(Sentence())
        assert "embed.weight" in self.names(Sentence(), include=nn.Embedding)

    def test_nothing_to_prune(self):
        for model in (nn.BatchNorm1d(4), nn.Embedding(3, 4), nn.ReLU()):
            with pytest.raises(UnsupportedModelError, match="nothing to prune"):
                prune(model, density=0.5, method="random")


class TestBadInput:
    def test_nan_weights_name_the_parameter(self):
        model = mlp(4, 6, 3)
        model[2].weight.data[0, 0] = float("nan")
        for method in METHODS:
            with pytest.raises(ScoreError, match=r"'2\.weight' holds NaN"):
                prune(model, method=method, density=0.5, input_shape=(4,), batches=labelled((4,)))

    @pytest.mark.trap(34)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_bad_scores_name_the_layer(self, value):
        def criterion(net, masks, data, generator):
            scores = {n: torch.ones_like(w) for n, w in net.weights.items()}
            scores["2.weight"][0, 0] = value
            return scores

        with pytest.raises(ScoreError, match=r"NaN or infinite scores in '2\.weight'"):
            prune(mlp(4, 6, 3), method=criterion, density=0.5)

    def test_scores_of_the_wrong_shape(self):
        with pytest.raises(ScoreError, match=r"\(6, 4\).*none"):
            prune(mlp(4, 6, 3), method=lambda *_: {}, density=0.5)

    def test_names_and_fields(self):
        model = mlp(4, 6, 3)
        with pytest.raises(ConfigError, match="Did you mean 'synflow'"):
            prune(model, method="sinflow", density=0.5)
        with pytest.raises(ConfigError, match="Did you mean 'resamples'"):
            prune(model, density=0.5, resample=3)
        with pytest.raises(ConfigError, match="epsilon is -1"):
            prune(model, density=0.5, epsilon=-1)
        with pytest.raises(ConfigError, match="There is no method at 'nowhere:method'"):
            prune(model, method="nowhere:method", density=0.5)

    def test_empty_and_wrong_batches(self):
        model = mlp(4, 6, 3)
        with pytest.raises(DataError, match="empty"):
            prune(model, method="snip", density=0.5, batches=[])
        with pytest.raises(DataError, match="not class indices"):
            prune(model, method="snip", density=0.5, batches=[(torch.zeros(2, 4), torch.zeros(2, 3))])
        with pytest.raises(DataError, match="input_shape"):
            prune(model, density=0.5, input_shape=(0,))
        with pytest.raises(UnsupportedModelError, match=r"shape \(2, 5\)"):
            prune(model, density=0.5, input_shape=(5,))

    def test_models_that_cannot_be_read(self):
        pruned = mlp(4, 6, 3)
        nn.utils.prune.l1_unstructured(pruned[0], "weight", 0.5)
        complex_model = nn.Linear(4, 3)
        complex_model.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64))
        cases = [
            (nn.Sequential(nn.LazyLinear(3)), "lazy"),
            (mlp(4, 3).to("meta"), "meta device"),
            (complex_model, "complex"),
            (pruned, "from_torch_prune"),
            (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), "weight_norm"),
        ]
        for model, message in cases:
            with pytest.raises(UnsupportedModelError, match=message):
                prune(model, density=0.5, input_shape=(4,))

    def test_an_output_without_a_tensor(self):
        class Strange(nn.Linear):
            def forward(self, x):
                return "text"

        class Detached(nn.Linear):
            def forward(self, x):
                return super().forward(x).detach()

        with pytest.raises(UnsupportedModelError, match="returned str"):
            prune(Strange(4, 3), density=0.5, input_shape=(4,))
        with pytest.raises(UnsupportedModelError, match="does not depend on any prunable weight"):
            prune(Detached(4, 3), density=0.5, input_shape=(4,))


class TestSurroundings:
    @pytest.mark.trap(38)
    def test_autocast_no_grad_and_inference_mode_change_nothing(self):
        model = Residual(zero_gamma=False)
        options = {"method": "snip", "density": 0.3, "batches": labelled((3, 6, 6))}
        plain = prune(model, **options).masks
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert prune(model, **options).masks == plain
        with torch.no_grad():
            assert prune(model, **options).masks == plain
        with torch.inference_mode():
            assert prune(model, **options).masks == plain

    @pytest.mark.trap(38)
    def test_half_precision_models_are_scored_in_float32(self):
        model = mlp(4, 6, 3).half()
        seen = {}

        def criterion(net, masks, data, generator):
            seen.update({n: w.dtype for n, w in net.weights.items()})
            return sapwood.NtkSap(resamples=1, samples=4)(net, masks, data, generator)

        prune(model, method=criterion, density=0.5, input_shape=(4,))
        assert set(seen.values()) == {torch.float32}

    def test_wrapped_models(self):
        model = mlp(4, 6, 3)
        plain = prune(model, density=0.5, input_shape=(4,), rounds=2).masks
        compiled = torch.compile(model, backend="eager")
        assert prune(compiled, density=0.5, input_shape=(4,), rounds=2).masks == plain
        partly = mlp(4, 6, 3)
        partly.load_state_dict(model.state_dict())
        partly[0] = torch.compile(partly[0], backend="eager")
        assert prune(partly, density=0.5, input_shape=(4,), rounds=2).masks == plain
        assert prune(nn.DataParallel(model), density=0.5, input_shape=(4,), rounds=2).masks == plain

    def test_forward_and_loss_of_ones_own(self):
        class TwoHeads(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

            def features(self, x):
                return self.body(x).relu()

            def forward(self, x):
                raise AssertionError("not called")

        options = {"forward": lambda model, x: model.head(model.features(x)), "loss": nn.CrossEntropyLoss()}
        for method in ("snip", "grasp", "synflow", "ntk-sap"):
            fields = {**options, "batches": labelled((4,)), "input_shape": (4,), **QUICK.get(method, {})}
            assert prune(TwoHeads(), method=method, density=0.5, **fields).masks.kept == 21

    def test_a_method_of_ones_own_in_thirty_lines(self):
        def largest_output_first(net, masks, data, generator):
            return {name: weight.abs() * weight.abs().sum(1, keepdim=True) for name, weight in net.weights.items()}

        method = Method(largest_output_first, rounds=3, allocation="erk")
        assert prune(mlp(4, 6, 3), method=method, density=0.5).masks.kept == 21
        assert prune(mlp(4, 6, 3), method="nets:by_magnitude", density=0.5).masks.kept == 21

    def test_the_core_needs_torch_numpy_and_safetensors_only(self):
        """And torch brings its own; nothing of the program (plots, tables, command line) is imported."""
        code = (
            "import sys, sapwood, torch\n"
            "sapwood.prune(torch.nn.Linear(4, 3), density=0.5, input_shape=(4,))\n"
            "foreign = {'lightning_fabric', 'matplotlib', 'pandas', 'PIL', 'pooch', 'rich', 'sklearn', 'tyro'}\n"
            "foreign |= {'torchvision', 'timm'}\n"
            "print(sorted(foreign & {name.partition('.')[0] for name in sys.modules}))"
        )
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert output.strip() == "[]"
