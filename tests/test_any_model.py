"""Random small models, with and without what has led to silent wrong numbers: right by an oracle, or refused.

Whatever happens, the model, its buffers, version counters, modes, hooks, gradients and all random states stay.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
import sapwood
from oracles import Case, Luck, Turn
from random_models import BODIES, Recipe, Sample, build, recipes
from sapwood import Masks, Method, SapwoodWarning
from sapwood.errors import SapwoodError
from troubled_blocks import NOISY, REFUSED

DENSITY = 0.4
QUICK: dict[str, dict[str, Any]] = {
    "ntk-sap": {"rounds": 2, "resamples": 1, "samples": 4},
    "ntk-sap-jvp": {"rounds": 2, "resamples": 1, "samples": 4},
    "ntk-sap-analytic": {"rounds": 2},
    "iter-snip": {"rounds": 3},
    "force": {"rounds": 3},
    "synflow": {"rounds": 3},
    "synflow-l2": {"rounds": 3},
    "px": {"rounds": 3},
    "ntt": {"rounds": 1, "interval": 2, "probes": 2},
}
FLOWS = ("synflow", "synflow-l2", "px")
ALL = tuple(sapwood.METHODS)
REMEDY = re.compile(
    r"exclude=|loss=|forward=|method=|method '|temperature=|set_grad_checkpointing|turn |[Uu]se |[Tt]ake |Write |"
    r"Replace |Have the layer|Look at|zero_init|input_shape=|raise |train it|let it"
)


@dataclasses.dataclass
class Outcome:
    """What one call of `prune` came to: a result and the turns of its criterion, or a refusal."""

    result: sapwood.Result | None
    turns: list[Turn]
    refusal: str


def prune(sample: Sample, method: str) -> Outcome:
    """Runs a method with a criterion that notes what it is called with."""
    turns: list[Turn] = []
    found = sapwood.METHODS[method]
    fields = dict(QUICK.get(method, {}))
    if isinstance(found, Method):
        outer = {key: fields.pop(key) for key in list(fields) if key == "rounds"}
        criterion = dataclasses.replace(found.criterion, **fields)

        def spy(net, masks, data, generator):
            draws, luck = generator.get_state(), Luck.now()
            scores = criterion(net, masks, data, generator)
            turns.append(Turn(dict(masks), draws, luck, {n: s.clone() for n, s in scores.items()}))
            return scores

        found = dataclasses.replace(found, criterion=spy, **outer)
    else:
        found = dataclasses.replace(found, **fields)
    try:
        result = sapwood.prune(sample.model, method=found, density=DENSITY, batches=sample.batches)
    except SapwoodError as error:
        return Outcome(None, turns, f"{type(error).__name__}: {error}")
    return Outcome(result, turns, "")


# What must not change.


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that scoring has no right to: values by copy, things by identity."""
    seen: dict[str, Any] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        seen[f"{prefix}: class"] = (id(module), type(module), module.training)
        for key, value in vars(module).items():
            where = f"{prefix}.{key}"
            seen[where] = kept(value)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            seen[f"{prefix}/{key}"] = kept(tensor)
    return seen


def kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        grad = None if value.grad is None else (id(value.grad), value.grad.tolist())
        bits = value.detach().double().contiguous().numpy().tobytes()  # which holds all narrower ones
        return id(value), value._version, value.requires_grad, value.data_ptr(), grad, value.dtype, bits
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().tolist()
    if isinstance(value, dict):
        return {key: kept(entry) for key, entry in value.items()}
    return (id(value), value) if isinstance(value, int | float | str | bool | None) else id(value)


def assert_untouched(sample: Sample, before: dict[str, Any], luck: Luck, threads: tuple) -> None:
    after = snapshot(sample.model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name] == value, f"{name} was touched"
    assert luck.same(Luck.now()), "a global generator has moved"
    assert threads == surroundings()


def surroundings() -> tuple:
    return (
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.backends.mha.get_fastpath_enabled(),
        torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
        torch.overrides._get_current_function_mode_stack() == [],
    )  # fmt: skip


# What is to be refused, and what may be.


