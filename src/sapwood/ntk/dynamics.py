r"""Training as its tangent kernel predicts it, beside training as it happens (Jacot et al. 2018; Lee et al. 2019).

Full-batch gradient descent on L = 1/2 sum (f - y)^2 over all n * k outputs, at a constant rate. A model that is linear
in its parameters, with kernel K, has after t steps

    f_t - y = (1 - rate K)^t (f_0 - y),

so that every eigenvector of K learns at its own pace, and nothing is learned above the rate 2 / lambda_max. How far a
network departs from that is how far its kernel moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn

from sapwood.batches import Batch
from sapwood.errors import ConfigError, DataError
from sapwood.functional import Params, differentiating
from sapwood.isolation import device_of, isolated
from sapwood.masks import Masks
from sapwood.ntk.compare import alignment, distance
from sapwood.ntk.gram import gram
from sapwood.ntk.options import Keywords
from sapwood.ntk.outputs import Outputs, Parameters
from sapwood.ntk.spectra import spectrum


@dataclass(frozen=True)
class Dynamics:
    """A training, real and predicted.

    Attributes:
        loss: 1/2 sum (f - y)^2 before every step and after the last, steps + 1 values.
        predicted: The same of the linear model that has the kernel of the initial weights.
        rate: Learning rate.
        largest_stable_rate: 2 / largest eigenvalue of the initial kernel.
        kernel_steps: Steps at which the kernel was computed.
        drift: Relative Frobenius distance of these kernels from the initial one.
        kept_alignment: Their centred alignment with the initial one.
        target_alignment: Their centred alignment with the targets' outer product; 0 where the targets are constant.
    """

    loss: tuple[float, ...]
    predicted: tuple[float, ...]
    rate: float
    largest_stable_rate: float
    kernel_steps: tuple[int, ...]
    drift: tuple[float, ...]
    kept_alignment: tuple[float, ...]
    target_alignment: tuple[float, ...]


def linearised(kernel: Tensor, initial: Tensor, targets: Tensor, rate: float, steps: int) -> Tensor:
    """Outputs of the linear model over gradient descent, in closed form.

    Args:
        kernel: (N, N), N = n * k.
        initial: Outputs before training, N entries in any shape.
        targets: As many.
        rate: Learning rate.
        steps: Number of steps.

    Returns:
        (steps + 1, N), float64.

    Raises:
        DataError: the sizes do not fit.

    Example:
        >>> import torch
        >>> linearised(torch.eye(1), torch.zeros(1), torch.ones(1), rate=0.5, steps=2).flatten().tolist()
        [0.0, 0.5, 0.75]
    """
    start, goal = initial.detach().double().flatten(), targets.detach().double().flatten()
    if not len(start) == len(goal) == len(kernel):
        raise DataError(f"A kernel of {len(kernel)} outputs has {len(start)} outputs and {len(goal)} targets here.")
    values, vectors = torch.linalg.eigh(kernel.double())
    powers = torch.arange(steps + 1, dtype=torch.float64, device=kernel.device)
    remaining = (1 - rate * values).unsqueeze(0) ** powers.unsqueeze(1)
    predicted: Tensor = goal + (remaining * (vectors.T @ (start - goal))) @ vectors.T
    return predicted


def train_dynamics(  # noqa: PLR0913  # all but the first four are keywords
    model: nn.Module,
    x: Batch,
    targets: Tensor,
    masks: Masks | None = None,
    parameters: Parameters = None,
    *,
    rate: float | None = None,
    steps: int = 100,
    kernel_steps: Sequence[int] | None = None,
    on_step: Callable[[int], None] = lambda step: None,
    **options: Unpack[Keywords],
) -> Dynamics:
    """Trains a copy of the named parameters on a few inputs, and what the initial kernel says of it.

    Args:
        model: See `kernel`, as all that is not named here; it is not changed.
        x: Inputs, n samples; all of them in every step.
        targets: (n, k) values, or (n,) class numbers, which become one-hot rows.
        masks: Masks, kept throughout.
        parameters: What is trained.
        rate: Learning rate; None: a quarter of the largest stable one, 1/2 / lambda_max.
        steps: Number of steps.
        kernel_steps: Steps at which the kernel is computed again; None: five, evenly spaced. 0 is always one of them.
        on_step: Called after every step with its number, from 1.
        **options: See `Options`.

    Raises:
        ConfigError: an illegal rate or number of steps, and what `kernel` raises.
        DataError: the targets do not fit the outputs.
    """
    if steps < 1 or (rate is not None and not rate > 0):
        raise ConfigError(f"steps is {steps} and rate {rate}; both must be above 0.")
    with isolated(0, device_of(model)):
        outputs = Outputs.of(model, x, masks, parameters, **options)
        goal = _targets(targets, outputs)
        first = gram(outputs)
        stable = spectrum(first, leading=1).largest_stable_lr
        rate = stable / 4 if rate is None else rate
        wanted = _kernel_steps(kernel_steps, steps)
        predicted = linearised(first, outputs.values(), goal, rate, steps)
        losses, kernels = [], []
        for step in range(steps + 1):
            if step in wanted:
                found = gram(outputs) if step else first
                if not torch.isfinite(found).all():  # the training diverged: there is nothing left to look at
                    wanted = tuple(w for w in wanted if w < step)
                else:
                    kernels.append((distance(first, found), alignment(first, found), _to_targets(found, goal)))
            loss, outputs = _step(outputs, goal, rate)
            losses.append(loss)
            if step < steps:
                on_step(step + 1)
    drift, kept, aligned = (tuple(column) for column in zip(*kernels, strict=True))
    errors = 0.5 * (predicted - goal.double().flatten()).square().sum(1)
    return Dynamics(tuple(losses), tuple(errors.tolist()), rate, stable, wanted, drift, kept, aligned)


def _targets(targets: Tensor, outputs: Outputs) -> Tensor:
    """(n, k), one-hot for class numbers."""
    targets = targets.to(outputs.net.device)
    shape = (outputs.samples, outputs.per_sample)
    if not targets.is_floating_point():
        if targets.shape != shape[:1] or int(targets.min()) < 0 or int(targets.max()) >= shape[1]:
            raise DataError(f"Class numbers are {shape[0]} integers in 0 .. {shape[1] - 1}, one a sample.")
        targets = torch.nn.functional.one_hot(targets, shape[1])
    if targets.numel() != outputs.size:
        raise DataError(f"The outputs are {shape[0]} x {shape[1]}, but the targets {tuple(targets.shape)}.")
    return targets.reshape(shape).to(outputs.dtype)


def _to_targets(kernel: Tensor, goal: Tensor) -> float:
    flat = goal.double().flatten()
    return alignment(kernel, torch.outer(flat, flat)) if bool((flat != flat[0]).any()) else 0.0


def _kernel_steps(chosen: Sequence[int] | None, steps: int) -> tuple[int, ...]:
    found = [round(steps * i / 5) for i in range(1, 6)] if chosen is None else list(chosen)
    if any(not 0 <= step <= steps for step in found):
        raise ConfigError(f"kernel_steps are {found}; a training of {steps} steps has steps 0 to {steps}.")
    return tuple(sorted({0, *found}))


def _step(outputs: Outputs, goal: Tensor, rate: float) -> tuple[float, Outputs]:
    """The loss at the outputs' weights, and the outputs after one step; masked weights stay zero."""
    goal = goal.flatten()
    total, loss = {name: torch.zeros_like(outputs.params[name]) for name in outputs.names}, 0.0
    for piece in outputs.pieces(outputs.samples):
        leaves = outputs.leaves()
        values = outputs.forward(leaves, piece)
        part = 0.5 * (values - goal[piece.start : piece.start + len(values)]).square().sum()
        loss += float(part.detach())
        with differentiating():
            gradients = torch.autograd.grad(part, list(leaves.values()), materialize_grads=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            total[name] += gradient
    return loss, outputs.at({**outputs.params, **_moved(outputs, total, rate)})


def _moved(outputs: Outputs, gradient: Params, rate: float) -> Params:
    moved = {}
    for column in outputs.columns:
        before, change = outputs.params[column.name], rate * column.scale**2 * gradient[column.name]
        if column.kept is not None:
            kept = torch.zeros(before.numel(), dtype=before.dtype, device=before.device)
            kept[column.kept] = 1
            change = change * kept.view_as(before)
        moved[column.name] = before - change
    return moved
