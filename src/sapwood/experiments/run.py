"""One run: prune, train, write down. Its result depends on its config alone; what is done already is not done again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_model
from torch import nn

from sapwood.data import Dataset, pruning_batches
from sapwood.diagnosis import effective
from sapwood.errors import ConfigError, MaskError, SapwoodError
from sapwood.experiments import cost, store
from sapwood.experiments.config import CONTROL_SEED, DENSE, Place, RunConfig
from sapwood.experiments.environment import device_of, environment
from sapwood.experiments.fairness import order_hash, weights_hash
from sapwood.experiments.material import Split, create_model, load_data
from sapwood.experiments.search import Subject, needs_batches, search
from sapwood.experiments.store import RunResult
from sapwood.experiments.together import first, gathered
from sapwood.masks import Masks
from sapwood.methods import prunable
from sapwood.training import Epoch, TrainResult, intact, train

if TYPE_CHECKING:  # imported late, as it is slow to import
    from lightning_fabric import Fabric


def run(
    config: RunConfig,
    folder: Path,
    place: Place,
    *,
    masks: Masks | None = None,
    save_weights: bool = False,
    on_epoch: Callable[[Epoch], None] | None = None,
    wait: bool = True,
    fabric: Fabric | None = None,
) -> RunResult:
    """Runs a config to its end, from wherever an earlier call in the same folder got to.

    Args:
        config: What to do.
        folder: Where the files go; see `store`.
        place: Device and data.
        masks: Masks from a file, instead of pruning.
        save_weights: Also write the trained weights.
        on_epoch: Called after every epoch.
        wait: Whether to wait for another process that is at the same run, and take its result.
        fabric: The processes that train together, all of which call this with the same arguments, in place of
            `place.device`; the first of them writes. They prune nothing: the config is dense or comes with masks.

    Raises:
        RunBusyError: another process is at this run, and `wait` is False.
        SapwoodError: what the method, the model, the data or the folder refuses.
    """
    dataset = load_data(config.data, config.resolution, place)
    device = device_of(place.device) if fabric is None else fabric.device
    model = create_model(config.model, dataset, config.seed)
    if masks is not None:
        masks.check(dict(model.named_parameters()))
    elif fabric is not None and config.method != DENSE:
        raise ConfigError(f"{fabric.world_size} processes train under masks that are there: prune first.")
    where = environment(device, fabric)
    with ExitStack() as stack:
        done = first(fabric, lambda: _begun(stack, config, folder, where, wait))
        if done is not None:
            return done
        model.to(device)
        if masks is None and config.method != DENSE:
            masks = _pruned(config, model, dataset, folder)
        if config.control == "reinit":
            model = create_model(config.model, dataset, config.seed + CONTROL_SEED).to(device)
        initial = weights_hash(model)
        split = Split.of(dataset, config.train, device)
        cost.reset_peak(device)
        result = _trained(config, model, split, masks, folder, on_epoch, fabric)
        if fabric is not None:
            model = gathered(model, fabric, lambda: create_model(config.model, dataset, config.seed))

        def written() -> RunResult:
            if save_weights:
                _save_weights(model, folder)
            summary = dataclasses.replace(
                _summary(model, masks, result, split),
                environment=where,
                init_hash=initial,
                order_hash=order_hash(split, config.train.seed),
                settings={} if masks is None else masks.provenance.get("fields", {}),
                files=store.digests(folder),
            )
            store.write_result(folder, summary)
            (folder / store.CHECKPOINT).unlink(missing_ok=True)
            return summary

        return first(fabric, written)


def _begun(stack: ExitStack, config: RunConfig, folder: Path, where: Mapping[str, str], wait: bool) -> RunResult | None:
    """Locks the folder until the stack unwinds; returns the result if there is one."""
    stack.enter_context(store.opened(folder, config, wait=wait))
    if (done := store.finished(folder, config)) is not None:
        return done
    (folder / store.RESULT).unlink(missing_ok=True)  # damaged, or another file is
    store.write_json(folder / store.ENVIRONMENT, where)
    return None


def _pruned(config: RunConfig, model: nn.Module, dataset: Dataset, folder: Path) -> Masks:
    path = folder / store.MASKS
    if path.exists():
        try:
            masks = Masks.load(path)
            masks.check(dict(model.named_parameters()))
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
        **_fields(config),
    )
    masks = result.masks
    if config.control in ("shuffle", "shuffle-taps"):
        generator = torch.Generator().manual_seed(config.seed + CONTROL_SEED)
        masks = masks.shuffled(generator, taps=config.control == "shuffle-taps")
    masks.save(path)
    return masks


def _fields(config: RunConfig) -> dict[str, Any]:
    """The method's fields; the control turns its ranking around, one that is turned around already included."""
    if config.control != "invert":
        return dict(config.fields)
    return {**config.fields, "invert": not config.fields.get("invert", False)}


def _trained(
    config: RunConfig,
    model: nn.Module,
    split: Split,
    masks: Masks | None,
    folder: Path,
    on_epoch: Callable[[Epoch], None] | None,
    fabric: Fabric | None,
) -> TrainResult:
    rows: list[Epoch] = []

    def report(row: Epoch) -> None:
        rows.append(row)
        store.write_rows(folder / store.METRICS, rows)
        if on_epoch is not None:
            on_epoch(row)

    checkpoint = folder / store.CHECKPOINT
    device = split.device if fabric is None else fabric
    first(fabric, lambda: _drop_damaged(checkpoint))
    result = train(model, split, config.train, masks=masks, device=device, checkpoint=checkpoint, on_epoch=report)
    first(fabric, lambda: store.write_rows(folder / store.METRICS, result.history))  # with those before an interruption
    return result


def _drop_damaged(checkpoint: Path) -> None:
    """Without it the same training begins again."""
    if checkpoint.exists() and not intact(checkpoint):
        checkpoint.unlink()


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


def _save_weights(model: nn.Module, folder: Path) -> None:
    half_written = folder / f".{store.WEIGHTS}.tmp"
    save_model(model, str(half_written))
    os.replace(half_written, folder / store.WEIGHTS)
