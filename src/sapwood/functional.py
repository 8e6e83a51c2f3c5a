"""A model as a function of its weights: the only place that runs the user's module while scoring.

`FunctionalModel.of(model, ...)` copies the module's structure without its tensors and references the tensors
themselves. Effective weights, perturbed copies, fresh draws and absolute values are then just other dictionaries;
nothing is ever written into the user's module.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from sapwood.batches import (
    Batch,
    Counts,
    Measured,
    argument,
    call,
    cast,
    counted,
    counts,
    described,
    inputs_of,
    label_of,
    measured,
    output_tensor,
    own_loss,
    size_or_one,
    target_of,
)
from sapwood.errors import DataError, ForwardError, SapwoodError, SapwoodWarning, ScoreError, UnsupportedModelError
from sapwood.isolation import RandomState, skeleton
from sapwood.masks import Masks
from sapwood.names import Names, unwrapped
from sapwood.prunable import Layout, Pattern, Weight, all_weights, select
from sapwood.statistics import BatchStatistics

Params = dict[str, Tensor]
Forward = Callable[[nn.Module, Batch], Any]
Loss = Callable[[Any, Any], Tensor]
BatchNorm = nn.modules.batchnorm._BatchNorm
NOT_A_SCALE = ("bias", "beta", "token", "embed", "pos")


class Noise(Enum):
    """Whether a second pass over the same inputs gives the same outputs."""

    NONE = "none"
    SEEDED = "the same from the same state of the global random generators"
    FREE = "another, whatever that state"


@dataclass
class Derivatives:
    """What is known of a model's derivatives; filled while it is scored.

    Attributes:
        asked: Names of the parameters that something was differentiated in.
        found: Names of those that any of it depended on. A derivative that is zero still depends.
        second: Whether second derivatives were seen to be right.
    """

    asked: set[str] = field(default_factory=set)
    found: set[str] = field(default_factory=set)
    second: bool = False


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

    module: _Runner
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
        _refuse_unreadable(model)
        weights = all_weights(model)
        prunable = tuple(weight.name for weight in select(model, include, exclude))
        model = unwrapped(model)
        params = {weight.name: _readable(weight) for weight in weights}
        if zero_init == "ones":
            params |= _opened(params)
        copy = skeleton(model).eval()
        norms = tuple(m for m in copy.modules() if isinstance(m, BatchNorm))
        for norm in norms:
            norm.momentum = 1.0  # one train-mode pass makes the running statistics those of its batch
        return cls(
            module=_Runner(copy, forward),
            params=params,
            buffers={name: _widened(buffer.detach().clone()) for name, buffer in Names.of(model).buffers.items()},
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
                f"The model failed on an input of {described(inputs_of(batch))}: {error}. ({_hint(error)})"
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
            self.module.counts = batches, self._counts(batches)
        found = self.module.counts[1]
        if not any(found):
            raise DataError("No target counts: all of them are -100, which cross-entropy leaves out.")
        return ((batch, count) for batch, count in zip(batches, found, strict=True) if count)

    def _counts(self, batches: tuple[Batch, ...]) -> list[float]:
        if self.loss_fn is None and not any(self.module.takes_targets(batch) for batch in batches):
            return [counted(target_of(batch)) for batch in batches]
        if len(batches) == 1 and self.group is None:
            return [size_or_one(batches[0]) if counted(target_of(batches[0])) else 0]

        @torch.no_grad()
        def look(params: Params, batch: Batch) -> Measured:
            return self.measured(params, batch, train=False)

        # At its own weights, a model whose last layer begins at zero has the same loss for all samples.
        looks = [partial(look, params) for params in (self.weights, self.drawn())]
        return counts(batches, looks, self._everywhere)

    def drawn(self) -> Params:
        """One fixed draw of all layer weights, N(0, 2 / fan-in), at which to look at what a model does."""
        generator, drawn = torch.Generator(self.device).manual_seed(0), {}
        for name, fan_in in self.fan_in.items():
            like = self.params[name]
            drawn[name] = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
            drawn[name] *= math.sqrt(2 / fan_in)
        return drawn

    def _everywhere(self, found: Counts) -> list[Counts]:
        if self.group is None:
            return [found]
        every: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(every, found, group=self.group)
        return every

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
        """Gradients of a scalar by name; zero where it does not depend on a leaf, which is noted in `derivatives`.

        Raises:
            UnsupportedModelError: it depends on none of them, or cannot be differentiated.
        """
        _refuse_constant(value)
        with differentiating():
            gradients = torch.autograd.grad(value, list(leaves.values()), create_graph=create_graph, allow_unused=True)
        return self._noted(leaves, gradients)

    def differentiate_again(self, value: Tensor, leaves: Params) -> Params:
        """The same for a value that is itself made of derivatives; zero where they are constants.

        By `backward()`, which runs everything that the value was made of. `autograd.grad` runs what lies between the
        value and the leaves, and so never meets torch's own error for a function that cannot be differentiated twice.

        Raises:
            UnsupportedModelError: it cannot be differentiated.
        """
        if not value.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.grad = None
        with differentiating():
            value.backward(retain_graph=True)
        gradients = [leaf.grad for leaf in leaves.values()]
        for leaf in leaves.values():
            leaf.grad = None
        return self._noted(leaves, gradients)

    def _noted(self, leaves: Params, gradients: Iterable[Tensor | None]) -> Params:
        found = dict(zip(leaves, gradients, strict=True))
        self.derivatives.asked.update(leaves)
        self.derivatives.found.update(name for name, gradient in found.items() if gradient is not None)
        zeros = {name: torch.zeros_like(leaves[name]) for name, gradient in found.items() if gradient is None}
        return {name: zeros[name] if gradient is None else gradient for name, gradient in found.items()}

    def unreached(self) -> tuple[str, ...]:
        """Prunable weights that nothing depended on, of those that something was differentiated in."""
        missing = self.derivatives.asked - self.derivatives.found
        return tuple(name for name in self.prunable if name in missing)

    def leaves(self, masks: Masks) -> Params:
        """Effective weights w*m as leaves of a new graph."""
        return {name: weight.requires_grad_() for name, weight in masks.apply(self.weights).items()}


def precisions(tensors: Params) -> list[torch.dtype]:
    """Those of floating-point tensors, each once, in order."""
    return list(dict.fromkeys(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()))


def _refuse_constant(value: Tensor) -> None:
    if not value.requires_grad:
        raise UnsupportedModelError(
            "The model's output does not depend on any prunable weight through autograd (a detach, no_grad or integer "
            "cast in its forward?)."
        )


@contextmanager
def differentiating() -> Iterator[None]:
    """Says what autograd's error means for whoever prunes.

    Raises:
        UnsupportedModelError: autograd failed inside.
    """
    try:
        yield
    except (SapwoodError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"The model cannot be differentiated as this method needs it: {error}. Where its forward is run again in "
            "the backward pass (activation checkpointing), turn that off for scoring: "
            "model.set_grad_checkpointing(False), model.gradient_checkpointing_disable() or your own switch. A "
            "custom function without a (second) derivative needs one, or a method that takes none ('snip', 'ntk-sap')."
        ) from error


class _Runner(nn.Module):
    """Lets the user's `forward(model, inputs)` call any method of the model under replaced weights."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.model = model
        self.names = Names.of(model)
        self.run = forward or call
        self.arguments = {} if forward else dict(inspect.signature(model.forward).parameters)
        self.counts: tuple[tuple[Batch, ...], list[float]] | None = None
        self.rows: bool | None = None

    def takes_targets(self, batch: Batch) -> bool:
        """Whether the model has an argument for a mapping's targets, or takes any."""
        label = label_of(batch)
        any_name = any(a.kind is inspect.Parameter.VAR_KEYWORD for a in self.arguments.values())
        return label is not None and (label in self.arguments or any_name)

    def needs_targets(self, batch: Batch) -> bool:
        """Whether the model cannot be called without a mapping's targets."""
        label = self.arguments.get(label_of(batch))
        return label is not None and label.default is inspect.Parameter.empty

    def forward(self, batch: Batch) -> Any:
        return self.run(self.model, argument(batch))

    def raw(self, state: Params) -> Params:
        """The same tensors under the names that they have in this module."""
        return {f"model.{self.names.raw[name]}": tensor for name, tensor in state.items()}


