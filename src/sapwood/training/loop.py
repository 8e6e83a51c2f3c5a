"""The training loop: SGD on cross-entropy, masks kept, every epoch measured, the last one reported."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapwood.attach import attach
from sapwood.errors import ConfigError, DataError
from sapwood.masks import Masks
from sapwood.training import checkpoint as checkpoints
from sapwood.training.checkpoint import Epoch, State
from sapwood.training.config import TrainConfig
from sapwood.training.evaluate import evaluate
from sapwood.training.optim import autocast, build_optimizer, build_schedule


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
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    checkpoint_every: int = 1,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> TrainResult:
    """Trains `model` in place, on `device`, and leaves the caller's random state as it was.

    On a CPU two runs are equal to the last bit, also where one was interrupted and resumed.

    Args:
        model: Returns logits (batch x classes).
        data: Where batches come from.
        config: The settings.
        masks: Pruned weights are zero from the start to the end; None trains the dense model.
        device: Where to train.
        checkpoint: A file to write the run's state to, and to resume from if it exists. None: no checkpoints.
        checkpoint_every: Epochs between checkpoints; the last epoch is always saved.
        on_epoch: Called with every finished epoch's row, after its checkpoint is on disk.

    Returns:
        The accuracies after the last epoch, and the history. A run whose weights become NaN or infinite ends early.

    Raises:
        ConfigError: settings that the device or the data cannot serve, or a checkpoint of another run.
        DataError: a damaged checkpoint, or an empty split.
        MaskError: the masks do not fit the model.
    """
    if checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every must be at least 1 (epoch), got {checkpoint_every}.")
    device = torch.device(device)
    context = autocast(config, device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        # fp16 skips steps until its loss scale fits; torch mistakes a skipped first one for a wrong call order.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        torch.manual_seed(config.seed)
        state = _begin(model, data, config, device)
        if checkpoint is not None and checkpoint.exists():
            checkpoints.restore(checkpoint, state, config, masks)
        attachment = None if masks is None else attach(masks, model, state.optimizer)
        while len(state.history) < config.epochs and not (state.history and _diverged(model)):
            row = _epoch(state, data, context)
            state.history.append(row)
            if checkpoint is not None and (row["epoch"] % checkpoint_every == 0 or row["epoch"] == config.epochs):
                checkpoints.save(checkpoint, state, config, masks)
            if on_epoch is not None:
                on_epoch(row)
        if attachment is not None:
            attachment.finalize()
    return _result(state)


def _begin(model: nn.Module, data: TrainingData, config: TrainConfig, device: torch.device) -> State:
    if config.validation > 0 and data.validation_batches() is None:
        raise ConfigError(f"validation is {config.validation}, but the data holds no validation split; set it to 0.")
    generator = torch.Generator().manual_seed(config.seed)
    steps = len(data.train_batches(generator))
    if steps == 0:
        raise DataError("The training split has no batches; check the batch size against the number of examples.")
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    return State(model, optimizer, schedule, scaler, generator, device)


def _epoch(state: State, data: TrainingData, context: torch.autocast) -> Epoch:
    start = time.perf_counter()
    lr = state.schedule.get_last_lr()[0]
    loss, accuracy, images = _train_epoch(state, data.train_batches(state.generator), context)
    training_seconds = time.perf_counter() - start
    validation = data.validation_batches()
    with context:
        validation_accuracy = None if validation is None else evaluate(state.model, validation, state.device)[1]
        test_accuracy = evaluate(state.model, data.test_batches(), state.device)[1]
    return {
        "epoch": len(state.history) + 1,
        "lr": float(lr),
        "train_loss": loss,
        "train_accuracy": accuracy,
        "validation_accuracy": validation_accuracy,
        "test_accuracy": test_accuracy,
        "images_per_second": images / training_seconds,
        "seconds": time.perf_counter() - start,
    }


def _train_epoch(state: State, batches: Batches, context: torch.autocast) -> tuple[float, float, int]:
    """One pass over the batches; returns the mean loss, the accuracy in percent and the number of examples."""
    state.model.train()
    # Sums stay on the device: reading them every step would make a GPU wait.
    loss_sum = correct = torch.zeros((), device=state.device)
    count = 0
    for inputs, labels in batches:
        inputs, labels = inputs.to(state.device, non_blocking=True), labels.to(state.device, non_blocking=True)
        state.optimizer.zero_grad()
        with context:
            logits = state.model(inputs)
            loss = F.cross_entropy(logits, labels)
        state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.schedule.step()
        loss_sum = loss_sum + loss.detach() * len(labels)
        correct = correct + (logits.argmax(1) == labels).sum()
        count += len(labels)
    return loss_sum.item() / count, 100 * correct.item() / count, count


def _diverged(model: nn.Module) -> bool:
    return not all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def _result(state: State) -> TrainResult:
    last = state.history[-1]
    return TrainResult(
        test_accuracy=last["test_accuracy"],
        validation_accuracy=last["validation_accuracy"],
        history=tuple(state.history),
        seconds=sum(row["seconds"] for row in state.history),
        diverged=_diverged(state.model),
    )