LIMITS: dict[str, frozenset[str]] = {
    "ntk-sap-jvp": frozenset({"recurrent", "gated unit", "bags"}),  # no forward derivative in torch
    "prospr": frozenset({"bags"}),  # which are trained, too, and have no second derivative in torch
    "ntt": frozenset({"bags"}),
    "obd": frozenset({"norm open batch"}),  # a single sample has no statistics
    "obs": frozenset({"norm open batch"}),
}
"""What a method may refuse for though the model is an ordinary one."""


def must_be_refused(recipe: Recipe, method: str) -> bool:
    uncomparable = "noise of its own" in recipe.troubles and method in ("ntk-sap", "grasp")
    return uncomparable or bool(recipe.troubles & REFUSED)


def may_be_refused(recipe: Recipe, method: str) -> bool:
    """Documented limits of a method; every other refusal of an ordinary model is a fault."""
    features = recipe.features
    if recipe.troubles or features & LIMITS.get(method, frozenset()):
        return True
    if method in FLOWS:
        return not flow_is_defined(recipe)
    if method == "ntk-sap-analytic":
        return not closed_form_is_known(recipe)
    # The loss is the model's own, so that its logits cannot be divided.
    return method == "grasp" and {"mapping", "object"} <= features


def flow_is_defined(recipe: Recipe) -> bool:
    """Whether the network with positive weights is a positive flow as it is written."""
    positive = {
        "linear", "residual", "concatenated rows", "counters", "half", "bfloat", "double", "in pieces", "by group",
        "matrix product", "einsum", "frozen", "half frozen", "frozen norm", "normalised twice", "hooked", "listed",
        "layer scale", "dropout", "by value",
    }  # fmt: skip
    flowing = {"linear", "residual", "concatenated rows", "counters", "half", "bfloat", "double", "in pieces",
               "by group", "matrix product", "einsum", "frozen norm", "normalised twice", "hooked",
               "layer scale", "dropout"}  # fmt: skip
    maps = {"convolution", "residual convolution", "concatenated", "grouped", "depthwise", "transposed", "strided"}
    return (
        set(recipe.trunk) <= flowing & positive
        and recipe.body in ("rows", "images")
        and (recipe.body == "rows" or set(recipe.maps) <= maps)
        and recipe.norm in ("none", "batch", "plain batch")
        and recipe.activation in ("relu", "relu in place")
    )


def closed_form_is_known(recipe: Recipe) -> bool:
    """Whether it is among the architectures of which the closed form has all rules."""
    known = {"linear", "residual", "frozen", "half frozen", "frozen norm", "counters", "hooked", "layer scale"}
    maps = {"convolution", "residual convolution", "concatenated", "grouped", "depthwise", "transposed"}
    return (
        set(recipe.trunk) <= known
        and recipe.body in ("rows", "images", "transformer")
        and (recipe.body != "images" or set(recipe.maps) <= maps)
        and recipe.call == "pairs"
        and recipe.norm != "open batch"
    )


def has_oracle(recipe: Recipe, method: str) -> bool:
    if method not in oracles.ORACLES or "noise of its own" in recipe.troubles:
        return False
    if method in ("synflow", "synflow-l2"):
        return flow_is_defined(recipe)
    if recipe.troubles & NOISY:  # several passes, or one after a look that has drawn: in which state is not promised
        return method in ("magnitude", "janowsky", "snip", "taylor", "ntk-sap")
    return True


# The property.


def check(recipe: Recipe, methods: tuple[str, ...]) -> None:
    sample = build(recipe)
    for parameter in list(sample.model.parameters())[::2]:
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    before, luck, around = snapshot(sample.model), Luck.now(), surroundings()
    for method in methods:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            outcome = prune(sample, method)
        assert_untouched(sample, before, luck, around)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            judge(sample, method, outcome, [w for w in said if issubclass(w.category, SapwoodWarning)])


def judge(sample: Sample, method: str, outcome: Outcome, said: list[Any]) -> None:
    recipe = sample.recipe
    if outcome.result is None:
        if "gave every weight that is left the score 0" in outcome.refusal:
            assert_nothing_left(sample, method, outcome)
            return
        assert may_be_refused(recipe, method), f"{method} refused an ordinary model: {outcome.refusal}"
        assert_is_a_sentence(sample, outcome.refusal)
        return
    assert not must_be_refused(recipe, method), f"{method} gave masks"
    masks = outcome.result.masks
    assert_budget(sample, masks, method, outcome)
    if not recipe.troubles:
        known = ("keep no weight", "initialised to zero")
        assert not [w for w in said if not any(words in str(w.message) for words in known)]
    if has_oracle(recipe, method):
        assert_right(sample, method, outcome)


