"""The optimizer and its learning-rate schedule, both from torch."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR

from sapwood.training.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> SGD:
    """SGD over all parameters that require grad, with the momentum and decay of `config`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def build_schedule(optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int) -> LRScheduler:
    """The learning rate as a function of the step: call `.step()` after every batch, not after every epoch."""
    total, warmup = config.epochs * steps_per_epoch, config.warmup_epochs * steps_per_epoch
    main: LRScheduler
    if config.schedule == "one-cycle":
        # Momentum stays at config.momentum: a setting that the schedule overrides would be a trap.
        return OneCycleLR(optimizer, max_lr=config.lr, total_steps=total, cycle_momentum=False)
    if config.schedule == "cosine":
        main = CosineAnnealingLR(optimizer, T_max=total - warmup)
    else:
        milestones = [epoch * steps_per_epoch - warmup for epoch in config.milestones]
        main = MultiStepLR(optimizer, milestones, gamma=config.gamma)
    if warmup == 0:
        return main
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
    return SequentialLR(optimizer, [rise, main], milestones=[warmup])
