"""A model as a function of its weights: the only place that runs the user's module while scoring.

`FunctionalModel.of(model, ...)` copies the module's structure without its tensors and references the tensors
themselves. Effective weights, perturbed copies, fresh draws and absolute values are then just other dictionaries;
nothing is ever written into the user's module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from sapwood.batches import (
    Batch,
    Measured,
    cast,
    described,
    inputs_of,
    measured,
    output_tensor,
    own_loss,
    target_of,
)
from sapwood.errors import DataError, ForwardError, SapwoodError, UnsupportedModelError
from sapwood.functional.derivatives import Derivatives
from sapwood.functional.kinds import BatchNorm, Forward, Loss, Noise, Params, precisions
from sapwood.functional.reading import opened_branches, readable, refuse_unreadable, widened
from sapwood.functional.runner import Runner, way_out
from sapwood.functional.units import units
from sapwood.isolation import RandomState, skeleton
from sapwood.masks import Masks
from sapwood.names import Names, unwrapped
from sapwood.prunable import Layout, Pattern, all_weights, select
from sapwood.statistics import BatchStatistics


@dataclass(frozen=True)
class FunctionalModel:
    """A module's structure, its tensors, and how to run it and measure its loss.

    Attributes:
        module: The tensor-free copy that is run.
        params: Copies of all parameters by clean name (`sapwood.names`), float32 or float64, so that no forward can
            reach the user's own.
        buffers: Copies of all buffers by name, in no less than float32 either. Never written to.
        prunable: Names of the weights under pruning, in order.
        fan_in: Fan-in of every layer weight, prunable or excluded (what a fresh initialisation draws).
        layout: Dimensions of the channels of every prunable weight of which they are known.
        loss_fn: The user's `loss(output, target)`, or None.
        group: Processes that score together, each on its share of the data; None scores alone.
        written: Names of the parameters that the forward writes into (an embedding with max_norm).
        unseen: Names of the prunable weights that no operation of the forward takes, as far as was seen.
        noise: Whether the forward is random in eval mode.
        derivatives: What is known of its derivatives.
        state: The random state in which every pass begins; None: passes follow each other.
        input_dtype: Precision of the inputs where that of the parameters differs; None: the first prunable one's.
    """

    module: Runner
    params: Params
    buffers: Params
    prunable: tuple[str, ...]
    fan_in: dict[str, int]
    layout: dict[str, Layout]
    loss_fn: Loss | None = None
    group: dist.ProcessGroup | None = None
    norms: tuple[BatchNorm, ...] = field(default=(), repr=False)
    written: frozenset[str] = frozenset()
    unseen: tuple[str, ...] = ()
    noise: Noise = Noise.NONE
    derivatives: Derivatives = field(default_factory=Derivatives, repr=False)
    state: RandomState | None = field(default=None, repr=False)
    input_dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        include: Iterable[Pattern] | Pattern = (),
        exclude: Iterable[Pattern] | Pattern = (),
        loss: Loss | None = None,
        forward: Forward | None = None,
        zero_init: str = "ones",
        group: dist.ProcessGroup | None = None,
    ) -> FunctionalModel:
        """Reads a module.

        Args:
            model: Any `nn.Module`; DDP and `torch.compile` wrappers are looked through.
            include: Further parameters to prune (see `sapwood.prunable.select`).
            exclude: Parameters not to prune.
            loss: `loss(output, target)`, a mean or sum over the batch, or a pair (mean, number of units that it is
                over); for mapping batches `loss(output, batch)`. Default: the model's own loss for mapping batches,
                else cross-entropy.
            forward: `forward(model, inputs)` for models that are not simply called; `inputs` is the first of a pair, or
                a mapping without its targets.
            zero_init: `"ones"` scores a model whose residual branches begin closed (zero-gamma BatchNorm, LayerScale)
                as if they were open; `"keep"` scores it as it is.
            group: Processes that score together.

        Raises:
            UnsupportedModelError: the model cannot be read, or has nothing to prune.
            ScoreError: a parameter holds NaN or infinite values.
        """
        refuse_unreadable(model)
        weights = all_weights(model)
        prunable = tuple(weight.name for weight in select(model, include, exclude))
        model = unwrapped(model)
        params = {weight.name: readable(weight) for weight in weights}
        if zero_init == "ones":
            params |= opened_branches(params)
        copy = skeleton(model).eval()
        norms = tuple(m for m in copy.modules() if isinstance(m, BatchNorm))
        for norm in norms:
            norm.momentum = 1.0  # one train-mode pass makes the running statistics those of its batch
        return cls(
            module=Runner(copy, forward),
            params=params,
            buffers={name: widened(buffer.detach().clone()) for name, buffer in Names.of(model).buffers.items()},
            prunable=prunable,
            fan_in={w.name: w.fan_in for w in weights if w.is_layer_weight and w.tensor.is_floating_point()},
            layout={w.name: w.layout for w in weights if w.name in prunable and w.layout},
            loss_fn=loss,
            group=group,
            norms=norms,
        )

    @property
    def weights(self) -> Params:
        """The prunable weights."""
        return {name: self.params[name] for name in self.prunable}

    @property
    def device(self) -> torch.device:
        """Where the first prunable weight is, and so where generators and inputs must be."""
        return self.params[self.prunable[0]].device

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the weights are scored, and that of inputs."""
        return self.input_dtype or self.params[self.prunable[0]].dtype

    def run(
        self, params: Mapping[str, Tensor], batch: Batch, *, buffers: Params | None = None, train: bool = False
    ) -> Any:
        """The model's raw output with `params` in place of its own.

        Args:
            params: Parameters to replace; the others are the model's own.
            batch: Any batch; floating-point inputs are cast to the parameters' dtype, or to `dtype` where they differ.
            buffers: Buffers to use (a train-mode pass updates these in place); default: clones of the model's own.
            train: BatchNorm normalises with the batch's statistics. Everything else stays in eval mode (no dropout).

        Raises:
            UnsupportedModelError: the model failed on this input.
        """
        for norm in self.norms:
            norm.training = train
        state = {**self.params, **params}
        kinds = precisions(state)
        state |= {name: state[name].clone() for name in self.written if name not in params}
        state |= self.own_buffers() if buffers is None else buffers
        if self.state is not None:
            self.state.restore()
        dtype = kinds[0] if len(kinds) == 1 else self.dtype
        try:
            return functional_call(self.module, self.module.raw(state), (cast(batch, dtype),))
        except (SapwoodError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ForwardError(
                f"The model failed on an input of {described(inputs_of(batch))}: {error}. ({way_out(error)})"
            ) from error

    def outputs(self, params: Mapping[str, Tensor], batch: Batch, **options: Any) -> Tensor:
        """The model's logits: see `run`."""
        return output_tensor(self.run(params, inputs_of(batch), **options))

    def loss(
        self,
        params: Mapping[str, Tensor],
        batch: Batch,
        *,
        temperature: float = 1.0,
        train: bool = True,
        buffers: Params | None = None,
    ) -> Tensor:
        """Mean loss over a labelled batch, its logits divided by `temperature`; `train` and `buffers` as in `run`."""
        return self.measured(params, batch, temperature=temperature, train=train, buffers=buffers).loss

    def measured(
        self,
        params: Mapping[str, Tensor],
        batch: Batch,
        *,
        temperature: float = 1.0,
        train: bool = True,
        buffers: Params | None = None,
    ) -> Measured:
        """The same, with the number of units that the loss is the mean over, where it says so.

        Raises:
            DataError: the loss failed on outputs and targets.
            UnsupportedModelError: the model failed, or its own loss should have another temperature.
        """
        own = self.loss_fn is None and self.module.takes_targets(batch)
        given = batch if own or self.module.needs_targets(batch) else inputs_of(batch)
        output = self.run(params, given, train=train, buffers=buffers)
        if own and (found := own_loss(output)) is not None:
            if temperature != 1:
                raise UnsupportedModelError(
                    f"The loss comes from the model itself, so its logits cannot be divided by {temperature:g}; "
                    "set temperature=1 or pass loss=."
                )
            return Measured(found, None)
        if temperature != 1:
            output = output_tensor(output) / temperature
        whole = isinstance(batch, Mapping) and self.loss_fn is not None
        return measured(self.loss_fn, output, batch if whole else target_of(batch))

    def counted(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
        """Each labelled batch with the number of units that its loss is the mean over; those of none are left out.

        Loss times number, summed over batches, is the same however the data are cut into batches. The numbers are found
        once for a tuple of batches (see `sapwood.batches.units`).

        Raises:
            DataError: they cannot be known, or all are zero.
        """
        batches = tuple(batches)
        if self.module.counts is None or self.module.counts[0] is not batches:
            self.module.counts = batches, units(self, batches)
        found = self.module.counts[1]
        if not any(found):
            raise DataError("No target counts: all of them are -100, which cross-entropy leaves out.")
        return ((batch, count) for batch, count in zip(batches, found, strict=True) if count)

    def drawn(self) -> Params:
        """One fixed draw of all layer weights, N(0, 2 / fan-in), at which to look at what a model does."""
        generator, drawn = torch.Generator(self.device).manual_seed(0), {}
        for name, fan_in in self.fan_in.items():
            like = self.params[name]
            drawn[name] = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
            drawn[name] *= math.sqrt(2 / fan_in)
        return drawn

    def own_buffers(self) -> Params:
        """Clones of the model's buffers, which a pass may update."""
        return {name: buffer.clone() for name, buffer in self.buffers.items()}

    def calibrated(self, params: Mapping[str, Tensor], batch: Batch) -> Params:
        """Buffers in which every BatchNorm has this batch's statistics (mean, unbiased variance) under `params`."""
        buffers = self.own_buffers()
        if self.norms:
            with torch.no_grad():
                self.run(params, batch, buffers=buffers, train=True)
        return buffers

    def calibrating(self, params: Mapping[str, Tensor], batch: Batch, *, record: Params | None = None) -> Tensor:
        """Logits, every BatchNorm normalising with its own input's statistics (see `BatchStatistics`), in one pass.

        Args:
            params: Parameters to replace.
            batch: Any batch.
            record: Buffers that take the statistics, for passes in eval mode afterwards; None keeps them nowhere.
        """
        with BatchStatistics(record=record is not None):
            return self.outputs(params, batch, buffers=record, train=True)

    def gradient(
        self, masks: Masks, batches: Iterable[Batch], *, temperature: float = 1.0, train: bool = True
    ) -> Params:
        """Gradient of the loss, summed over what it is a mean over (samples), in the effective weights w*m."""
        total = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for batch, count in self.counted(batches):
            leaves = self.leaves(masks)
            loss = self.loss(leaves, batch, temperature=temperature, train=train) * count
            for name, gradient in self.differentiate(loss, leaves).items():
                total[name] += gradient
        return self.summed(total)

    def summed(self, total: Params) -> Params:
        """Signed sums over the data of every process; absolute values and squares come after this, never before."""
        if self.group is not None:
            for tensor in total.values():
                dist.all_reduce(tensor, group=self.group)
        return total

    def mine(self, index: int) -> bool:
        """Whether piece `index` of a computation that all processes know falls to this one."""
        return self.group is None or index % dist.get_world_size(self.group) == dist.get_rank(self.group)

    def held(self) -> FunctionalModel:
        """The same model, all of whose passes draw the same noise: for whatever compares two of them.

        Raises:
            UnsupportedModelError: its noise does not come from the global random generators.
        """
        if self.noise is Noise.FREE:
            raise UnsupportedModelError(
                "The model gives other outputs in a second pass over the same inputs, and not by torch's, numpy's or "
                "Python's global random generators, so that passes cannot be compared: turn its random parts off "
                "(dropout as a function takes training=self.training), or let it draw from the global generators."
            )
        if self.noise is Noise.NONE or self.state is not None:
            return self
        return replace(self, state=RandomState.now(self.device))

    def differentiate(self, value: Tensor, leaves: Params, *, create_graph: bool = False) -> Params:
        """Gradients of a scalar by name: see `Derivatives.first`."""
        return self.derivatives.first(value, leaves, create_graph=create_graph)

    def differentiate_again(self, value: Tensor, leaves: Params) -> Params:
        """Gradients of what is made of gradients: see `Derivatives.again`."""
        return self.derivatives.again(value, leaves)

    def leaves(self, masks: Masks) -> Params:
        """Effective weights w*m as leaves of a new graph."""
        return {name: weight.requires_grad_() for name, weight in masks.apply(self.weights).items()}
