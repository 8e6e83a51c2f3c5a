"""Pruning after training as a chain of runs: the dense network, then level after level, each run from the one before.

Every link is a run like any other, with a folder and a checkpoint of its own beside the run that needs it. So levels
are resumed, and shared: by all sparsities and methods of a comparison as far as their chains agree, and the dense
network at their beginning is the comparison's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sapwood import files
from sapwood.errors import ConfigError, SapwoodError, unknown_name
from sapwood.experiments import store, weights
from sapwood.experiments.config import DENSE, RETRAINING, RunConfig
from sapwood.experiments.store import RunResult
from sapwood.masks import Masks
from sapwood.methods import level_densities
from sapwood.training import TrainConfig

Kept = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Earlier:
    """What a level begins from.

    Attributes:
        masks: Of the level before; None: it was the dense network.
        epochs: Trained so far, in all.
        seconds: That they and the prunings between them took.
        lr: Learning rate at the beginning of the last epoch.
    """

    masks: Masks | None
    epochs: int
    seconds: float
    lr: float


def check(config: RunConfig) -> None:
    """Refuses fields of retraining that could not have been meant.

    Raises:
        ConfigError: an unknown way of retraining, a rate outside (0, 1), or an epoch that there is none of.
    """
    if not config.retrain:
        if config.rewind_epoch or config.rate is not None:
            raise ConfigError(f"rewind_epoch and rate need a way of retraining: retrain={' or '.join(RETRAINING)}.")
        return
    if config.retrain not in RETRAINING:
        raise unknown_name("way of retraining", config.retrain, RETRAINING)
    if config.method == DENSE:
        raise ConfigError("retrain needs a pruning method; the dense network is trained once.")
    if config.control == "reinit":
        raise ConfigError("The control reinit is for pruning before training: trained weights are not initial ones.")
    if config.retrain == "fine-tune" and config.rewind_epoch:
        raise ConfigError("rewind_epoch is for rewind-weights and rewind-lr; with fine-tune nothing is rewound.")
    level_densities(config.density, config.rate)
    schedule(config, config.train.lr)


def chain(config: RunConfig) -> list[RunConfig]:
    """The runs that come before this one, the dense network first; none where pruning comes before training."""
    if not config.retrain:
        return []
    densities = level_densities(config.density, config.rate)[:-1]
    levels = [dataclasses.replace(config, density=density, control="") for density in densities]
    return [_dense(config), *levels]


def kept_weights(configs: Sequence[RunConfig]) -> Kept:
    """After which epochs the runs that others begin from, or rewind to, must keep their weights, by the run's id."""
    kept: dict[str, set[int]] = {}
    for config in configs:
        for each in chain(config):
            kept.setdefault(each.id, set()).add(each.train.epochs)
        if config.retrain == "rewind-weights" and config.rewind_epoch:
            kept[_dense(config).id].add(config.rewind_epoch)
    return {name: tuple(sorted(epochs)) for name, epochs in kept.items()}


def schedule(config: RunConfig, last_lr: float) -> TrainConfig:
    """How the network of this run is trained.

    Args:
        config: The run.
        last_lr: Learning rate in the last epoch of the training before.

    Returns:
        That of the config; after rewinding, from `rewind_epoch` on; for fine-tuning, at the constant rate `last_lr`.
    """
    if not config.retrain:
        return config.train
    if config.retrain == "fine-tune":
        return dataclasses.replace(config.train, lr=last_lr, schedule="step", milestones=(), warmup_epochs=0)
    return dataclasses.replace(config.train, start_epoch=config.rewind_epoch)


def run_before(config: RunConfig, root: Path, run: Callable[..., RunResult], model: nn.Module) -> Earlier:
    """Does what comes before, as far as it is not done, and loads the weights that the last of it trained.

    Args:
        config: The run that is to begin.
        root: Where the folders of runs are, by their ids.
        run: `run(config, folder, keep=epochs)`.
        model: Gets the weights.

    Raises:
        SapwoodError: one of the trainings diverged.
    """
    before, kept = chain(config), kept_weights([config])
    epochs, seconds = 0, 0.0
    for each in before:  # from the dense network on, so that each finds the one before it finished
        result = run(each, root / each.id, keep=kept[each.id])
        if result.diverged:
            raise SapwoodError(
                f"The training before this pruning ({each.label}, density {each.density:g}) diverged in epoch "
                f"{result.epochs}: lower the learning rate."
            )
        epochs, seconds = epochs + result.epochs, seconds + result.prune_seconds + result.train_seconds
    last = before[-1]
    folder = root / last.id
    weights.load(model, folder / store.WEIGHTS)
    masks = None if last.method == DENSE else Masks.load(folder / store.MASKS)
    return Earlier(masks, epochs, seconds, float(files.read_rows(folder / store.METRICS)[-1]["lr"]))


def rewind(config: RunConfig, root: Path, model: nn.Module, initial: Callable[[], nn.Module]) -> None:
    """Takes a model's weights back to `rewind_epoch` of the dense training, if that is how the run is retrained.

    Args:
        config: The run.
        root: Where the folders of runs are, by their ids.
        model: Gets the weights.
        initial: Makes the model as it is before any training.
    """
    if config.retrain != "rewind-weights":
        return
    if config.rewind_epoch:
        dense = _dense(config)
        weights.load(model, weights.path(root / dense.id, config.rewind_epoch, dense.train.epochs))
    else:
        model.load_state_dict(initial().state_dict())


def _dense(config: RunConfig) -> RunConfig:
    return RunConfig(config.data, config.model, resolution=config.resolution, seed=config.seed, train=config.train)
