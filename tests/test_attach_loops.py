"""Training loops drawn at random: pruned weights are zero whenever they are read, kept ones as if masked by hand."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import optim
from torch.nn.attention import SDPBackend, sdpa_kernel

from optimizers import Accelerated, Averaging, Langevin, ListedLookahead, Sam, Whitened
from training_loops import ACTIONS, MODELS, Loop


def muon(parameters):
    matrices = [p for p in parameters if p.dim() == 2]
    rest = [p for p in parameters if p.dim() != 2]
    return [optim.Muon(matrices, lr=0.02), *([optim.SGD(rest, lr=0.1)] if rest else [])]


OURS: dict[str, Callable] = {
    "adadelta": lambda p: [optim.Adadelta(p, lr=0.5)],
    "adafactor": lambda p: [optim.Adafactor(p, lr=0.02)],
    "adagrad": lambda p: [optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1)],
    "adam": lambda p: [optim.Adam(p, lr=0.02, amsgrad=True)],
    "adamw": lambda p: [optim.AdamW(p, lr=0.02, weight_decay=0.1, foreach=True)],
    "adamax": lambda p: [optim.Adamax(p, lr=0.02)],
    "asgd": lambda p: [optim.ASGD(p, lr=0.05)],
    "lbfgs": lambda p: [optim.LBFGS(p, lr=0.3, max_iter=4)],
    "lbfgs line search": lambda p: [optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe")],
    "muon": muon,
    "nadam": lambda p: [optim.NAdam(p, lr=0.02, weight_decay=0.1)],
    "radam": lambda p: [optim.RAdam(p, lr=0.02)],
    "rmsprop": lambda p: [optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True)],
    "rprop": lambda p: [optim.Rprop(p, lr=0.01)],
    "sgd": lambda p: [optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)],
    "sam": lambda p: [Sam(p)],
    "accelerated": lambda p: [Accelerated(optim.AdamW(p, lr=0.02))],
    "listed lookahead": lambda p: [ListedLookahead(optim.SGD(p, lr=0.1, momentum=0.9))],
    "whitened": lambda p: [Whitened(p)],
    "whitened lookahead": lambda p: [ListedLookahead(Whitened(p))],
    "langevin": lambda p: [Langevin(p, lr=0.1, momentum=0.9)],
    "averaging": lambda p: [Averaging(p, lr=0.1)],
}


def timm_optimizers() -> dict[str, Callable]:
    """Those that run on a CPU."""
    if importlib.util.find_spec("timm") is None:
        return {}
    from timm.optim import create_optimizer_v2, list_optimizers

    def build(name):
        return lambda parameters: [create_optimizer_v2(list(parameters), opt=name, lr=0.02)]

    names = list_optimizers(exclude_filters=["bnb*", "fused*"])
    return {f"timm {name}": build(name) for name in (*names, "lookahead_adamw", "lookahead_lamb", "lookahead_muon")}


def schedulefree_optimizers() -> dict[str, Callable]:
    if importlib.util.find_spec("schedulefree") is None:
        return {}
    import schedulefree

    return {
        "schedulefree adamw": lambda p: [schedulefree.AdamWScheduleFree(p, lr=0.02, foreach=False)],
        "schedulefree sgd": lambda p: [schedulefree.SGDScheduleFree(p, lr=0.1, foreach=False)],
        "schedulefree radam": lambda p: [schedulefree.RAdamScheduleFree(p, lr=0.02)],
    }


OPTIMIZERS = {**OURS, **timm_optimizers(), **schedulefree_optimizers()}
COMPILED = {"timm kron", "timm kronc", "timm kronw"}
"""Compile a function at their first step, which takes seconds."""


def compare(ours: Loop, theirs: Loop, action: str) -> None:
    """Zeros wherever the weights were read or stepped, equal weights elsewhere, in parameters and in files."""
    stepped = action in ("step", "closure", "accumulate", "clip", "gradients by hand", "evaluate", "cast")
    expected = theirs.model.state_dict()
    if not all(value.isfinite().all() for value in expected.values()):
        assume(False)
    read = {name: parameter.detach().clone() for name, parameter in ours.model.named_parameters()}
    for name, value in [*(read.items() if stepped else ()), *ours.model.state_dict().items()]:
        mask = ours.masks.get(name.replace("decode", "encode"), torch.tensor(True)).expand_as(value)
        assert (value[~mask] == 0).all(), (action, name)
        kept = [torch.where(mask, v, 0) for v in (value, expected[name])]
        torch.testing.assert_close(*kept, rtol=1e-6, atol=1e-8, msg=lambda m, a=action, n=name: f"{a} {n}: {m}")
    if ours.average is not None:
        averages = theirs.average.module.state_dict()
        for name, value in ours.average.module.state_dict().items():
            torch.testing.assert_close(value, averages[name], rtol=1e-6, atol=1e-8)


def trained_alike(optimizer: str, model: str, density: float, before: int, frozen: bool, actions: list[str]) -> None:
    # Momentum of dense steps cannot be told from a factor where all matrices are square, and Muon mixes it
    # (docs/guarantees.md).
    if model == "tied" and before and "muon" in optimizer.lower():
        return
    # Attention's faster kernel has no second derivative, which some optimizers take.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of second derivatives, and of missing accelerations
        loops = [Loop(model, OPTIMIZERS[optimizer], density, by_hand=hand, frozen=frozen) for hand in (False, True)]
        for index, action in enumerate([*["step"] * before, "attach", *actions]):
            results = []
            for loop in loops:
                torch.manual_seed(index)
                results.append(Loop.attach(loop) if action == "attach" else ACTIONS[action](loop))
            if action == "evaluate":
                torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)
            if index >= before:
                compare(*loops, action)


def drawn(optimizers):
    return given(
        optimizer=st.sampled_from(sorted(optimizers)),
        model=st.sampled_from(sorted(MODELS)),
        density=st.sampled_from([0.2, 0.5, 0.9]),
        before=st.integers(0, 2),
        frozen=st.booleans(),
        actions=st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=7),
    )


calm = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False)


@pytest.mark.trap(48)
@settings(calm, max_examples=70)
@drawn(set(OPTIMIZERS) - COMPILED)
def test_training_loops_drawn_at_random(**drawing) -> None:
    trained_alike(**drawing)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(calm, max_examples=800)
@drawn(OPTIMIZERS)
def test_many_training_loops_drawn_at_random(**drawing) -> None:
    trained_alike(**drawing)


@pytest.mark.trap(48)
@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=[pytest.mark.slow] * (name in COMPILED)) for name in sorted(OPTIMIZERS)]
)
def test_every_optimizer(optimizer: str) -> None:
    trained_alike(optimizer, "mlp", 0.5, 1, False, ["clip", "closure", "write", "step"])