def _readable(weight: Weight) -> Tensor:
    tensor = weight.tensor.detach().clone()
    if tensor.is_floating_point() and tensor.itemsize > 1 and not torch.isfinite(tensor).all():
        raise ScoreError(f"The parameter {weight.name!r} holds NaN or infinite values; nothing can be scored with it.")
    return _widened(tensor)


def _widened(tensor: Tensor) -> Tensor:
    """In no less than float32; a BatchNorm's statistics must not stay behind its weights."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _refuse_unreadable(model: nn.Module) -> None:
    for name, parameter in Names.of(model).parameters.items():
        if isinstance(parameter, nn.UninitializedParameter):
            raise UnsupportedModelError(f"{name!r} has no shape yet: run one forward pass first (lazy module).")
        if hasattr(parameter, "device_mesh"):  # a DTensor, whose class takes a second to import
            raise UnsupportedModelError(
                f"{name!r} is sharded: prune the model first, then fully_shard it, then attach the masks."
            )
        if parameter.is_meta:
            raise UnsupportedModelError(f"{name!r} is on the meta device: give it values first.")
        if parameter.is_complex():
            raise UnsupportedModelError(f"{name!r} is complex; only real weights can be scored.")


def _opened(params: Params) -> Params:
    """Scale vectors that close a branch at initialisation (all one small constant), set to one."""
    closed = [name for name, p in params.items() if _is_scale(name, p) and _is_small_constant(p)]
    if closed:
        warnings.warn(
            f"{len(closed)} scales are initialised to zero or nearly so ({closed[0]!r}, ...): scored as ones, so that "
            "their branches are not pruned by an accident of initialisation; zero_init='keep' scores them as they are.",
            SapwoodWarning,
            stacklevel=4,
        )
    return {name: torch.ones_like(params[name]) for name in closed}


def _is_scale(name: str, parameter: Tensor) -> bool:
    """A scalar, or one number per channel: (C,), (C, 1, 1); not (1, 1, C), which is a token or a position."""
    per_channel = parameter.dim() == 0 or parameter.numel() == parameter.shape[0]
    return per_channel and not any(word in name.rpartition(".")[2] for word in NOT_A_SCALE)


def _is_small_constant(parameter: Tensor) -> bool:
    first = parameter.flatten()[0]
    return bool(first.abs() <= 0.1) and bool((parameter == first).all())


def _hint(error: Exception) -> str:
    if "more than 1 value per channel" in str(error):
        return (
            "A norm that takes its statistics from the batch has none of a single sample, which is what this method "
            "runs: give the norm running statistics, use larger batches, or take another method, such as 'snip'."
        )
    return (
        "input_shape is one sample's shape without the batch, of numbers; batches are (input, target) or a mapping of "
        "keyword arguments. Token ids come in batches; a model that takes something else needs forward=lambda model, "
        "inputs: ..."
    )
