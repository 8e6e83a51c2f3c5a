"""The outputs on given inputs as a function of named parameters: what a tangent kernel is the kernel of.

`Outputs.of` reads model, inputs, masks and parameters once, refuses what has no kernel (random or half-said models),
and finds out whether the outputs of one sample depend on the other samples. Everything else in this room asks it for
values, for rows of the Jacobian, or for products with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sapwood.batches import Batch, Data, as_batch, inputs_of, moved, size, sliced, tensors
from sapwood.errors import ConfigError, DataError, UnsupportedModelError
from sapwood.functional import FunctionalModel, Params
from sapwood.isolation import device_of
from sapwood.masks import Masks
from sapwood.names import Names, unwrapped
from sapwood.ntk.options import Keywords, Options
from sapwood.prunable import Pattern, all_weights
from sapwood.witness import opened

Parameters = Iterable[Pattern] | Pattern | None


@dataclass(frozen=True)
class Column:
    """The columns of the Jacobian that belong to one parameter.

    Attributes:
        name: The parameter.
        kept: Positions of its unmasked entries, flattened; None: all.
        width: Number of columns.
        scale: What the derivatives are multiplied by.
    """

    name: str
    kept: Tensor | None
    width: int
    scale: float


@dataclass(frozen=True)
class Piece:
    """Inputs that go through the network together.

    Attributes:
        batch: The inputs.
        start: Number of their first output among all outputs.
        buffers: Buffers to run with; None: the model's own.
    """

    batch: Batch
    start: int
    buffers: Params | None


@dataclass(frozen=True)
class Outputs:
    """f(X; w * m), flattened: sample i's output c is entry i * k + c (samples vary slowest, outputs fastest).

    Attributes:
        net: The model.
        params: All its parameters, masked.
        columns: The parameters that the Jacobian is with respect to.
        groups: The inputs by what is normalised together.
        samples: Number of samples n.
        per_sample: Outputs of one sample k.
        independent: Whether a sample's outputs depend on that sample alone, given the buffers.
        options: How they are computed.
    """

    net: FunctionalModel
    params: Params
    columns: tuple[Column, ...]
    groups: tuple[Piece, ...]
    samples: int
    per_sample: int
    independent: bool
    options: Options

    @classmethod
    def of(
        cls,
        model: nn.Module,
        x: Batch,
        masks: Masks | None = None,
        parameters: Parameters = None,
        **options: Unpack[Keywords],
    ) -> Outputs:
        """Reads everything; call it, and all that uses it, under `isolated`.

        Args:
            model: Any `nn.Module`; it is not changed.
            x: Inputs: a tensor, a mapping of keyword arguments, or a pair whose first is taken.
            masks: Masks of some or all weights; masked entries are zero and have no derivatives.
            parameters: Names, globs, module types or modules; "*" takes all; None takes the prunable weights.
            **options: See `Options`.

        Raises:
            ConfigError: an unknown parameter or option, or BatchNorm without `batchnorm`.
            DataError: the inputs are complex, or there are none.
            MaskError: the masks are another model's.
            UnsupportedModelError: the model is random, or has not one row of outputs a sample.
        """
        chosen, core = Options(**options), unwrapped(model)
        _refuse_random_layers(core, chosen)
        masks = None if masks is None else Names.of(model).fit(masks, strict=False)
        batch = _checked(inputs_of(as_batch(x)), device_of(core))
        whole = [weight.name for weight in all_weights(model) if not weight.tensor.is_floating_point()]
        named = {"include": parameters or (), "exclude": whole}
        net = opened(model, Data((batch,)), masked=masks or (), forward=chosen.forward, zero_init="keep", **named)
        if parameters is not None:
            net = replace(net, prunable=_named(model, net, parameters))
        if net.norms and chosen.batchnorm is None:
            raise ConfigError(
                f"{type(core).__name__} has {len(net.norms)} BatchNorm layers: say batchnorm='train' (statistics of "
                "the batch, with their gradient), 'calibrated' (those statistics as constants) or 'eval' (running "
                "statistics). The kernel depends on it."
            )
        if chosen.dtype is not None:
            net = replace(net, params=_in(net.params, chosen.dtype), buffers=_in(net.buffers, chosen.dtype))
        params = net.params if masks is None else _masked(net.params, masks)
        groups = tuple(Piece(part, start, None) for start, part in _parts(batch, chosen, net))
        draft = cls(net, params, _columns(net, masks, chosen), groups, size(batch), 0, False, chosen)
        return draft._measured()

    @property
    def size(self) -> int:
        """Number of outputs N = n * k."""
        return self.samples * self.per_sample

    @property
    def width(self) -> int:
        """Number of columns of the Jacobian: unmasked entries of the named parameters."""
        return sum(column.width for column in self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """The named parameters."""
        return tuple(column.name for column in self.columns)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the derivatives."""
        return self.net.dtype

    @property
    def train(self) -> bool:
        """Whether BatchNorm takes the statistics of its batch."""
        return self.options.batchnorm == "train"

    def at(self, params: Params, masks: Masks | None = None) -> Outputs:
        """The same outputs at other values of the parameters, masked if masks are given; calibrated anew."""
        masked = params if masks is None else _masked(params, masks)
        return replace(self, params=masked)._calibrated()

    def leaves(self) -> Params:
        """The named parameters as leaves of a new graph."""
        return {name: self.params[name].detach().clone().requires_grad_() for name in self.names}

    def forward(self, leaves: Params, piece: Piece) -> Tensor:
        """Outputs of a piece, flattened, at these values of the named parameters."""
        return self._run({**self.params, **leaves}, piece.batch, piece.buffers).flatten()

    def values(self) -> Tensor:
        """All outputs, n x k."""
        with torch.no_grad():
            parts = [self.forward({}, piece) for piece in self.pieces(self.samples)]
        return torch.cat(parts).view(self.samples, self.per_sample)

    def pieces(self, samples: int) -> Iterator[Piece]:
        """The inputs in pieces of at most so many samples; of a whole group each where samples are not independent."""
        for group in self.groups:
            count = size(group.batch)
            step = samples if self.independent else count
            for first in range(0, count, step):
                yield Piece(
                    sliced(group.batch, first, first + step), group.start + first * self.per_sample, group.buffers
                )

    def _measured(self) -> Outputs:
        """Outputs of a sample, and whether samples are independent, from what the model does."""
        found = self._calibrated()
        first = found.groups[0]
        torch.manual_seed(0)
        output = found._raw(first.batch, first.buffers)
        torch.manual_seed(1)
        again = found._raw(first.batch, first.buffers)
        if not torch.allclose(output, again, rtol=1e-5, atol=1e-6 * float(output.abs().max())):
            raise UnsupportedModelError(
                "The model gives other outputs in a second pass over the same inputs, so it has no kernel: turn its "
                "random parts off (dropout as a function takes training=self.training), or average over draws."
            )
        count = size(first.batch)
        if output.dim() == 0 or output.shape[0] != count:
            raise UnsupportedModelError(
                f"The model's output has shape {tuple(output.shape)} for {count} samples; samples come first, one row "
                "each. Pass forward=lambda model, inputs: ... that returns such a tensor."
            )
        independent = not self.train and count > 1 and found._alone(first, output)
        return replace(found, per_sample=output[0].numel(), independent=independent or count == 1)._numbered()

    def _raw(self, batch: Batch, buffers: Params | None) -> Tensor:
        with torch.no_grad():
            return self._run(self.params, batch, buffers)

    def _run(self, params: Params, batch: Batch, buffers: Params | None) -> Tensor:
        # The fused attention kernels have neither forward-mode nor second derivatives.
        with sdpa_kernel(SDPBackend.MATH):
            return self.net.outputs(params, batch, buffers=_copied(buffers), train=self.train)

    def _alone(self, group: Piece, together: Tensor) -> bool:
        """Whether the last sample gives the same outputs without the others."""
        count = size(group.batch)
        try:
            alone = self._raw(sliced(group.batch, count - 1, count), group.buffers)
        except UnsupportedModelError:  # a model that wants its batch whole
            return False
        tolerance = 1e-4 if self.dtype == torch.float32 else 1e-9
        return bool((alone[0] - together[-1]).abs().max() <= tolerance * together.abs().max().clamp_min(1e-30))

    def _calibrated(self) -> Outputs:
        if self.options.batchnorm != "calibrated":
            return self
        groups = tuple(replace(group, buffers=self.net.calibrated(self.params, group.batch)) for group in self.groups)
        return replace(self, groups=groups)

    def _numbered(self) -> Outputs:
        """Groups began with the number of their first sample; from here on it is that of their first output."""
        return replace(self, groups=tuple(replace(g, start=g.start * self.per_sample) for g in self.groups))


