"""One run: prune, train, write down. Its result depends on its config alone; what is done already is not done again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

from sapwood.data import Dataset, pruning_batches
from sapwood.diagnosis import effective
from sapwood.errors import DataError, MaskError, SapwoodError
from sapwood.experiments import cost, levels, store, weights
from sapwood.experiments.config import CONTROL_SEED, DENSE, Place, RunConfig
from sapwood.experiments.environment import device_of, environment
from sapwood.experiments.fairness import order_hash, weights_hash
from sapwood.experiments.material import Split, create_model, load_data
from sapwood.experiments.search import Subject, needs_batches, search
from sapwood.experiments.store import RunResult
from sapwood.masks import Masks
from sapwood.methods import prunable
from sapwood.pruning import Result
from sapwood.training import Epoch, TrainConfig, TrainResult, train

NEW_WEIGHTS = "new_weights"  # in the masks' provenance: there is a file of weights with them


def run(
    config: RunConfig,
    folder: Path,
    place: Place,
    *,
    masks: Masks | None = None,
    save_weights: bool = False,
    keep: Collection[int] = (),
    on_epoch: Callable[[Epoch], None] | None = None,
    wait: bool = True,
) -> RunResult:
    """Runs a config to its end, from wherever an earlier call in the same folder got to.

    Args:
        config: What to do.
        folder: Where the files go; see `store`. What a run that prunes after training begins from is run beside it.
        place: Device and data.
        masks: Masks from a file, instead of pruning.
        save_weights: Also write the trained weights.
        keep: Epochs after which weights are written, for runs that begin from them.
        on_epoch: Called after every epoch.
        wait: Whether to wait for another process that is at the same run, and take its result.

    Raises:
        RunBusyError: another process is at this run, and `wait` is False.
        SapwoodError: what the method, the model, the data or the folder refuses.
    """
    levels.check(config)
    keep = {*keep, *([config.train.epochs] if save_weights else [])}
    dataset, device = load_data(config.data, config.resolution, place), device_of(place.device)
    model = create_model(config.model, dataset, config.seed)
    if masks is not None:
        masks.check(dict(model.named_parameters()))
    with store.opened(folder, config, wait=wait):
        if (done := finished(config, folder, keep)) is not None:
            return done
        (folder / store.RESULT).unlink(missing_ok=True)  # damaged, or another file is
        store.write_json(folder / store.ENVIRONMENT, environment(device))
        initial = weights_hash(model)
        model.to(device)
        before = levels.Earlier(None, 0, 0.0, config.train.lr)
        if config.retrain:
            before = levels.run_before(config, folder.parent, functools.partial(run, place=place, wait=wait), model)
        if masks is None and config.method != DENSE:
            masks = _pruned(config, model, dataset, folder, before.masks)
        levels.rewind(config, folder.parent, model, lambda: create_model(config.model, dataset, config.seed))
        training = levels.schedule(config, before.lr)
        split = Split.of(dataset, config.train, device)
        cost.reset_peak(device)
        weights.drop_checkpoint_beyond(folder, keep, config.train.epochs)
        result = _trained(training, model, split, masks, folder, keep, on_epoch)
        if config.train.epochs in keep or config.rate is not None:  # further levels may be asked for later
            weights.save(model, folder / store.WEIGHTS)
        summary = dataclasses.replace(
            _summary(model, masks, result, split),
            init_hash=initial,
            order_hash=order_hash(split, config.train.seed),
            prior_epochs=before.epochs,
            prior_seconds=before.seconds,
        )
        store.write_result(folder, summary)
        (folder / store.CHECKPOINT).unlink(missing_ok=True)
        return summary


def finished(config: RunConfig, folder: Path, keep: Collection[int] = ()) -> RunResult | None:
    """The result of a run if it is done and its files are whole, the weights after the epochs `keep` among them."""
    done = store.finished(folder, config)
    whole = done is not None and (done.diverged or weights.all_there(folder, keep, config.train.epochs))
    return done if whole else None


def _pruned(config: RunConfig, model: nn.Module, dataset: Dataset, folder: Path, within: Masks | None) -> Masks:
    path = folder / store.MASKS
    if path.exists():
        try:
            masks = Masks.load(path)
            masks.check(dict(model.named_parameters()))
            if masks.provenance.get(NEW_WEIGHTS):
                params = weights.load_new(folder / weights.NEW, next(model.parameters()).device)
                Result(masks, (), 0.0, config.seed, params=params).load_into(model)
            return masks
        except (MaskError, ValueError):  # damaged since: the same masks are found again
            path.unlink()
    (folder / store.CHECKPOINT).unlink(missing_ok=True)  # it belongs to masks that are no more
    batches = None
    if needs_batches(config.method, config.fields):
        batches = pruning_batches(dataset, per_class=config.per_class, seed=config.seed)
    result = search(
        Subject(model, dataset.input_shape, batches),
        method=config.method,
        density=config.density,
        seed=config.seed,
        min_per_layer=config.min_per_layer,
        within=within,
        **config.fields,
    )
    masks = result.masks
    if result.params is not None:
        weights.save_new(result.params, folder / weights.NEW)
        result.load_into(model)
        masks = dataclasses.replace(masks, provenance={**masks.provenance, NEW_WEIGHTS: True})
    if config.control:
        masks = masks.shuffled(torch.Generator().manual_seed(config.seed + CONTROL_SEED))
    masks.save(path)
    return masks


def _trained(
    config: TrainConfig,
    model: nn.Module,
    split: Split,
    masks: Masks | None,
    folder: Path,
    keep: Collection[int],
    on_epoch: Callable[[Epoch], None] | None,
) -> TrainResult:
    rows: list[Epoch] = []

    def report(row: Epoch) -> None:
        rows.append(row)
        store.write_rows(folder / store.METRICS, rows)
        if row["epoch"] in keep and row["epoch"] < config.epochs:
            weights.save(model, weights.path(folder, row["epoch"], config.epochs))
        if on_epoch is not None:
            on_epoch(row)

    checkpoint = folder / store.CHECKPOINT
    go_on = functools.partial(
        train, model, split, config, masks=masks, device=split.device, checkpoint=checkpoint, on_epoch=report
    )
    try:
        result = go_on()
    except DataError:
        if not checkpoint.exists():
            raise
        checkpoint.unlink()  # damaged, and nothing of it was loaded: the same training begins again
        result = go_on()
    store.write_rows(folder / store.METRICS, result.history)  # with the epochs before an interruption
    return result


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
        environment=environment(split.device),
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
