"""The two stages of a run, pruning and training: each takes from the run's folder what it has done already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sapwood.data import Dataset, pruning_batches
from sapwood.errors import MaskError
from sapwood.experiments import store, weights
from sapwood.experiments.config import CONTROL_SEED, RunConfig
from sapwood.experiments.material import Split
from sapwood.experiments.search import Subject, needs_batches, search
from sapwood.experiments.together import first
from sapwood.masks import Masks
from sapwood.names import Names
from sapwood.pruning import Result
from sapwood.training import Epoch, TrainConfig, TrainResult, intact, train

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
        weights.save_new(result.params, folder / weights.NEW)
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
    folder: Path,
    *,
    keep: Collection[int],
    on_epoch: Callable[[Epoch], None] | None,
    fabric: Fabric | None,
) -> TrainResult:
    """Trains to the end; the weights after the epochs `keep`, the last one apart, are written on the way."""
    rows: list[Epoch] = []

    def report(row: Epoch) -> None:
        rows.append(row)
        store.write_rows(folder / store.METRICS, rows)
        if row["epoch"] in keep and row["epoch"] < config.epochs:
            weights.save(model, weights.path(folder, row["epoch"], config.epochs))
        if on_epoch is not None:
            on_epoch(row)

    checkpoint = folder / store.CHECKPOINT
    device = split.device if fabric is None else fabric
    first(fabric, lambda: _drop_useless(checkpoint, keep, config.epochs))
    result = train(model, split, config, masks=masks, device=device, checkpoint=checkpoint, on_epoch=report)
    first(fabric, lambda: store.write_rows(folder / store.METRICS, result.history))  # with those before an interruption
    return result


def _masks_in(folder: Path, config: RunConfig, model: nn.Module) -> Masks | None:
    """What an earlier call found; None where a file is missing or damaged, so that the same masks are found again."""
    path = folder / store.MASKS
    if not path.exists():
        return None
    try:
        masks = Names.of(model).fit(Masks.load(path))
        if masks.provenance.get(NEW_WEIGHTS):
            params = weights.load_new(folder / weights.NEW, next(model.parameters()).device)
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


def _drop_useless(checkpoint: Path, keep: Collection[int], last: int) -> None:
    """Deletes a checkpoint that is damaged or beyond an epoch whose weights are wanted: the training begins again."""
    if checkpoint.exists() and not intact(checkpoint):
        checkpoint.unlink()
    weights.drop_checkpoint_beyond(checkpoint.parent, keep, last)
