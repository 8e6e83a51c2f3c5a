"""Every score once more, by plain torch on copies of the model: shares no code with the package.

Masks are applied by multiplying the weights of a copy; gradients are those that `backward` leaves in its parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from untouched import Luck

Named = dict[str, Tensor]
HALVES = (torch.float16, torch.bfloat16)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Turn:
    """What a criterion was called with, and what it gave.

    Attributes:
        masks: The masks so far, by raw parameter name.
        draws: State of the generator.
        luck: State of the global generators.
        scores: What came out.
    """

    masks: Named
    draws: Tensor
    luck: Luck
    scores: Named


@dataclass(frozen=True)
class Case:
    """A model, its labelled batches, and the names of the scales that are scored as ones."""

    model: nn.Module
    batches: list[Any]
    opened: tuple[str, ...] = ()

    def copy(self, masks: Mapping[str, Tensor] = {}, **changes: Named) -> nn.Module:
        """A copy in float32 or better, in eval mode, its weights times the masks, with the references of troubles."""
        copied = copy.deepcopy(self.model).eval()
        for module in copied.modules():
            if hasattr(module, "reference"):
                module.reference = True
        values = {name: value for change in changes.values() for name, value in change.items()}
        for name, parameter in copied.named_parameters():
            parameter.requires_grad_(True)
            if parameter.dtype in HALVES:
                parameter.data = parameter.data.float()
            if name in self.opened:
                parameter.data = torch.ones_like(parameter)
            if name in values:
                parameter.data = values[name].clone()
            if name in masks:
                parameter.data = parameter.data * masks[name]
        for buffer in copied.buffers():
            if buffer.dtype in HALVES:
                buffer.data = buffer.data.float()
        return copied

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs as they come, but no less than float32."""
        given = inputs_of(self.batches[0])
        tensors = [t for t in (given.values() if isinstance(given, dict) else [given]) if t.is_floating_point()]
        return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def named(model: nn.Module, names: Mapping[str, Any]) -> Named:
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in names}


def statistics_of_the_batch(model: nn.Module, on: bool = True) -> nn.Module:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(on)
            module.momentum = 1.0
    return model


def cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, dict):
        return {key: cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return cast(batch[0], dtype), batch[1]
    return batch.to(dtype) if batch.is_floating_point() else batch


def inputs_of(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: value for key, value in batch.items() if key != "labels"}
    return batch[0] if isinstance(batch, tuple) else batch


def target_of(batch: Any) -> Tensor:
    return batch["labels"] if isinstance(batch, dict) else batch[1]


def logits(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, Tensor) else output.logits


def mean_loss(model: nn.Module, batch: Any, temperature: float = 1.0) -> Tensor:
    if hasattr(model, "own_loss") and isinstance(batch, dict):
        return model(**batch).loss
    return F.cross_entropy(logits(model, inputs_of(batch)) / temperature, target_of(batch))


def gradient(loss: Tensor, leaves: Named, create_graph: bool = False) -> Named:
    found = torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph, allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs}


def summed_gradient(case: Case, turn: Turn, temperature: float = 1.0) -> Named:
    """Of the loss summed over all samples, at w*m, each batch with its BatchNorm statistics."""
    model = statistics_of_the_batch(case.copy(turn.masks))
    leaves = named(model, turn.masks)
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for batch in case.batches:
        batch = cast(batch, case.dtype)
        loss = mean_loss(model, batch, temperature) * len(target_of(batch))
        for name, g in gradient(loss, leaves).items():
            total[name] = total[name] + g
    return total


def snip(case: Case, turn: Turn) -> Named:
    turn.luck.restore()
    weights = named(case.copy(), turn.masks)
    return {name: (weights[name] * g).abs().detach() for name, g in summed_gradient(case, turn).items()}


def magnitude(case: Case, turn: Turn) -> Named:
    return {name: weight.detach().abs() for name, weight in named(case.copy(), turn.masks).items()}


def grasp(case: Case, turn: Turn) -> Named:
    with sdpa_kernel(SDPBackend.MATH):
        direction = summed_gradient(case, turn, 200.0)
        model = statistics_of_the_batch(case.copy(turn.masks))
        leaves = named(model, turn.masks)
        scores = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        for batch in case.batches:
            batch = cast(batch, case.dtype)
            loss = mean_loss(model, batch, 200.0) * len(target_of(batch))
            first = gradient(loss, leaves, create_graph=True)
            slope = sum((first[name] * direction[name]).sum().double() for name in leaves)
            for name, product in gradient(slope, leaves).items():
                scores[name] = scores[name] + leaves[name].detach() * product
    return scores


