r"""NTT, Neural Tangent Transfer: train a sparse network's initial weights until it learns as the dense one would.

Objective (Liu & Zenke, ICML 2020): the student f(x; w*m) is fitted to the teacher f(x; w_0), the dense network at its
initial weights, on inputs without labels, so that outputs and neural tangent kernels agree:

    || f_s - f_t ||^2 / || f_t ||^2  +  gamma^2 || K_s - K_t ||_F^2 / || K_t ||_F^2,     K = J J',

J the Jacobian of all outputs on a mini-batch with respect to all parameters (the student's: those kept). Masks are the
largest weights, recomputed every `interval` steps; in between, gradients pass straight through them to the pruned
weights, which may so return. What is trained is the starting point: `params` are to be trained from, under the masks.

No kernel is formed. For probes v, u of random signs, one backward pass gives J'v, and v'Ku = (J'v).(J'u); over
independent v and u the mean of (v'(K_s - K_t)u)^2 is the squared Frobenius norm. `probes` vectors make
probes (probes - 1) / 2 pairs, whose mean is unbiased; memory is 2 x probes floats a parameter, besides the graph of
that many backward passes.

Defaults: Adam, masks every 100 steps and the same density in every layer, after the paper; the number of steps is ours.

Departures: random probes instead of kernels of small batches; both terms are divided by the teacher's (measured once,
on the first mini-batch), so that gamma = 1 weighs them equally on any network, whereas the paper's gamma is absolute;
BatchNorm, which the paper's networks lack, uses batch statistics.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.allocation import Allocation, allocation, budget
from sapwood.batches import Batch, Data, filled, resized, size, taken
from sapwood.criteria.derivatives import twice_differentiable
from sapwood.errors import ConfigError, ScoreError
from sapwood.fresh import normal
from sapwood.functional import FunctionalModel, Params, differentiating
from sapwood.masks import Masks
from sapwood.pruning import Found, OnRound, Round, starting_masks, warn_of_collapse

SCALE_PROBES = 16  # for the teacher's norm, which is measured once


@dataclass(frozen=True)
class Ntt:
    """Neural Tangent Transfer; returns new weights, biases and scales.

    Attributes:
        rounds: Times that the masks are computed.
        interval: Steps of Adam after each.
        lr: Of Adam.
        gamma: Weight of the kernels against the outputs, squared in the objective.
        probes: Random vectors a step, 2 or more.
        batch_size: Inputs a step, at most (a batch given may have fewer).
        random_inputs: Gaussian inputs; False takes the inputs of `batches`.
        batch_statistics: BatchNorm normalises with each mini-batch's statistics (else with the running ones).
        straight_through: Pruned weights move by the gradient with respect to w*m; False: they wait where they are.
        allocation: Which weights a budget keeps, as in `Method`.
    """

    rounds: int = 20
    interval: int = 100
    lr: float = 5e-4
    gamma: float = 1.0
    probes: int = 4
    batch_size: int = 64
    random_inputs: bool = False
    batch_statistics: bool = True
    straight_through: bool = True
    allocation: str | Masks | Mapping[str, float] | Allocation = "uniform"

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("interval", 1), ("probes", 2), ("batch_size", 1), ("gamma", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}; it must be above 0.")

    def run(
        self,
        net: FunctionalModel,
        data: Data,
        density: float,
        generator: torch.Generator,
        *,
        min_per_layer: int = 0,
        on_round: OnRound | None = None,
        within: Masks | None = None,
    ) -> Found:
        """Trains the student.

        Raises:
            ConfigError: several processes are to score together.
            DataError: there are no inputs, or for random ones no shape.
            ScoreError: the training diverged.
        """
        if net.group is not None:
            raise ConfigError("Neural Tangent Transfer trains in one process: leave group out.")
        first, allocate = starting_masks(net, within), allocation(self.allocation, min_per_layer)
        keep = budget(density, first.total)
        if keep == first.kept:
            return Found(first, ())
        masks, history = first, list[Round]()
        student = _Student(self, net.held(), data, generator)
        with twice_differentiable(net, student.draw()):
            for index in range(1, self.rounds + 1):
                begin = time.perf_counter()
                masks = allocate({name: student.params[name].abs() for name in net.prunable}, first, keep)
                for _ in range(self.interval):
                    student.step(masks)
                if not student.finite:
                    raise ScoreError(f"Neural Tangent Transfer diverged in round {index}: lower lr ({self.lr:g}).")
                history.append(Round(index, density, keep, time.perf_counter() - begin, masks.collapsed))
                if on_round:
                    on_round(history[-1], masks)
        warn_of_collapse(masks)
        return Found(masks, tuple(history), masks.apply(student.params))


class _Student:
    """The weights that are trained, with their optimizer, teacher and inputs."""

    def __init__(self, ntt: Ntt, net: FunctionalModel, data: Data, generator: torch.Generator) -> None:
        self.ntt, self.net, self.generator = ntt, net, generator
        self.params = {name: p.clone() for name, p in net.params.items() if p.is_floating_point()}
        self.inputs = data.templates() if ntt.random_inputs else data.inputs()
        self.teacher = {name: net.params[name] for name in self.params}
        self.optimizer = torch.optim.Adam(list(self.params.values()), lr=ntt.lr)
        batch = self.draw()
        outputs, kernel = self.look(self.teacher, None, batch, self.signs(batch, SCALE_PROBES))
        self.scales = _or_one(outputs.square().sum() / size(batch)), _or_one(mean_square_between(kernel))

    @property
    def finite(self) -> bool:
        """Whether the training has not diverged."""
        return all(bool(weight.isfinite().all()) for weight in self.params.values())

    def draw(self) -> Batch:
        """A mini-batch of inputs."""
        count, device = self.ntt.batch_size, self.generator.device
        if self.ntt.random_inputs:
            template = resized(self.inputs[0], count)
            return filled(template, lambda t: normal(t.to(self.net.device, self.net.dtype), self.generator))
        which = int(torch.randint(len(self.inputs), (1,), generator=self.generator, device=device))
        order = torch.randperm(size(self.inputs[which]), generator=self.generator, device=device)
        return taken(self.inputs[which], order[:count])

    def signs(self, batch: Batch, count: int) -> Tensor:
        """Probe vectors of the outputs' shape, each entry 1 or -1."""
        with torch.no_grad():
            like = self.net.outputs(self.teacher, batch, train=self.ntt.batch_statistics)
        ones = torch.randint(2, (count, *like.shape), generator=self.generator, device=like.device)
        return ones.to(like.dtype) * 2 - 1

    def look(
        self, params: Params, masks: Masks | None, batch: Batch, probes: Tensor, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Outputs and `sketch` of one of the two networks."""
        statistics = self.ntt.batch_statistics
        return sketch(self.net, params, masks, batch, probes, train=statistics, create_graph=create_graph)

    def step(self, masks: Masks) -> None:
        """One step of Adam."""
        batch = self.draw()
        probes = self.signs(batch, self.ntt.probes)
        target, target_kernel = self.look(self.teacher, None, batch, probes)
        leaves = {name: weight.requires_grad_() for name, weight in _detached(masks.apply(self.params)).items()}
        outputs, kernel = self.look(leaves, masks, batch, probes, create_graph=True)
        distance = (outputs - target).square().sum() / size(batch) / self.scales[0]
        mismatch = mean_square_between(kernel - target_kernel) / self.scales[1]
        loss = distance + self.ntt.gamma**2 * mismatch
        named = self.net.differentiate_again(loss, leaves)
        for name, gradient in named.items() if self.ntt.straight_through else masks.apply(named).items():
            self.params[name].grad = gradient
        self.optimizer.step()


def sketch(
    net: FunctionalModel,
    params: Params,
    masks: Masks | None,
    batch: Batch,
    probes: Tensor,
    *,
    train: bool,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """A network's outputs, and its tangent kernel between probe vectors: (p, p) with entries v_i' K v_j.

    Args:
        net: The network.
        params: Effective weights w*m, and all other parameters that K is over; with `create_graph`, leaves.
        masks: The kernel is over kept weights only; None: over all.
        batch: Unlabelled inputs.
        probes: (p, *shape of the outputs).
        train: BatchNorm normalises with the batch's statistics.
        create_graph: Both results can be differentiated with respect to `params`.
    """
    leaves = params if create_graph else {name: p.requires_grad_() for name, p in _detached(params).items()}
    outputs = net.outputs(leaves, batch, train=train)
    kept = {name: mask.to(outputs.dtype) for name, mask in (masks or {}).items()}
    rows = []
    for probe in probes:
        with differentiating():
            gradients = torch.autograd.grad(
                outputs, list(leaves.values()), probe, retain_graph=True, create_graph=create_graph,
                materialize_grads=True,
            )  # fmt: skip
        named = zip(leaves, gradients, strict=True)
        rows.append(torch.cat([(g * kept[n] if n in kept else g).flatten() for n, g in named]))
    tangents = torch.stack(rows)
    return outputs if create_graph else outputs.detach(), tangents @ tangents.mT


def mean_square_between(kernel: Tensor) -> Tensor:
    """Mean square of the entries off the diagonal: over random signs, the squared Frobenius norm of the full kernel."""
    count = len(kernel)
    return (kernel.square().sum() - kernel.diagonal().square().sum()) / (count * (count - 1))


def _detached(params: Params) -> Params:
    return {name: p.detach().clone() for name, p in params.items()}


def _or_one(scale: Tensor) -> float:
    """A network whose last layer begins at zero gives nothing to divide by."""
    return float(scale) or 1.0
