r"""NTT, Neural Tangent Transfer: train a sparse network's initial weights until it learns as the dense one would.

Objective (Liu & Zenke, ICML 2020): the student f(x; w*m) is fitted to the teacher f(x; w_0), the dense network at its
initial weights, on inputs without labels, so that outputs and neural tangent kernels agree:

    || f_s - f_t ||^2 / || f_t ||^2  +  gamma^2 || K_s - K_t ||_F^2 / || K_t ||_F^2,     K = J J',

J the Jacobian of all outputs on a mini-batch with respect to all parameters (the student's: those kept). Masks are the
largest weights, recomputed every `interval` steps. In between, pruned weights stay where they are but for Adam's
moments, and may return as others shrink. What is trained is the starting point: `params` are to be trained from, under
the masks.

No kernel is formed. For probes v, u of random signs, one backward pass gives J'v, and v'Ku = (J'v).(J'u); over
independent v and u the mean of (v'(K_s - K_t)u)^2 is the squared Frobenius norm. `probes` vectors make
probes (probes - 1) / 2 pairs, whose mean is unbiased; memory is 2 x probes floats a parameter, besides the graph of
that many backward passes.

Defaults: Adam, masks every 100 steps and the same density in every layer, as in the authors' code; the number of steps
is ours (theirs: 20 epochs of MNIST in batches of 64, about 18,700).

Departures from the authors' code (its loss and gradients were run beside ours; the paper's text was not to be had):

* Kernel. Theirs is K(x1, x2) between the two halves of a mini-batch, and the student's is over all weights at w*m, the
  pruned ones included; here K(x, x) of the whole mini-batch, over the kept ones.
* Weights of the terms. Theirs is 1e-3 mean (K_s - K_t)^2 + mean (f_s - f_t)^2 + l2 / density times the sum of (w*m)^2
  over the prunable weights, with l2 1e-4 (fully connected) or 1e-5 (convolutional). Here both terms are divided by the
  teacher's (measured once, on the first mini-batch), so that gamma = 1 weighs them equally on any network, and l2 is 0.
  Their balance is gamma^2 = 1e-3 [mean K_t^2] / [mean f_t^2], means over entries, K_t between the halves.
* `as_released=True` takes their kernel, and the terms absolute: with gamma = 0.0316 and their l2 it is their objective.
* Random probes estimate the kernel term, which theirs computes.
* BatchNorm, which their networks lack, uses batch statistics. Their teacher is drawn by Glorot's rule with biases of
  standard deviation 0.01, which is the caller's business.

`straight_through=True` is Sapwood's own variant: pruned weights move by the gradient with respect to w*m.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.allocation import Allocation, allocation, budget
from sapwood.batches import Batch, Data, filled, resized, size, size_or_one, taken
from sapwood.criteria.derivatives import twice_differentiable
from sapwood.errors import ConfigError, DataError, ScoreError
from sapwood.fresh import normal
from sapwood.functional import FunctionalModel, Params, differentiating
from sapwood.masks import Masks
from sapwood.pruning import Found, OnRound, Round, starting_masks, warn_of_collapse
from sapwood.witness.rows import shortened, takes_rows

SCALE_PROBES = 16  # for the teacher's norm, which is measured once


@dataclass(frozen=True)
class Ntt:
    """Neural Tangent Transfer; returns new weights, biases and scales.

    Attributes:
        rounds: Times that the masks are computed.
        interval: Steps of Adam after each.
        lr: Of Adam.
        gamma: Weight of the kernels against the outputs, squared in the objective.
        l2: Weight of the sum of squared kept weights over the density; the other terms are relative, and l2 is not.
        as_released: The objective of the authors' code: absolute terms, the kernel between halves of a mini-batch, over
            all weights.
        probes: Random vectors a step, 2 or more.
        batch_size: Inputs a step, at most (a batch given may have fewer; one that cannot be cut into samples is taken
            whole).
        random_inputs: Gaussian inputs; False takes the inputs of `batches`.
        batch_statistics: BatchNorm normalises with each mini-batch's statistics (else with the running ones).
        straight_through: Pruned weights move by the gradient with respect to w*m; False: they have no gradient.
        allocation: Which weights a budget keeps, as in `Method`.
    """

    rounds: int = 20
    interval: int = 100
    lr: float = 5e-4
    gamma: float = 1.0
    l2: float = 0.0
    as_released: bool = False
    probes: int = 4
    batch_size: int = 64
    random_inputs: bool = False
    batch_statistics: bool = True
    straight_through: bool = False
    allocation: str | Masks | Mapping[str, float] | Allocation = "uniform"

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("interval", 1), ("probes", 2), ("batch_size", 1), ("gamma", 0), ("l2", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}; it must be above 0.")

    @property
    def needs_data(self) -> bool:
        """Gaussian inputs need their shape only."""
        return not self.random_inputs

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
        student = Student(self, net.held(), data, density, generator)
        with twice_differentiable(net, student.next_batch()):
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


class Student:
    """The weights that are trained, with their optimizer, teacher and inputs."""

    def __init__(self, ntt: Ntt, net: FunctionalModel, data: Data, density: float, generator: torch.Generator) -> None:
        self.ntt, self.net, self.density, self.generator = ntt, net, density, generator
        self.params = {name: p.clone() for name, p in net.params.items() if p.is_floating_point()}
        self.inputs, self.data = data.templates() if ntt.random_inputs else data.inputs(), data
        if ntt.as_released:
            self._refuse_without_halves()
        self.teacher = {name: net.params[name] for name in self.params}
        self.optimizer = torch.optim.Adam(list(self.params.values()), lr=ntt.lr)
        self.scales = self._scales()

    @property
    def finite(self) -> bool:
        """Whether the training has not diverged."""
        return all(bool(weight.isfinite().all()) for weight in self.params.values())

    def draw(self) -> Batch:
        """A mini-batch of inputs."""
        count, device = self.ntt.batch_size, self.generator.device
        if self.ntt.random_inputs:
            known = self.data.input_shape is not None
            template = resized(self.inputs[0], count) if known else shortened(self.net, self.inputs[0], count)
            return filled(
                template, lambda t: normal(t.to(self.net.device, self.net.dtype), self.generator), self.data.draw
            )
        which = int(torch.randint(len(self.inputs), (1,), generator=self.generator, device=device))
        if not takes_rows(self.net, self.inputs[which]):
            return self.inputs[which]
        order = torch.randperm(size(self.inputs[which]), generator=self.generator, device=device)
        return taken(self.inputs[which], order[:count])

    def next_batch(self) -> Batch:
        """The mini-batch that `draw` gives next."""
        state = self.generator.get_state()
        batch = self.draw()
        self.generator.set_state(state)
        return batch

    def signs(self, batch: Batch, count: int) -> Tensor:
        """Probe vectors of the outputs' shape, each entry 1 or -1."""
        with torch.no_grad():
            like = self.net.outputs(self.teacher, batch, train=self.ntt.batch_statistics)
        ones = torch.randint(2, (count, *like.shape), generator=self.generator, device=like.device)
        signs = ones.to(like.dtype) * 2 - 1
        if self.ntt.as_released:
            signs[: count // 2, len(like) // 2 :] = 0
            signs[count // 2 :, : len(like) // 2] = 0
        return signs

    def look(
        self, params: Params, masks: Masks | None, batch: Batch, probes: Tensor, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Outputs and `sketch` of one of the two networks."""
        statistics, over = self.ntt.batch_statistics, None if self.ntt.as_released else masks
        return sketch(self.net, params, over, batch, probes, train=statistics, create_graph=create_graph)

    def loss(self, leaves: Params, masks: Masks, batch: Batch, probes: Tensor) -> Tensor:
        """The objective, its kernel term estimated.

        Args:
            leaves: The student's effective weights and other parameters.
            masks: Its masks.
            batch: Unlabelled inputs.
            probes: As `signs` draws them.
        """
        target, target_kernel = self.look(self.teacher, None, batch, probes)
        outputs, kernel = self.look(leaves, masks, batch, probes, create_graph=True)
        distance, difference = (outputs - target).square(), kernel - target_kernel
        if self.ntt.as_released:
            half, each = len(outputs) // 2, outputs[0].numel()
            entries = half * (len(outputs) - half) * each**2
            squares = difference[: len(probes) // 2, len(probes) // 2 :].square()
            terms = distance.mean() + self.ntt.gamma**2 * squares.mean() / entries
        else:
            mismatch = mean_square_between(difference) / self.scales[1]
            terms = distance.sum() / size_or_one(batch) / self.scales[0] + self.ntt.gamma**2 * mismatch
        penalty = torch.stack([leaves[name].square().sum() for name in masks]).sum()
        return terms + self.ntt.l2 / self.density * penalty

    def step(self, masks: Masks) -> None:
        """One step of Adam."""
        batch = self.draw()
        probes = self.signs(batch, self.ntt.probes)
        leaves = {name: weight.requires_grad_() for name, weight in _detached(masks.apply(self.params)).items()}
        named = self.net.differentiate_again(self.loss(leaves, masks, batch, probes), leaves)
        for name, gradient in named.items() if self.ntt.straight_through else masks.apply(named).items():
            self.params[name].grad = gradient
        self.optimizer.step()

    def _refuse_without_halves(self) -> None:
        smallest = self.ntt.batch_size
        if not self.ntt.random_inputs:
            smallest = min(smallest, *map(size_or_one, self.inputs))
        if smallest < 2 or not all(takes_rows(self.net, batch) for batch in self.inputs):
            raise DataError(
                "A mini-batch of one input has no two halves, whose kernel as_released=True takes: give batches of two "
                "or more samples, and a batch_size to match."
            )

    def _scales(self) -> tuple[float, float]:
        """The teacher's terms on a first mini-batch, by which the student's are divided."""
        if self.ntt.as_released:
            return 1.0, 1.0
        batch = self.draw()
        outputs, kernel = self.look(self.teacher, None, batch, self.signs(batch, SCALE_PROBES))
        return _or_one(outputs.square().sum() / size_or_one(batch)), _or_one(mean_square_between(kernel))


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
