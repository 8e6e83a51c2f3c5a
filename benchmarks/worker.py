"""One measurement in a process of its own: `python benchmarks/worker.py JSON` prints a line of JSON.

A fresh process, because the peak of the resident memory cannot be told otherwise.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import published
import torch
from cases import CASES, Case
from torch.utils.flop_counter import FlopCounterMode

import sapwood
from sapwood import models
from sapwood.batches import Data
from sapwood.experiments.fields import parse_variant
from sapwood.functional import FunctionalModel
from sapwood.isolation import isolated
from sapwood.methods import METHODS, configured
from sapwood.witness import opened

PUBLISHED, GEMM = "published", "gemm"


@dataclass(frozen=True)
class Plan:
    """What is run, and what share of a full search that is.

    Attributes:
        run: The measured call.
        inputs: Inputs that it looks at; of `all_inputs` in a full search.
        mini_batches: Mini-batches (of Monte-Carlo and labelled methods) or rounds (of others) that it runs; of
            `all_mini_batches`.
        unit: What they are called.
        read: The reading of the model that the call begins with, which a longer search does not repeat.
        look: The same with the looks at the model.
    """

    run: Callable[[], Any]
    inputs: int
    all_inputs: int
    mini_batches: int
    all_mini_batches: int
    unit: str
    read: Callable[[], Any] = lambda: None
    look: Callable[[], Any] = lambda: None


def main(text: str) -> None:
    """Measures what the JSON says: {case, changes, method, threads, count, extent}."""
    spec = json.loads(text)
    torch.set_num_threads(spec["threads"])
    if spec["method"] == GEMM:
        print(json.dumps({"gemm_flops_a_second": gemm_rate()}))
        return
    plan = planned(changed(CASES[spec["case"]], spec["changes"]), spec["method"], spec["extent"])
    _warm_up(spec["method"])
    print(json.dumps(counted(plan) if spec["count"] else timed(plan)))


def changed(case: Case, changes: dict[str, Any]) -> Case:
    """The case with other fields; `settings` are added to its own."""
    settings = {**case.settings, **changes.get("settings", {})}
    return Case(**{**vars(case), **changes, "settings": settings})


def planned(case: Case, text: str, extent: str) -> Plan:
    """The search by a method, `NAME` or `NAME@FIELD=VALUE,...`, or one mini-batch of it.

    Args:
        case: Network and budget.
        text: The method.
        extent: "whole", "part" (one mini-batch of the methods that have many), or "auto", a part where hours pass.
    """
    part = extent == "part" or (extent == "auto" and case.long)
    torch.manual_seed(0)
    model = models.create(case.model, num_classes=case.num_classes, **case.settings)
    if text == PUBLISHED:
        return _published(case, model, part=part)
    variant = parse_variant(text)
    recipe = METHODS[variant.method]
    draws = variant.method in ("ntk-sap", "ntk-sap-jvp")
    fields = {**(case.budget if variant.method == "ntk-sap" else {}), **variant.fields}
    if draws:
        fields["batch_size"] = min(case.batch_size, fields.get("batch_size", recipe.criterion.batch_size))
    recipe = configured(variant.method, recipe, fields)
    options = {"method": variant.method, "density": case.density, "input_shape": case.input_shape, **fields}
    once = (partial(_read, model), partial(_looked_at, model, case.input_shape))
    if draws:
        sizes = _sizes(recipe.criterion.samples, recipe.criterion.batch_size) * recipe.criterion.resamples
        if part:
            options |= {"rounds": 1, "resamples": 1, "samples": sizes[0]}
        return _plan(lambda: sapwood.prune(model, **options), sizes, recipe.rounds, part, once)
    if getattr(recipe, "needs_data", True):
        sizes = _sizes(case.labelled, case.batch_size)
        options |= {"batches": _labelled(case, sizes[:1] if part else sizes)} | ({"rounds": 1} if part else {})
        return _plan(lambda: sapwood.prune(model, **options), sizes, recipe.rounds, part, once)
    return Plan(lambda: sapwood.prune(model, **options), 1, 1, recipe.rounds, recipe.rounds, "rounds", *once)


def timed(plan: Plan) -> dict[str, Any]:
    """Wall and CPU seconds, and bytes at the peak and before; reading and looking at the model apart, in CPU seconds.

    A part of a search is without these, since what it stands for has them only once.
    """
    before = _resident("VmRSS")
    plan.look()  # what it loads at its first call is no cost of the second
    _, read = _seconds(plan.read)
    _, look = _seconds(plan.look)
    wall, cpu = _seconds(plan.run)
    bytes_used = {"peak_bytes": _resident("VmHWM"), "before_bytes": before}
    once = look if plan.mini_batches < plan.all_mini_batches else 0.0
    measured = {"wall_s": wall - once, "cpu_s": cpu - once, "read_cpu_s": read, "look_cpu_s": look - read, **bytes_used}
    shares = {key: value for key, value in vars(plan).items() if key not in ("run", "read", "look")}
    return {**measured, **shares, "torch": torch.__version__, "sapwood": sapwood.__version__}


def counted(plan: Plan) -> dict[str, Any]:
    """Floating-point operations of convolutions and matrix products, two a multiply-add; without the looks."""
    flops = _flops(plan.run) - _flops(plan.look)
    return {"flops": flops, "inputs": plan.inputs, "all_inputs": plan.all_inputs}


def _flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def _read(model: torch.nn.Module) -> Any:
    with isolated(0, torch.device("cpu")):
        return FunctionalModel.of(model)


def _looked_at(model: torch.nn.Module, input_shape: tuple[int, ...]) -> Any:
    """What `prune` does before it scores."""
    device = torch.device("cpu")
    with isolated(0, device):
        return opened(model, Data.collect(None, input_shape, device))


def gemm_rate(size: int = 1024, seconds: float = 1.0) -> float:
    """FLOPs a second of this machine's float32 matrix product: the best of the repetitions within `seconds`."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        begin = time.perf_counter()
        left @ right
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def _warm_up(text: str) -> None:
    """Loads what torch and Sapwood import at a first search with a method, once a process: up to over a second."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    name = "ntk-sap" if text == PUBLISHED else parse_variant(text).method
    labelled = [(torch.randn(2, 1, 4, 4), torch.tensor([0, 1]))]
    few = {"resamples": 1, "samples": 2} if name in ("ntk-sap", "ntk-sap-jvp") else {}
    rounds = {"rounds": 1} if hasattr(METHODS[name], "rounds") else {}
    sapwood.prune(model, method=name, density=0.5, input_shape=(1, 4, 4), batches=labelled, **rounds, **few)


def _published(case: Case, model: torch.nn.Module, *, part: bool) -> Plan:
    sizes = _sizes(case.budget["samples"], case.batch_size) * case.budget["resamples"]
    budget = {**case.budget, **({"rounds": 1, "resamples": 1, "samples": sizes[0]} if part else {})}
    names = list(sapwood.prunable(model))

    def run() -> Any:
        return published.search(
            model, names, case.density, input_shape=case.input_shape, batch_size=case.batch_size, **budget
        )

    return _plan(run, sizes, case.budget["rounds"], part)


def _plan(
    run: Callable[[], Any], sizes: list[int], rounds: int, part: bool, once: tuple[Callable[[], Any], ...] = ()
) -> Plan:
    every = (sum(sizes) * rounds, len(sizes) * rounds)
    done = (sizes[0], 1) if part else every
    return Plan(run, done[0], every[0], done[1], every[1], "mini-batches", *once)


def _sizes(samples: int, batch_size: int) -> list[int]:
    sizes = [batch_size] * (samples // batch_size)
    return sizes + [samples % batch_size] * bool(samples % batch_size)


def _labelled(case: Case, sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(size, *case.input_shape), torch.arange(size) % case.num_classes) for size in sizes]


def _resident(entry: str) -> int:
    """VmHWM (peak) or VmRSS (now) of this process, which, unlike getrusage's peak, forgets the parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(entry))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # collapsed layers after a single round are no news here
    main(sys.argv[1])
