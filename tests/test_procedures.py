"""Methods with a loop of their own: the contract, and masks that begin from masks."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from nets import labelled, mlp
from sapwood import BudgetError, ConfigError, Data, FunctionalModel, MaskError, Masks, prune
from sapwood.allocation import Global, budget
from sapwood.cli import main
from sapwood.experiments.fields import parse_fields, parse_variant
from sapwood.methods import METHODS
from sapwood.methods.table import configured, criterion_fields, find
from sapwood.pruning import Found, Method, Procedure, Round


@dataclass(frozen=True)
class Doubled:
    """Keeps the largest weights, times a factor."""

    factor: float = 2.0
    rounds: int = 3

    def run(self, net, data, density, generator, *, min_per_layer=0, on_round=None, within=None):
        scores = {name: weight.abs() for name, weight in net.weights.items()}
        masks = Global(min_per_layer)(scores, within or Masks.dense(net.weights), budget(density, 100))
        return Found(
            masks,
            (Round(1, density, masks.kept, 0.0, ()),),
            masks.apply({n: self.factor * w for n, w in net.weights.items()}),
        )


def net() -> nn.Module:
    return mlp(10, 5, 10, bias=False)


def test_a_procedure_is_used_like_a_method(monkeypatch):
    model, path = net(), f"{__name__}:Doubled"
    assert isinstance(Doubled(), Procedure) and isinstance(Method(lambda *_: {}), Procedure)
    for method in (Doubled(), Doubled(factor=2.0), path):
        result = prune(model, method=method, density=0.2, factor=3.0)
        assert result.masks.provenance["fields"] == {"factor": 3.0, "rounds": 3}
        for name, weight in model.named_parameters():
            assert torch.equal(result.params[name], 3 * weight * result.masks[name])
    monkeypatch.setitem(METHODS, "doubled", Doubled())
    assert prune(model, method="doubled", density=0.2).method == "doubled"
    assert parse_fields("doubled", ["factor=4"]) == {"factor": 4.0}
    assert parse_variant("doubled@rounds=2").fields == {"rounds": 2}
    assert configured(*find("doubled"), {"factor": 5.0}) == Doubled(5.0)
    assert criterion_fields(Doubled()) == set()
    with pytest.raises(ConfigError, match="Did you mean 'factor'"):
        prune(model, method=Doubled(), density=0.2, factr=3.0)
    with pytest.raises(ConfigError, match="Unknown field"):
        prune(model, method="magnitude", density=0.2, criterion=None)


def test_load_into_writes_weights_and_zeros():
    model, other = net(), net()
    result = prune(model, method=Doubled(), density=0.2)
    result.load_into(torch.compile(other, backend="eager"))
    assert all(torch.equal(other.get_parameter(name), value) for name, value in result.params.items())
    plain = prune(model, method="magnitude", density=0.2)
    plain.load_into(model)
    assert plain.params is None
    assert sum(int(p.count_nonzero()) for p in model.parameters()) == 20
    before = [p.clone() for p in mlp(10, 6, 10, bias=False).parameters()]
    wrong = mlp(10, 6, 10, bias=False)
    with pytest.raises(MaskError, match="another model"):
        result.load_into(wrong)
    assert [p.shape for p in wrong.parameters()] == [b.shape for b in before]


def test_new_weights_come_in_the_models_precision():
    assert {p.dtype for p in prune(net().half(), method=Doubled(), density=0.2).params.values()} == {torch.float16}


class TestWithin:
    @pytest.mark.parametrize("method", ["random", "snip", "force", "erk"])
    def test_what_is_pruned_stays_pruned(self, method):
        model = net()
        first = prune(model, method="random", density=0.5, seed=1).masks
        seen = []
        second = prune(
            model, method=method, density=0.2, within=first, rounds=3, seed=2, batches=labelled((10,)),
            on_round=lambda row, masks: seen.append((row.kept, masks <= first)),
        ).masks  # fmt: skip
        assert second.kept == 20 and second <= first
        # From a density of 0.5, not from 1.
        assert seen == [(round(100 * 0.5 * 0.4 ** (t / 3)), True) for t in (1, 2, 3)]

    def test_the_same_density_is_a_no_op_and_more_is_an_error(self):
        first = prune(net(), method="random", density=0.5).masks
        assert prune(net(), method="magnitude", density=0.5, within=first).masks == first
        with pytest.raises(BudgetError, match="80 weights were asked for and only 50"):
            prune(net(), method="magnitude", density=0.8, within=first)

    def test_another_models_masks_are_refused(self):
        with pytest.raises(MaskError, match="another model"):
            prune(net(), method="magnitude", density=0.2, within=Masks.dense({"0.weight": torch.ones(3)}))
        with pytest.raises(MaskError, match=r"no entry for '2\.weight'"):
            prune(net(), method="magnitude", density=0.2, within=Masks.dense({"0.weight": torch.ones(5, 10)}))


@pytest.mark.parametrize("method", ["obs", "ntt"])
def test_what_goes_step_by_step_refuses_a_process_group(method):
    alone = FunctionalModel.of(net())
    together = dataclasses.replace(alone, group=object())
    with pytest.raises(ConfigError, match="leave group out"):
        METHODS[method].run(together, Data(tuple(labelled((10,)))), 0.5, torch.Generator())


def test_the_command_says_that_a_mask_file_holds_no_weights(tmp_path, capsys):
    out = tmp_path / "masks.safetensors"
    typed = ["prune", "mlp", "--data", "digits", "--per-class", "1", "--density", "0.5", "--out", str(out)]
    assert main([*typed, "--method", "obs", "--set", "block=8", "damping=1e-3"]) == 0
    assert "obs also changes the weights" in capsys.readouterr().err
    assert Masks.load(out).provenance["fields"]["block"] == 8
    assert main([*typed, "--method", "imp", "--overwrite"]) == 2
    assert "call sapwood.imp" in capsys.readouterr().err