def taylor(case: Case, turn: Turn) -> Named:
    turn.luck.restore()
    model = statistics_of_the_batch(case.copy(turn.masks))
    leaves = named(model, turn.masks)
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for batch in case.batches:
        for name, g in gradient(mean_loss(model, cast(batch, case.dtype)), leaves).items():
            total[name] = total[name] + (leaves[name].detach() * g).square()
    return total


def obd(case: Case, turn: Turn) -> Named:
    """Squared gradients of single samples, BatchNorm at the statistics of the sample's batch."""
    total = {name: torch.zeros_like(w) for name, w in named(case.copy(), turn.masks).items()}
    for batch in case.batches:
        batch = cast(batch, case.dtype)
        model = statistics_of_the_batch(case.copy(turn.masks))
        with torch.no_grad():
            logits(model, inputs_of(batch))
        statistics_of_the_batch(model, on=False)
        leaves = named(model, turn.masks)
        for index in range(len(target_of(batch))):
            sample = {k: v[index : index + 1] for k, v in batch.items()} if isinstance(batch, dict) else None
            sample = sample or tuple(part[index : index + 1] for part in batch)
            for name, g in gradient(mean_loss(model, sample), leaves).items():
                total[name] = total[name] + g.square()
    weights = named(case.copy(turn.masks), turn.masks)
    return {name: (weights[name].square() * h / 2).detach() for name, h in total.items()}


def skeletonization(case: Case, turn: Turn) -> Named:
    """-dE/d alpha of every input unit of every layer, E the sum of |one-hot - softmax|."""
    turn.luck.restore()
    model = statistics_of_the_batch(case.copy(turn.masks))
    leaves = named(model, turn.masks)
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for batch in case.batches:
        batch = cast(batch, case.dtype)
        output = logits(model, inputs_of(batch))
        error = (F.one_hot(target_of(batch), output.shape[1]) - output.softmax(1)).abs().sum()
        for name, g in gradient(error, leaves).items():
            total[name] = total[name] - leaves[name].detach() * g
    owners = {name: model.get_submodule(name.rpartition(".")[0].partition(".parametrizations")[0]) for name in total}
    return {name: _by_input_unit(total[name], owners[name]) for name in total}


def _by_input_unit(value: Tensor, owner: nn.Module) -> Tensor:
    """The sum over all entries that read one input channel, at each of them."""
    if isinstance(owner, nn.ConvTranspose2d):  # (in, out / groups, ...)
        return value.sum(tuple(range(1, value.dim())), keepdim=True).expand_as(value)
    groups = getattr(owner, "groups", 1)
    parts = value.chunk(groups)
    over = (0, *range(2, value.dim()))
    return torch.cat([part.sum(over, keepdim=True).expand_as(part) for part in parts])


def flow(power: int) -> Callable[[Case, Turn], Named]:
    """SynFlow (1) and SynFlow-L2 (2): |w|^power dR/d|w|^power on ones, in float64."""

    def scores(case: Case, turn: Turn) -> Named:
        model = case.copy(turn.masks)
        for parameter in model.parameters():
            parameter.data = parameter.data.double().abs() ** power
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.double() ** power * (not name.endswith("running_mean"))
        leaves = named(model, turn.masks)
        inputs = _ones(cast(inputs_of(case.batches[0]), torch.float64))
        total = logits(model, inputs).sum()
        return {name: (leaves[name] * g).abs().detach() for name, g in gradient(total, leaves).items()}

    return scores


def _ones(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _ones(entry) for key, entry in value.items()}
    return torch.ones_like(value[:1]) if value.is_floating_point() else value[:1]


def fan_in(weight: Tensor, owner: nn.Module) -> int:
    if isinstance(owner, nn.ConvTranspose2d):
        return owner.in_channels // owner.groups * math.prod(owner.kernel_size)
    return weight[0].numel()


