"""The two stages of a run, pruning and training: each takes from the run's folder what it has done already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sapwood import files
from sapwood.data import Dataset, pruning_batches
from sapwood.errors import DataError, MaskError
from sapwood.experiments import store, weights
from sapwood.experiments.config import CONTROL_SEED, RunConfig
from sapwood.experiments.material import Split
from sapwood.experiments.search import Subject, needs_batches, search
from sapwood.experiments.store import RunFolder
from sapwood.experiments.together import first
from sapwood.masks import Masks
from sapwood.names import Names
from sapwood.pruning import Result
from sapwood.training import Epoch, TrainConfig, TrainResult, history_in, train

if TYPE_CHECKING:  # imported late, as it is slow to import
    from lightning_fabric import Fabric

NEW_WEIGHTS = "new_weights"  # in the masks' provenance: there is a file of weights with them


def pruned(config: RunConfig, model: nn.Module, dataset: Dataset, folder: Path, within: Masks | None) -> Masks:
    """The masks of a run, and in the model the weights that came with them."""
    if (found := _masks_in(folder, config, model)) is not None:
        return found
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
        **_fields(config),
    )
    masks = result.masks
    if result.params is not None:
        weights.save_new(result.params, folder / store.NEW_WEIGHTS)
        result.load_into(model)
        masks = dataclasses.replace(masks, provenance={**masks.provenance, NEW_WEIGHTS: True})
    if config.control in ("shuffle", "shuffle-taps"):
        generator = torch.Generator().manual_seed(config.seed + CONTROL_SEED)
        masks = masks.shuffled(generator, taps=config.control == "shuffle-taps")
    masks.save(folder / store.MASKS)
    return masks


def trained(
    config: TrainConfig,
    model: nn.Module,
    split: Split,
    masks: Masks | None,
    here: RunFolder,
    *,
    keep: Collection[int],
    on_epoch: Callable[[Epoch], None] | None,
    fabric: Fabric | None,
) -> TrainResult:
    """Trains to the end; the weights after the epochs `keep`, the last one apart, are written on the way."""
    folder = here.path
    rows = first(fabric, lambda: _epochs_behind(folder, keep, config.epochs))

    def report(row: Epoch) -> None:
        here.check()
        rows.append(row)
        files.write_rows(folder / store.METRICS, rows)
        if row["epoch"] in keep and row["epoch"] < config.epochs:
            weights.save(model, weights.path(folder, row["epoch"], config.epochs))
        if on_epoch is not None:
            on_epoch(row)

    checkpoint = folder / store.CHECKPOINT
    device = split.device if fabric is None else fabric
    return train(model, split, config, masks=masks, device=device, checkpoint=checkpoint, on_epoch=report)


def _masks_in(folder: Path, config: RunConfig, model: nn.Module) -> Masks | None:
    """What an earlier call found; None where a file is missing or damaged, so that the same masks are found again."""
    path = folder / store.MASKS
    if not path.exists():
        return None
    try:
        masks = Names.of(model).fit(Masks.load(path))
        if masks.provenance.get(NEW_WEIGHTS):
            params = weights.load_new(folder / store.NEW_WEIGHTS, next(model.parameters()).device)
            Result(masks, (), 0.0, config.seed, params=params).load_into(model)
        return masks
    except (MaskError, ValueError):
        path.unlink()
        return None


def _fields(config: RunConfig) -> dict[str, Any]:
    """The method's fields; the control turns its ranking around, one that is turned around already included."""
    if config.control != "invert":
        return dict(config.fields)
    return {**config.fields, "invert": not config.fields.get("invert", False)}


def _epochs_behind(folder: Path, keep: Collection[int], last: int) -> list[Epoch]:
    """The epochs that the checkpoint has, which become the metrics of the run so far.

    A checkpoint is deleted, and the training begins again, if it is damaged or beyond an epoch whose weights are
    wanted.
    """
    checkpoint = folder / store.CHECKPOINT
    rows: list[Epoch] = []
    if checkpoint.exists():
        with suppress(DataError):
            rows = history_in(checkpoint)
        if not rows or weights.missing_before(folder, rows[-1]["epoch"], keep, last):
            rows = []
            checkpoint.unlink()
    files.write_rows(folder / store.METRICS, rows)
    return rows