def assert_nothing_left(sample: Sample, method: str, outcome: Outcome) -> None:
    """The scores are all zero, in the oracle too: earlier rounds may have cut a network this small in two."""
    last = outcome.turns[-1]
    expected = oracles.ORACLES[method](_case(sample), last) if has_oracle(sample.recipe, method) else last.scores
    assert not any(score[last.masks[name]].any() for name, score in expected.items())
    assert sample.recipe.troubles or len(outcome.turns) > 1


def assert_is_a_sentence(sample: Sample, refusal: str) -> None:
    names = [name for name, _ in sample.model.named_parameters()]
    assert REMEDY.search(refusal) or any(name in refusal for name in names), refusal
    assert len(refusal) < 900, refusal


def assert_budget(sample: Sample, masks: Masks, method: str, outcome: Outcome) -> None:
    total = sum(masks[name].numel() for name in masks)
    assert masks.kept == round(DENSITY * total)
    assert list(masks) == expected_names(sample.model)
    for turn in outcome.turns:
        assert all(score.isfinite().all() for score in turn.scores.values())
    steps = [turn.masks for turn in outcome.turns[1:]] + [dict(masks)]
    if method != "force":
        for earlier, later in zip([turn.masks for turn in outcome.turns], steps, strict=False):
            assert all(bool((later[name] <= earlier[name]).all()) for name in earlier)
    counts = [sum(int(mask.sum()) for mask in step.values()) for step in steps[: len(outcome.turns)]]
    rounds = len(counts)
    assert counts == [round(DENSITY ** (t / rounds) * total) for t in range(1, rounds + 1)] or not rounds


def expected_names(model: nn.Module) -> list[str]:
    """Weights of two or more dimensions of layers that are no embeddings or norms, each once."""
    layers = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    names = []
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0].partition(".parametrizations")[0])
        leaf = name.rpartition("parametrizations.")[2] if "parametrizations" in name else name.rpartition(".")[2]
        if parameter.dim() >= 2 and isinstance(owner, layers) and "weight" in leaf:
            names.append(name)
    return names


def assert_right(sample: Sample, method: str, outcome: Outcome) -> None:
    case, luck = _case(sample), Luck.now()
    keeps = [turn.masks for turn in outcome.turns[1:]] + [dict(outcome.result.masks)]
    for turn, keep in zip(outcome.turns, keeps, strict=True):
        expected = oracles.ORACLES[method](case, turn)
        assert_equal(turn.scores, expected, method)
        candidates = outcome.turns[0].masks if method == "force" else turn.masks
        assert_highest(turn.scores, candidates, keep)
    luck.restore()


def _case(sample: Sample) -> Case:
    opened = tuple(name for name, _ in sample.model.named_parameters() if name.endswith(".gamma"))
    return Case(sample.model, sample.batches, opened)


def assert_equal(scores: dict[str, Tensor], expected: dict[str, Tensor], method: str) -> None:
    largest = max(float(score.abs().max()) for score in expected.values())
    for name, score in expected.items():
        torch.testing.assert_close(
            scores[name].double(), score.double(), rtol=1e-3, atol=1e-3 * float(score.abs().max()) + 1e-6 * largest,
            msg=lambda text, name=name: f"{method} scores {name!r} otherwise than its oracle: {text}",
        )  # fmt: skip


def assert_highest(scores: dict[str, Tensor], candidates: dict[str, Tensor], keep: dict[str, Tensor]) -> None:
    """What is kept scores at least what is not."""
    best = [scores[n][keep[n]] for n in scores]
    rest = [scores[n][candidates[n] & ~keep[n]] for n in scores]
    assert float(torch.cat(best).min()) >= float(torch.cat(rest).max())


COMMON = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(COMMON, max_examples=40)
@given(recipes(), st.lists(st.sampled_from(ALL), min_size=4, max_size=4, unique=True))
def test_any_model_is_scored_rightly_or_refused(recipe, methods):
    check(recipe, tuple(methods))


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_every_method_on_hundreds_of_models(body):
    @settings(COMMON, max_examples=40)
    @given(recipes())
    def each(recipe):
        check(dataclasses.replace(recipe, body=body), ALL)

    each()
