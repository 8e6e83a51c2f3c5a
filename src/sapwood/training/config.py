"""The settings of a training run, with the defaults of the NTK-SAP authors' CIFAR-10 script."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from sapwood.checks import Count, Natural, OneOf, Positive, Range, check
from sapwood.errors import ConfigError

SCHEDULES = ("step", "cosine", "one-cycle")
PRECISIONS = ("float32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained by SGD; the defaults are those of ResNet-20 on CIFAR-10 in Wang, Li, Sun (2023).

    Attributes:
        epochs: Passes over the training set.
        batch_size: Images in a batch.
        lr: Learning rate, after warm-up; the peak for `one-cycle`.
        milestones: For `step`: the epochs (counted from the start of training) at which `lr` is multiplied by `gamma`.
        gamma: For `step`: the factor at each milestone.
        schedule: `step`, `cosine` (to zero at the end, no restarts) or `one-cycle` (rises over the first 30 %).
        warmup_epochs: Epochs over which `lr` first rises linearly; not with `one-cycle`, which has its own rise.
        momentum: Of SGD.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: On all parameters, biases and normalisation included, as in the authors' code.
        share: Share of every class of the training images that is used at all, in (0, 1]; below 1, drawn by `seed`.
        validation: Share of those that is held out, in [0, 1).
        precision: `float32`, or `bf16`/`fp16` for autocast (`fp16` scales the loss).
        channels_last: Whether convolution weights are laid out channels-last, which tensor cores prefer.
        seed: Of the data order, the augmentation and dropout.
        start_epoch: Where in the schedule training begins: `epochs` - `start_epoch` epochs are trained, at the learning
            rates that the last ones of `epochs` have (rewinding). The data order begins anew.
    """

    epochs: Count = 160
    batch_size: Count = 128
    lr: Positive = 0.1
    milestones: tuple[int, ...] = (80, 120)
    gamma: Positive = 0.1
    schedule: Annotated[str, OneOf("schedule", SCHEDULES)] = "step"
    warmup_epochs: Natural = 0
    momentum: Annotated[float, Range(0), Range(high=1, open_high=True)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Range(0)] = 1e-4
    share: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    validation: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    precision: Annotated[str, OneOf("precision", PRECISIONS)] = "float32"
    channels_last: bool = False
    seed: Annotated[int, Range(0), Range(high=2**32 - 1)] = 0
    start_epoch: Natural = 0

    def __post_init__(self) -> None:
        """Refuses values that could not have been meant.

        Raises:
            ConfigError: a setting is out of range, or two settings exclude each other.
        """
        check(self)
        _require(self, "nesterov", not self.nesterov or self.momentum > 0, "False where momentum is 0")
        _require(self, "warmup_epochs", self.warmup_epochs < self.epochs, f"below epochs ({self.epochs})")
        _require(self, "start_epoch", self.start_epoch < self.epochs, f"below epochs ({self.epochs})")
        if self.schedule == "one-cycle":
            _require(self, "warmup_epochs", self.warmup_epochs == 0, "0 with schedule 'one-cycle', which has its own")
        if self.schedule == "step":
            rising = all(a < b for a, b in zip((self.warmup_epochs, *self.milestones), self.milestones, strict=False))
            _require(self, "milestones", rising, "rising epochs, all after the warm-up")


def differences(saved: dict[str, object], config: TrainConfig) -> list[str]:
    """Lists `field: saved -> now` for every setting that `saved` (from `dataclasses.asdict`) has otherwise.

    What an older file lacks had its default.
    """
    pairs = [
        (field.name, saved.get(field.name, field.default), getattr(config, field.name)) for field in fields(config)
    ]
    return [f"{name}: {old!r} -> {new!r}" for name, old, new in pairs if old != new]


def _require(config: TrainConfig, name: str, condition: bool, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {getattr(config, name)!r}.")