def _refuse_random_layers(model: nn.Module, options: Options) -> None:
    if options.dropout == "off":
        return
    for name, module in Names.of(model).modules.items():
        rates = [getattr(module, word, 0) for word in ("p", "dropout", "drop_prob")]
        if module.training and any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise UnsupportedModelError(
                f"{name!r} ({type(module).__name__}) drops units at random, so the model has no kernel of its own: "
                "call model.eval(), or pass dropout='off'."
            )


def _named(model: nn.Module, net: FunctionalModel, parameters: Iterable[Pattern] | Pattern) -> tuple[str, ...]:
    """Those of the parameters that the patterns name, and not the prunable ones besides."""
    patterns = (parameters,) if isinstance(parameters, str | type | nn.Module) else tuple(parameters)
    chosen = [w.name for w in all_weights(model) if any(w.matches(p) for p in patterns) and w.name in net.prunable]
    return tuple(name for name in chosen if net.params[name].is_floating_point())


def _in(tensors: Params, dtype: torch.dtype) -> Params:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def _masked(params: Params, masks: Masks) -> Params:
    return {name: p * masks[name].to(p) if name in masks else p for name, p in params.items()}


def _columns(net: FunctionalModel, masks: Masks | None, options: Options) -> tuple[Column, ...]:
    columns = []
    for name in net.prunable:
        mask = None if masks is None else masks.get(name)
        kept = None if mask is None else mask.flatten().nonzero()[:, 0].to(net.device)
        width = net.params[name].numel() if kept is None else len(kept)
        by_ntk = options.parametrization == "ntk" and name in net.fan_in
        columns.append(Column(name, kept, width, math.sqrt(2 / net.fan_in[name]) if by_ntk else 1.0))
    return tuple(columns)


def _checked(batch: Batch, device: torch.device) -> Batch:
    if any(tensor.is_complex() for tensor in tensors(batch)):
        raise DataError("The inputs are complex; only real inputs have a kernel here: pass real and imaginary parts.")
    if not size(batch):
        raise DataError("There are no inputs: a kernel needs at least one sample.")
    return moved(batch, device)


def _parts(batch: Batch, options: Options, net: FunctionalModel) -> Iterator[tuple[int, Batch]]:
    count = size(batch)
    together = count if options.batch_size is None or options.batchnorm not in ("train", "calibrated") else 0
    step = together or options.batch_size or count
    if not net.norms:
        step = count
    if count % step == 1 and step > 1 and options.batchnorm == "train":
        raise ConfigError(
            f"{count} samples in batches of {step} leave a last batch of one, whose statistics say nothing: choose "
            "another batch_size."
        )
    for start in range(0, count, step):
        yield start, sliced(batch, start, start + step)


def _copied(buffers: Params | None) -> Params | None:
    return None if buffers is None else {name: buffer.clone() for name, buffer in buffers.items()}
