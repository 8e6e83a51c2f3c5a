"""The one way to open a model for scoring: read it, watch it run, and refuse what would give a wrong number.

A model is run twice on a few samples, in eval mode, with half of every weight pruned, all of its first unit and all of
what reads its first input among them. Seen are

* weights whose zeros are lost before they are applied, and weights that arrive nowhere (`applied`);
* a forward that runs on the user's own tensors instead of the copy's: it is stopped before the first such call;
* a forward that writes into parameters: it gets copies of those in every later pass;
* a forward that is random: whatever compares passes can hold its noise (`FunctionalModel.held`);
* which precision of inputs a model takes whose parameters differ in theirs.

Where neither an input shape nor a batch is known, layers are run one by one on inputs of their own (`alone`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sapwood.batches import Batch, Data, cast, first, inputs_of, small, tensors
from sapwood.errors import ForwardError, UnsupportedModelError
from sapwood.functional import FunctionalModel, Noise, precisions
from sapwood.isolation import RandomState
from sapwood.names import Names
from sapwood.witness.alone import look_at_layers
from sapwood.witness.applied import Applied
from sapwood.witness.graph import reached
from sapwood.witness.masking import half_pruned, masked_like, written_into

SAMPLES = 2  # the fewest that BatchNorm and its kin can take statistics of


def opened(model: nn.Module, data: Data, *, masked: Iterable[str] | None = None, **options: Any) -> FunctionalModel:
    """Reads a model for scoring, and looks at what it does; call it under `isolated`.

    Args:
        model: The user's module, wrapped or not.
        data: Batches or an input shape, of which a few samples are run; with neither, layers are run by themselves.
        masked: Clean names of the parameters whose zeros must be zeros of what is applied; None: the prunable ones.
        **options: As for `FunctionalModel.of`.

    Raises:
        UnsupportedModelError: what `FunctionalModel.of` raises, and what is seen to come out wrong under masks; the
            message names the layer, the reason and the way out.
    """
    net = FunctionalModel.of(model, **options)
    wanted = set(net.prunable) if masked is None else set(masked)
    names = tuple(name for name in net.params if name in wanted)
    if data.input_shape is None and not data.batches:
        look_at_layers(model, names)
        return net

    failed: list[ForwardError] = []
    for candidate in _in_each_precision(net):
        for batch in _samples(data, candidate):
            try:
                return _looked_at(candidate, model, batch, names)
            except ForwardError as error:
                failed.append(error)
    raise failed[0]


def _in_each_precision(net: FunctionalModel) -> Iterator[FunctionalModel]:
    """The model with its inputs in the precision of the first weight, and in others that its parameters have."""
    kinds = precisions(net.params)
    if len(kinds) == 1:
        yield net
        return
    for kind in sorted(kinds, key=lambda kind: kind != net.dtype):
        yield replace(net, input_dtype=kind)


def _looked_at(net: FunctionalModel, model: nn.Module, batch: Batch, names: tuple[str, ...]) -> FunctionalModel:
    """The model with what was seen of it."""
    pruned = {name: half_pruned(net.params[name]) for name in names}
    weights = {name: masked_like(net.params[name], pruned[name]) for name in names}
    given = {name: tensor.clone() for name, tensor in {**net.params, **weights}.items()}
    leaves = {name: given[name].requires_grad_() for name in names}
    watch = Applied(leaves, pruned, tensors(batch), _users(model))

    start = RandomState.now(net.device)
    with watch:
        first = _tensors(net.run(given, batch))
    drawn = RandomState.now(net.device) != start
    written = written_into(given, {**net.params, **weights}, names)

    unseen = frozenset(names) - watch.seen
    if hidden := unseen & reached(first, leaves):
        raise UnsupportedModelError(
            f"How the parameter {min(hidden)!r} is applied cannot be seen (a scripted function, or a kernel outside of "
            f"torch's functions), so that nothing says whether its zeros count: exclude=({min(hidden)!r},), or run the "
            "layer through torch's own functions."
        )

    net = replace(net, written=written, unseen=tuple(name for name in names if name in unseen))
    start.restore()
    with torch.no_grad():
        second = _tensors(net.run(weights, batch))
    start.restore()
    noise = Noise.SEEDED if drawn else Noise.NONE
    return replace(net, noise=noise if _alike(first, second) else Noise.FREE)


def _samples(data: Data, net: FunctionalModel) -> tuple[Batch, Batch]:
    """A few samples, and what to run where the model wants its batch whole, or one sample at a time."""
    if data.input_shape is not None:
        few = torch.randn(SAMPLES, *data.input_shape, device=net.device, dtype=net.dtype)
        return few, few[:1]
    batch = cast(data.batches[0], net.dtype)
    if net.module.needs_targets(batch):
        return first(batch, SAMPLES), batch
    return small(batch, SAMPLES), inputs_of(batch)


def _users(model: nn.Module) -> dict[int, str]:
    """The user's own tensors, by id."""
    names = Names.of(model)
    return {id(tensor): name for name, tensor in (names.buffers | names.parameters).items()}


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in what a model returns."""
    whole = dict(value) if isinstance(value, Mapping) else getattr(value, "__dict__", value)
    whole = value if isinstance(value, Tensor) else whole
    return [leaf for leaf in pytree.tree_leaves(whole) if isinstance(leaf, Tensor)]


def _alike(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two passes gave the same, but for the order in which a device adds up."""
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return False
    return all(
        torch.allclose(a.detach().double(), b.detach().double(), rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in zip(first, second, strict=True)
        if not a.is_complex()
    )
