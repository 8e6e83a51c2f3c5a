"""Random small models, with and without what has led to silent wrong numbers: right by an oracle, or refused.

Whatever happens, the model, its buffers, version counters, modes, hooks, gradients and all random states stay.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
import sapwood
from expectations import expected_names, has_oracle, may_be_refused, must_be_refused
from oracles import Case, Turn
from random_models import BODIES, INTEGERS, Recipe, Sample, build, recipes
from sapwood import Masks, Method, SapwoodWarning, ntk
from sapwood.diagnosis import effective
from sapwood.errors import SapwoodError
from troubled_blocks import NOISY
from untouched import Luck, Untouched

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
        result = sapwood.prune(sample.model, method=found, density=DENSITY, batches=sample.batches, draw=sample.draw)
    except SapwoodError as error:
        return Outcome(None, turns, f"{type(error).__name__}: {error}")
    return Outcome(result, turns, "")


# The property.


def check(recipe: Recipe, methods: tuple[str, ...]) -> None:
    sample = build(recipe)
    for parameter in list(sample.model.parameters())[::2]:
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    untouched = Untouched(sample.model)
    for method in methods:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            outcome = prune(sample, method)
        untouched.check()
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
        known = ("keep no weight", "initialised to zero", "for their position only")
        assert not [w for w in said if not any(words in str(w.message) for words in known)]
    if has_oracle(recipe, method):
        assert_right(sample, method, outcome)


def assert_nothing_left(sample: Sample, method: str, outcome: Outcome) -> None:
    """The scores are all zero, in the oracle too: earlier rounds may have cut a network this small in two."""
    last = outcome.turns[-1]
    luck = Luck.now()
    expected = oracles.ORACLES[method](_case(sample), last) if has_oracle(sample.recipe, method) else last.scores
    luck.restore()
    assert not any(score[last.masks[name]].any() for name, score in expected.items())
    assert len(outcome.turns) > 1 or may_be_refused(sample.recipe, method)


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
    near = 1e-2 if method == "ntk-sap" else 1e-3  # differences of two passes in float32
    largest = max(float(score.abs().max()) for score in expected.values())
    for name, score in expected.items():
        torch.testing.assert_close(
            scores[name].double(), score.double(), rtol=near, atol=near * float(score.abs().max()) + 1e-6 * largest,
            msg=lambda text, name=name: f"{method} scores {name!r} otherwise than its oracle: {text}",
        )  # fmt: skip


def assert_highest(scores: dict[str, Tensor], candidates: dict[str, Tensor], keep: dict[str, Tensor]) -> None:
    """What is kept scores at least what is not."""
    best = [scores[n][keep[n]] for n in scores]
    rest = [scores[n][candidates[n] & ~keep[n]] for n in scores]
    assert float(torch.cat(best).min()) >= float(torch.cat(rest).max())


COMMON = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a recipe is short as it is
)


# The other doors.


def check_doors(recipe: Recipe) -> None:
    """The tangent kernel under masks, the weights that are on a path, and the check of the closed form."""
    sample = build(recipe)
    sizes = {name: sample.model.get_parameter(name) for name in expected_names(sample.model)}
    generator = torch.Generator().manual_seed(recipe.seed)
    kept = {name: torch.rand(weight.shape, generator=generator) < 0.7 for name, weight in sizes.items()}
    untouched, masks = Untouched(sample.model), Masks(kept)
    inputs = oracles.inputs_of(sample.batches[0])

    def kernel() -> Tensor:
        return ntk.kernel(sample.model, inputs, masks, batchnorm="eval", dropout="off")

    gram = answered(sample, untouched, kernel, not recipe.troubles and recipe.norm != "open batch")
    if gram is not None and not recipe.troubles & NOISY:
        expected = oracles.kernel(Case(sample.model, sample.batches), kept)
        torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))

    paths = answered(
        sample, untouched, lambda: effective(sample.model, masks, batches=sample.batches, draw=sample.draw)
    )
    assert paths is None or paths <= masks
    if recipe.call == "pairs" and recipe.body not in INTEGERS:
        shape = sample.batches[0][0].shape[1:]
        answered(sample, untouched, lambda: sapwood.check_score(sample.model, shape, draws=2, batch_size=4))


def answered(sample: Sample, untouched: Untouched, call: Callable[[], Any], needed: bool = False) -> Any:
    """The answer, or None for a refusal, which is one in words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except SapwoodError as error:
        refusal = str(error)
    finally:
        untouched.check()
    assert not needed, f"refused an ordinary model: {refusal}"
    assert_is_a_sentence(sample, refusal)
    return None


@settings(COMMON, max_examples=10)
@given(recipes(troubles=1))
def test_kernels_and_paths_of_any_model(recipe):
    check_doors(recipe)


@settings(COMMON, max_examples=40)
@given(recipes(), st.lists(st.sampled_from(ALL), min_size=4, max_size=4, unique=True))
def test_any_model_is_scored_rightly_or_refused(recipe, methods):
    check(recipe, tuple(methods))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # half a minute of one core each
@pytest.mark.parametrize("body", BODIES)
def test_every_method_on_hundreds_of_models(body):
    @seed(list(BODIES).index(body))  # else every body has the same forty
    @settings(COMMON, derandomize=False, max_examples=40)
    @given(recipes())
    def each(recipe):
        check(dataclasses.replace(recipe, body=body), ALL)

    each()


# A forward that breaks off.


class Stop(BaseException):
    """Such as KeyboardInterrupt, which no library may swallow."""


def breaking(sample: Sample, call: int, error: BaseException) -> list[int]:
    """Has the trunk raise at a call, counted over all copies of the model."""
    calls = [0]

    def count(module: nn.Module, inputs: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise error

    sample.model.trunk.register_forward_pre_hook(count)
    return calls


@settings(COMMON, max_examples=20)
@given(recipes(troubles=1), st.sampled_from(ALL), st.integers(1, 8), st.booleans())
def test_a_forward_that_raises_leaves_everything_as_it_was(recipe, method, call, interrupted):
    sample = build(recipe)
    calls = breaking(sample, call, Stop() if interrupted else RuntimeError("broken at this call"))
    untouched = Untouched(sample.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if interrupted:
            try:
                prune(sample, method)
            except Stop:
                assert calls[0] == call
        else:  # a look may go on without what it cannot have
            outcome = prune(sample, method)
            broke = (
                outcome.result or "broken at this call" in outcome.refusal or "rows of its inputs" in outcome.refusal
            )
            assert broke or recipe.troubles or may_be_refused(recipe, method)
    untouched.check()
