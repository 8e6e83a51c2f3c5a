"""The training loop: SGD on cross-entropy, masks kept, every epoch measured, the last one reported."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapwood.attach import attach
from sapwood.errors import ConfigError, DataError
from sapwood.masks import Masks
from sapwood.training import checkpoint as checkpoints
from sapwood.training.checkpoint import Epoch, State
from sapwood.training.config import TrainConfig
from sapwood.training.devices import Device, as_fabric, is_sharded, own_part, reshard, share_buffers, total
from sapwood.training.evaluate import evaluate
from sapwood.training.optim import build_optimizer, build_schedule

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Batches(Protocol):
    """One epoch of pairs (input, int64 class index), and how many pairs there are; a list of them will do."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches."""

    def __len__(self) -> int:
        """Counts them."""


class TrainingData(Protocol):
    """What `train` asks of its data; batch size, augmentation and the validation split are the data's business."""

    def train_batches(self, generator: torch.Generator) -> Batches:
        """One epoch; order and augmentation draw from `generator` alone, and only while iterated over."""

    def validation_batches(self) -> Iterable[tuple[Tensor, Tensor]] | None:
        """The held-out part of the training set, or None."""

    def test_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The test set."""


@dataclass(frozen=True)
class TrainResult:
    """What a run gave: accuracies in percent after its LAST epoch, never the best one.

    Attributes:
        test_accuracy: On the test set.
        validation_accuracy: On the held-out part of the training set; None without one.
        history: One row per epoch, in order.
        seconds: Sum over the epochs, those before an interruption included.
        diverged: The weights became NaN or infinite: training stopped after that epoch, the accuracies are its own.
    """

    test_accuracy: float
    validation_accuracy: float | None
    history: tuple[Epoch, ...]
    seconds: float
    diverged: bool


def train(
    model: nn.Module,
    data: TrainingData,
    config: TrainConfig,
    *,
    masks: Masks | None = None,
    device: Device = "cpu",
    checkpoint: Path | None = None,
    checkpoint_every: int = 1,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> TrainResult:
    """Trains `model` in place, on `device`, and leaves the caller's random state as it was.

    On a CPU two runs are equal to the last bit, also where one was interrupted and resumed. Several processes (a
    `fabric_for` as `device`) each compute a slice of the same batches and equal one process up to rounding; but
    dropout draws differently in each, and BatchNorm normalises with the statistics of each process's slice, unless the
    model went through `torch.nn.SyncBatchNorm.convert_sync_batchnorm` (GPUs only). With FSDP the weights stay sharded.

    Args:
        model: Returns logits (batch x classes).
        data: Where batches come from; in every process the same.
        config: The settings.
        masks: Pruned weights are zero from the start to the end; None trains the dense model.
        device: Where to train: one device, or a launched Fabric.
        checkpoint: A file to write the run's state to, and to resume from if it exists, with any number of processes
            (which must all see the file). None: no checkpoints. It is compared with the settings, the masks and the
            model's shapes; that the data are the same is up to the caller.
        checkpoint_every: Epochs between checkpoints; the last epoch is always saved.
        on_epoch: Called with every finished epoch's row, after its checkpoint is on disk, in the first process only.

    Returns:
        The accuracies after the last epoch, and the history. A run whose weights become NaN or infinite ends early.

    Raises:
        ConfigError: settings that the device or the data cannot serve, or a checkpoint of another run.
        DataError: a damaged checkpoint, or an empty split.
        MaskError: the masks do not fit the model.
    """
    if checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every must be at least 1 (epoch), got {checkpoint_every}.")
    fabric = as_fabric(device, config.precision)
    gpus = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), warnings.catch_warnings():
        # fp16 skips steps until its loss scale fits; torch mistakes a skipped first one for a wrong call order.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        state = _begin(model, data, config, fabric)
        if checkpoint is not None:  # not at every save: a folder that is removed meanwhile stays removed
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None and checkpoint.exists():
            checkpoints.restore(checkpoint, state, config, masks)
        with nullcontext() if masks is None else attach(masks, model, state.optimizer) as attachment:
            while _last_epoch(state, config) < config.epochs and not (state.history and _diverged(state)):
                row = _epoch(state, data, config)
                state.history.append(row)
                if checkpoint is not None and (row["epoch"] % checkpoint_every == 0 or row["epoch"] == config.epochs):
                    checkpoints.save(checkpoint, state, config, masks)
                if on_epoch is not None and fabric.is_global_zero:
                    on_epoch(row)
            if attachment is not None:
                attachment.apply()
        return _result(state)


def _begin(model: nn.Module, data: TrainingData, config: TrainConfig, fabric: Fabric) -> State:
    if config.validation > 0 and data.validation_batches() is None:
        raise ConfigError(f"validation is {config.validation}, but the data holds no validation split; set it to 0.")
    generator = torch.Generator().manual_seed(config.seed)
    steps = len(data.train_batches(generator))
    if steps == 0:
        raise DataError("The training split has no batches; check the batch size against the number of examples.")
    if config.channels_last:
        if is_sharded(fabric):
            raise ConfigError("channels_last must be False with FSDP, which shards contiguous weights only; got True.")
        lay_out: Any = model.to  # of which some releases of torch know no overload with a memory format alone
        lay_out(memory_format=torch.channels_last)
    forward = fabric.setup_module(model)
    # After the set-up: FSDP replaces the parameters.
    optimizer = build_optimizer(model, config)
    wrapped = fabric.setup_optimizers(optimizer)
    assert not isinstance(wrapped, tuple)  # which it is for several optimizers
    schedule = build_schedule(optimizer, config, steps)
    for _ in range(config.start_epoch * steps):
        schedule.step()
    # A Fabric that served another run comes with the loss scale of that run.
    fresh = torch.amp.GradScaler(fabric.device.type, enabled=config.precision == "fp16")
    fabric.strategy.precision.load_state_dict(fresh.state_dict())
    return State(fabric, model, forward, optimizer, wrapped.step, schedule, generator)


def _last_epoch(state: State, config: TrainConfig) -> int:
    return config.start_epoch + len(state.history)


def _epoch(state: State, data: TrainingData, config: TrainConfig) -> Epoch:
    start = time.perf_counter()
    lr = state.schedule.get_last_lr()[0]
    epoch = _last_epoch(state, config) + 1
    _seed_dropout(config.seed, epoch, state.fabric.global_rank)
    loss, accuracy, images = _train_epoch(state, data.train_batches(state.generator))
    share_buffers(state.model, state.fabric)
    training_seconds = time.perf_counter() - start
    validation = data.validation_batches()
    validation_accuracy = None if validation is None else evaluate(state.forward, validation, state.fabric)[1]
    test_accuracy = evaluate(state.forward, data.test_batches(), state.fabric)[1]
    reshard(state.model, state.fabric)
    return {
        "epoch": epoch,
        "lr": float(lr),
        "train_loss": loss,
        "train_accuracy": accuracy,
        "validation_accuracy": validation_accuracy,
        "test_accuracy": test_accuracy,
        "images_per_second": images / training_seconds,
        "seconds": time.perf_counter() - start,
    }


def _seed_dropout(seed: int, epoch: int, rank: int) -> None:
    """Makes the global random state a function of these three: nothing of it needs saving, and processes differ."""
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1, np.uint64)[0]))


def _train_epoch(state: State, batches: Batches) -> tuple[float, float, int]:
    """One pass over the batches; returns the mean loss, the accuracy in percent and the number of examples."""
    fabric = state.fabric
    state.forward.train()
    # Sums stay on the device: reading them every step would make a GPU wait.
    loss_sum = correct = torch.zeros((), device=fabric.device)
    count = 0
    for batch in batches:
        inputs, labels = own_part(batch, fabric)
        state.optimizer.zero_grad()
        logits = state.forward(inputs)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        # Processes average their gradients, so that this becomes the mean over the batch, however it was shared.
        fabric.backward(loss * (fabric.world_size / len(batch[1])))
        state.step()
        state.schedule.step()
        loss_sum = loss_sum + loss.detach()
        correct = correct + (logits.argmax(1) == labels).sum()
        count += len(batch[1])
    return total(loss_sum, fabric).item() / count, 100 * total(correct, fabric).item() / count, count


def _diverged(state: State) -> bool:
    """Whether a weight is NaN or infinite, be it in the shard of another process."""
    weights = (weight.to_local() if hasattr(weight, "to_local") else weight for weight in state.model.parameters())
    bad = not all(bool(weight.isfinite().all()) for weight in weights)
    return total(torch.tensor(float(bad), device=state.fabric.device), state.fabric).item() > 0


def _result(state: State) -> TrainResult:
    last = state.history[-1]
    return TrainResult(
        test_accuracy=last["test_accuracy"],
        validation_accuracy=last["validation_accuracy"],
        history=tuple(state.history),
        seconds=sum(row["seconds"] for row in state.history),
        diverged=_diverged(state),
    )
