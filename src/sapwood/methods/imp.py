"""Pruning after training, with your own training: train, prune a share, go on or go back, and so on to the density.

* Iterative magnitude pruning with weight rewinding (Frankle & Carbin 2019; Frankle et al. 2020): after each level the
  weights that are left go back to where they were early in training, and are trained again.
* Learning-rate rewinding (Renda, Frankle & Carbin 2020), and fine-tuning (Han et al. 2015): they stay where they are;
  the two differ in the learning rate with which `train` goes on, from its beginning or at its end.
* One level is one-shot pruning after training.

Defaults: 20 % of the weights a level and the magnitude as score, as in these papers. Every level costs one training.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sapwood.allocation import target_density
from sapwood.attach import assert_masked
from sapwood.coverage import Coverage
from sapwood.errors import ConfigError
from sapwood.isolation import copied
from sapwood.masks import Masks
from sapwood.methods.front import prunable, prune
from sapwood.names import Names, unwrapped
from sapwood.pruning import Criterion, OnRound, Procedure, Result, Round
from sapwood.schedules import exponential

RATE = 0.2


def level_densities(density: float, rate: float | None) -> list[float]:
    """The density after each level: (1 - rate)^i, and `density` itself at last; None: `density` in one level.

    Raises:
        ConfigError: the rate is not between 0 and 1.
    """
    if rate is None or density >= 1:
        return [density]
    if not 0 < rate < 1:
        raise ConfigError(f"rate is {rate}; the share of the remaining weights that a level removes is in (0, 1).")
    count = math.ceil(math.log(density) / math.log(1 - rate) - 1e-9)
    return [*(round((1 - rate) ** level, 12) for level in range(1, count)), density]


def imp(  # noqa: PLR0913  # a front door: every argument but the model is a keyword
    model: nn.Module,
    *,
    train: Callable[[nn.Module, Masks], Any],
    density: float | None = None,
    sparsity: float | None = None,
    compression: float | None = None,
    levels: int | None = None,
    rewind: bool = True,
    until_rewind: Callable[[nn.Module], Any] | None = None,
    method: str | Procedure | Criterion = "magnitude",
    seed: int = 0,
    on_level: OnRound | None = None,
    **options: Any,
) -> Result:
    """Prunes a network level by level, training it before each; a copy is trained, the model itself is not changed.

    The result is where the last training begins, which is yours: `result.load_into(model)`, then train under
    `result.masks`. So `levels` trainings happen here.

    Args:
        model: The model at its initial weights (or trained ones: then `train` goes on from there).
        train: `train(model, masks)` trains the given module in place and keeps pruned weights at zero, as `attach`
            does; the masks of the first call keep everything. It takes a new optimizer and begins its schedule each
            time, or what else you want retraining to be.
        density: Share of the prunable weights to keep in the end, (0, 1]. Exactly one of these three words is given.
        sparsity: 1 - density.
        compression: 1 / density.
        levels: Number of levels, each removing the same share of what is left; None: as many as 20 % a level takes.
        rewind: Whether weights go back after each level (True), or stay as trained.
        until_rewind: Trains a model up to the point to which weights go back; None: they go back to their initial
            values. `train` goes on from there.
        method: What scores the trained weights: a name, method or criterion as for `prune`.
        seed: Seed of the scoring.
        on_level: Called after each level with its record and masks.
        **options: Further arguments of `prune`: batches, include, exclude, min_per_layer, fields of the method.

    Returns:
        Masks, the weights and buffers to train from, and one record a level.

    Raises:
        MaskError: `train` let a pruned weight become other than zero.
        SapwoodError: what `prune` refuses.

    Example:
        >>> import torch, sapwood
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> x, y = torch.randn(64, 8), torch.randint(4, (64,))
        >>> def train(model, masks):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     with sapwood.attach(masks, model, optimizer):
        ...         for _ in range(10):
        ...             optimizer.zero_grad()
        ...             torch.nn.functional.cross_entropy(model(x), y).backward()
        ...             optimizer.step()
        ...
        >>> result = sapwood.imp(model, train=train, density=0.25, levels=2, min_per_layer=9)
        >>> [round.kept for round in result.history]
        [192, 96]
        >>> result.load_into(model)
        >>> train(model, result.masks)
    """
    begin = time.perf_counter()
    target = target_density(density, sparsity, compression)
    core = unwrapped(model)
    options |= (patterns := _by_name(model, options))
    trained = copied(core)
    result = Result(Masks.dense(prunable(trained, **patterns)), (), 0.0, seed)
    if until_rewind is not None:
        until_rewind(trained)
    early, history = _state(trained), list[Round]()
    for index, goal in enumerate(_goals(target, levels), start=1):
        since = time.perf_counter()
        train(trained, result.masks)
        assert_masked(trained, result.masks, strict=False)
        result = prune(trained, method=method, density=goal, within=result.masks, seed=seed, **options)
        if rewind:
            result = dataclasses.replace(result, params=early)
        result.load_into(trained)
        kept, collapsed = result.masks.kept, result.collapsed
        history.append(Round(index, goal, kept, time.perf_counter() - since, collapsed))
        if on_level is not None:
            on_level(history[-1], result.masks)
    seconds = time.perf_counter() - begin
    name = f"imp ({result.method})"
    coverage = Coverage.of(core, result.masks, patterns["exclude"])
    return Result(result.masks, tuple(history), seconds, seed, name, _state(trained), coverage=coverage)


def _by_name(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The selection as names, since modules of the model are not those of its copy."""
    chosen = prunable(model, options.get("include", ()), options.get("exclude", ()))
    return {"include": tuple(chosen), "exclude": tuple(name for name in prunable(model) if name not in chosen)}


def _goals(density: float, levels: int | None) -> list[float]:
    if levels is None:
        return level_densities(density, RATE)
    if levels < 1:
        raise ConfigError(f"levels is {levels}; it must be 1 or more.")
    return [*exponential(density, levels)[:-1], density]


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, tied ones once."""
    names = Names.of(model)
    return {name: tensor.detach().clone() for name, tensor in (names.parameters | names.buffers).items()}
