"""One run: prune, train, write down. Its result depends on its config alone; what is done already is not done again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from sapwood import files
from sapwood.diagnosis import effective
from sapwood.errors import ConfigError, SapwoodError
from sapwood.experiments import cost, identity, levels, store, weights
from sapwood.experiments.config import CONTROL_SEED, DENSE, Place, RunConfig
from sapwood.experiments.environment import device_of, environment
from sapwood.experiments.fairness import order_hash, weights_hash
from sapwood.experiments.identity import Identity
from sapwood.experiments.material import Split, create_model, load_data
from sapwood.experiments.stages import pruned, trained
from sapwood.experiments.store import RunFolder, RunResult
from sapwood.experiments.together import first, gathered
from sapwood.masks import Masks
from sapwood.methods import prunable
from sapwood.names import Names
from sapwood.training import Epoch, TrainResult

if TYPE_CHECKING:  # imported late, as it is slow to import
    from lightning_fabric import Fabric


def run(  # noqa: PLR0913  # what, where, from what, and who hears of it
    config: RunConfig,
    folder: Path,
    place: Place,
    *,
    masks: Masks | None = None,
    keep: Collection[int] = (),
    on_epoch: Callable[[Epoch], None] | None = None,
    wait: bool = True,
    fabric: Fabric | None = None,
    inputs: Identity | None = None,
) -> RunResult:
    """Runs a config to its end, from wherever an earlier call in the same folder got to.

    Args:
        config: What to do.
        folder: Where the files go; see `store`. What a run that prunes after training begins from is run beside it.
        place: Device and data.
        masks: Masks from a file, instead of pruning.
        keep: Epochs after which weights are written, the last one among them where the trained weights are wanted.
        on_epoch: Called after every epoch.
        wait: Whether to wait for another process that is at the same run, and take its result.
        fabric: The processes that train together, all of which call this with the same arguments, in place of
            `place.device`; the first of them writes. They prune nothing: the config is dense or comes with masks.
        inputs: What the data and the code were, see `identity.inputs`, when the comparison began that this is part of.

    Raises:
        ConfigError: the data, the model, or somebody's code is not what it was when the run began, or ended.
        RunBusyError: another process is at this run, and `wait` is False.
        SapwoodError: what the method, the model, the data or the folder refuses.
    """
    levels.check(config)
    dataset = load_data(config.data, config.resolution, place)
    device = device_of(place.device) if fabric is None else fabric.device
    fresh = functools.partial(create_model, config.model, dataset, config.seed)
    model = fresh()
    if masks is not None:
        masks = Names.of(model).fit(masks)
    elif fabric is not None and config.method != DENSE:
        raise ConfigError(f"{fabric.world_size} processes train under masks that are there: prune first.")
    made_of = identity.of(config, dataset, model)
    identity.require_unchanged(inputs, made_of)
    here = RunFolder(folder, config, wait=wait)
    with ExitStack() as stack:
        begun = first(fabric, lambda: _begun(stack, here, made_of, environment(device, fabric), keep))
        if isinstance(begun, RunResult):
            return begun
        initial = weights_hash(model)
        model.to(device)
        before = levels.Earlier(None, 0, 0.0, config.train.lr)
        if config.retrain:
            before = levels.run_before(config, folder.parent, functools.partial(run, place=place, wait=wait), model)
        if masks is None and config.method != DENSE:
            masks = pruned(config, model, dataset, folder, before.masks)
        levels.rewind(config, folder.parent, model, fresh)
        if config.control == "reinit":
            model = create_model(config.model, dataset, config.seed + CONTROL_SEED)
            initial = weights_hash(model)
            model.to(device)
        split = Split.of(dataset, config.train, device)
        cost.reset_peak(device)
        training = levels.schedule(config, before.lr)
        result = trained(training, model, split, masks, here, keep=keep, on_epoch=on_epoch, fabric=fabric)
        if fabric is not None:
            model = gathered(model, fabric, fresh)

        facts = {
            "environment": begun,
            "init_hash": initial,
            "order_hash": order_hash(split, config.train.seed),
            "settings": {} if masks is None else masks.provenance.get("fields", {}),
            "prior_epochs": before.epochs,
            "prior_seconds": before.seconds,
        }
        wanted = config.train.epochs in keep or config.rate is not None  # further levels may be asked for later

        def write() -> RunResult:
            summary = dataclasses.replace(_summary(model, masks, result, split), **facts)
            return _written(summary, here, model if wanted else None)

        return first(fabric, write)


def finished(config: RunConfig, folder: Path, keep: Collection[int] = ()) -> RunResult | None:
    """The result of a run if it is done and its files are whole, the weights after the epochs `keep` among them."""
    done = store.finished(folder, config)
    whole = done is not None and (done.diverged or weights.all_there(folder, keep, config.train.epochs))
    return done if whole else None


def _written(summary: RunResult, here: RunFolder, model: nn.Module | None) -> RunResult:
    """Writes the weights, if a model is given, then the result, and only then drops the checkpoint."""
    here.check()
    if model is not None:
        weights.save(model, here.path / store.WEIGHTS)
    summary = dataclasses.replace(summary, files=store.digests(here.path))
    store.write_result(here.path, summary)
    (here.path / store.CHECKPOINT).unlink(missing_ok=True)
    return summary


def _begun(
    stack: ExitStack, here: RunFolder, made_of: Identity, where: Mapping[str, str], keep: Collection[int]
) -> RunResult | Mapping[str, str]:
    """Locks the folder until the stack unwinds; returns the result if there is one, else the run's environment."""
    stack.enter_context(here)
    if (done := finished(here.config, here.path, keep)) is not None:
        identity.require_finished(here.path, made_of)
        return done
    (here.path / store.RESULT).unlink(missing_ok=True)  # damaged, or another file is

    if identity.claim(here, made_of):
        where = _joined(here.path / store.ENVIRONMENT, where)
    files.write_json(here.path / store.ENVIRONMENT, where)
    return where


def _joined(file: Path, now: Mapping[str, str]) -> Mapping[str, str]:
    """The environments of a run that goes on elsewhere: `A, then B` where they differ."""
    try:
        before = files.read_json(file)
    except (OSError, ValueError):  # not written yet, or damaged
        return now
    return {key: _then(str(before.get(key, value)), value) for key, value in now.items()}


def _then(before: str, now: str) -> str:
    return before if before == now or before.endswith(f", then {now}") else f"{before}, then {now}"


def _summary(model: nn.Module, masks: Masks | None, result: TrainResult, split: Split) -> RunResult:
    train_memory = cost.peak_memory(split.device)
    kept = Masks.dense(prunable(model)) if masks is None else masks
    return RunResult(
        test_accuracy=result.test_accuracy,
        validation_accuracy=result.validation_accuracy,
        diverged=result.diverged,
        epochs=len(result.history),
        prune_seconds=0.0 if masks is None else float(masks.provenance.get("seconds", 0.0)),
        train_seconds=result.seconds,
        layers={name: (count.kept, count.total) for name, count in kept.per_layer().items()},
        collapsed=kept.collapsed,
        environment={},
        prune_memory=None if masks is None else masks.provenance.get("peak_memory"),
        train_memory=train_memory,
        flops=cost.flops(model, kept, split.dataset.input_shape),
        effective=_effective(model, kept, split.dataset.input_shape),
    )


def _effective(model: nn.Module, masks: Masks, input_shape: tuple[int, ...]) -> int | None:
    try:
        return effective(model, masks, input_shape=input_shape).kept
    except SapwoodError:  # a model that a positive flow cannot be run through was trained all the same
        return None