def ntk_sap(samples: int) -> Callable[[Case, Turn], Named]:
    """The published procedure for one mini-batch: two networks side by side, whose gradients make the mask's."""

    def scores(case: Case, turn: Turn) -> Named:
        generator = torch.Generator()
        generator.set_state(turn.draws)
        model = case.copy()
        fresh = _fresh(model, turn.masks, generator)
        inputs = _noise(inputs_of(case.batches[0]), samples, case.dtype, generator)
        step = {n: 0.01 * _normal(fresh[n], generator) for n in turn.masks}

        clean = case.copy(turn.masks, values=fresh)
        statistics_of_the_batch(clean)
        turn.luck.restore()
        with torch.no_grad():
            logits(clean, inputs)
        statistics_of_the_batch(clean, on=False)
        moved = case.copy(turn.masks, values=fresh | {n: fresh[n] + step[n] for n in step})
        for name, buffer in moved.named_buffers():
            buffer.copy_(clean.get_buffer(name))
        turn.luck.restore()
        first = logits(clean, inputs)
        turn.luck.restore()
        second = logits(moved, inputs)
        change = (first - second).square().sum()
        both = {f"clean {n}": p for n, p in named(clean, turn.masks).items()}
        both |= {f"moved {n}": p for n, p in named(moved, turn.masks).items()}
        g = gradient(change, both)
        parts = {n: (fresh[n] * g[f"clean {n}"], (fresh[n] + step[n]) * g[f"moved {n}"]) for n in turn.masks}
        return {n: (one + two).abs() for n, (one, two) in parts.items()}

    return scores


def _fresh(model: nn.Module, names: Mapping[str, Any], generator: torch.Generator) -> Named:
    fresh: Named = {}
    for prefix, module in model.named_modules():
        if isinstance(module, NORMS):
            for leaf, parameter in module.named_parameters(prefix, recurse=False):
                fresh[leaf] = torch.full_like(parameter, float(leaf.endswith("weight")))
    for name, weight in named(model, names).items():
        owner = model.get_submodule(name.rpartition(".")[0].partition(".parametrizations")[0])
        fresh[name] = math.sqrt(2 / fan_in(weight, owner)) * _normal(weight, generator)
    return {name: value.detach() for name, value in fresh.items()}


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _noise(inputs: Any, samples: int, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if isinstance(inputs, dict):
        return {key: _noise(value, samples, dtype, generator) for key, value in inputs.items()}
    if not inputs.is_floating_point():
        return inputs[torch.arange(samples) % len(inputs)]
    return torch.randn(samples, *inputs.shape[1:], generator=generator, dtype=dtype)


def prospr(case: Case, turn: Turn) -> Named:
    """Three unrolled steps of SGD with learning rate 0.1, differentiated in the gates."""
    model = statistics_of_the_batch(case.copy())
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    gates = {name: mask.to(params[name].dtype).requires_grad_() for name, mask in turn.masks.items()}
    weights = params | {name: params[name] * gate for name, gate in gates.items()}
    batches = [cast(case.batches[i % len(case.batches)], case.dtype) for i in range(4)]

    def loss(values: Named, batch: Any) -> Tensor:
        return mean_loss(_Called(model, values), batch)

    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches[:3]:
            slope = gradient(loss(weights, batch), weights, create_graph=True)
            weights = {n: w - 0.1 * slope[n] * turn.masks.get(n, 1) for n, w in weights.items()}
        meta = gradient(loss(weights, batches[3]), gates)
    return {name: (g * turn.masks[name]).abs() for name, g in meta.items()}


class _Called:
    """A model with other parameters, which looks like one."""

    def __init__(self, model: nn.Module, values: Named) -> None:
        self.model, self.values = model, values
        if hasattr(model, "own_loss"):
            self.own_loss = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.model, self.values, args, kwargs)


def kernel(case: Case, masks: Named) -> Tensor:
    """J J^T in eval mode, J over the kept weights, one backward pass an output."""
    model = case.copy(masks)
    leaves = named(model, masks)
    outputs = logits(model, cast(inputs_of(case.batches[0]), case.dtype)).flatten()
    rows = []
    for output in outputs:
        found = torch.autograd.grad(output, list(leaves.values()), retain_graph=True, materialize_grads=True)
        parts = zip(leaves, found, strict=True)
        rows.append(torch.cat([(g * masks[name]).double().flatten() for name, g in parts]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


ORACLES: dict[str, Callable[[Case, Turn], Named]] = {
    "magnitude": magnitude,
    "janowsky": magnitude,
    "snip": snip,
    "iter-snip": snip,
    "force": snip,
    "grasp": grasp,
    "taylor": taylor,
    "obd": obd,
    "skeletonization": skeletonization,
    "prospr": prospr,
    "ntk-sap": ntk_sap(4),
    "synflow": flow(1),
    "synflow-l2": flow(2),
}
