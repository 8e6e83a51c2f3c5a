"""Are a batch's rows samples? What a batch's shapes allow, a model's outputs on two of its rows decide.

(length, batch, width) sequences, the nodes and edges of a graph, and sets look like batches of samples and are none. To
cut, repeat or resample their rows would give another input, and no error. Cost: three passes over two rows, once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sapwood.batches import (
    Batch,
    described,
    inputs_of,
    mapped,
    resized,
    samples,
    size,
    size_or_one,
    sliceable,
    taken,
    tensors,
)
from sapwood.errors import DataError, SapwoodError
from sapwood.functional import FunctionalModel
from sapwood.isolation import RandomState

TOLERANCE = 1e-3  # of the largest output: single precision, and kernels that depend on the shape


def takes_rows(net: FunctionalModel, batch: Batch) -> bool:
    """Whether samples are in the first dimension of all inputs, by their shapes and by what the model does.

    The outputs of samples a and b must be what a gives beside itself, and b beside itself. A model with BatchNorms
    that have no running statistics normalises over them: there (a, b, a, b) must give the outputs of (a, b) twice.

    Args:
        net: The model; it is looked at once, on its first batch whose shapes allow it.
        batch: An unlabelled batch.
    """
    if not sliceable(batch):
        return False
    if net.module.rows is None:
        net.module.rows = _look(net, batch)
    return net.module.rows


def single(net: FunctionalModel, batch: Batch) -> Iterator[Batch]:
    """The batches of one that a labelled batch is made of; those without a target that counts are left out.

    Raises:
        DataError: its samples cannot be told apart.
    """
    inputs = inputs_of(batch)
    if size(inputs) > 1 and not takes_rows(net, inputs):
        net.outputs({}, inputs)  # if the model fails on all inputs, it says so
        raise DataError(
            f"The model does not take the rows of its inputs ({described(inputs)}) for samples: outputs of one row "
            "depend on the others, and this method scores sample by sample. Put samples first, as with "
            "forward=lambda model, inputs: model(inputs.transpose(0, 1)), or take another method."
        )
    return samples(batch)


def shortened(net: FunctionalModel, batch: Batch, count: int) -> Batch:
    """The first `count` samples of an unlabelled batch, repeated where it has fewer; all of one that is one whole."""
    if size_or_one(batch) == count or not takes_rows(net, batch):
        return batch
    return resized(batch, count)


def _look(net: FunctionalModel, batch: Batch) -> bool:
    pair = _unlike(taken(batch, torch.tensor((0, size(batch) - 1))))
    coupled = any(norm.running_mean is None for norm in net.norms)
    rows = [(0, 1), (0, 1, 0, 1)] if coupled else [(0, 1), (0, 0), (1, 1)]
    try:
        held = net.held()
        both, *others = [_outputs(held, taken(pair, torch.tensor(some))) for some in rows]
    except SapwoodError:  # a model that wants its batch whole
        return False

    if not both.dim() or both.shape[0] % 2:
        return False
    half = both.shape[0] // 2
    expected = torch.cat([both, both]) if coupled else both
    found = others[0] if coupled else torch.cat([others[0][:half], others[1][half:]])
    if expected.shape != found.shape:
        return False
    largest = float(both.abs().nan_to_num(0, 0, 0).amax()) if both.numel() else 0.0
    return torch.allclose(expected, found, rtol=TOLERANCE, atol=TOLERANCE * largest, equal_nan=True)


def _unlike(pair: Batch) -> Batch:
    """Two samples that are not the same; where they are, as in a batch of zeros, the numbers of the second change."""
    found = [tensor for tensor in tensors(pair) if tensor.dim()]
    if not all(torch.equal(tensor[0], tensor[1]) for tensor in found):
        return pair
    generator = torch.Generator(found[0].device).manual_seed(0)

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.dim() or not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32)
        return tensor + noise.to(tensor.dtype)

    return mapped(changed, pair)


@torch.no_grad()
def _outputs(net: FunctionalModel, batch: Batch) -> Tensor:
    """The logits at fixed weights, none of which are zero; a random forward has the same noise every time."""
    before = RandomState.now(net.device)
    try:
        return net.outputs(net.drawn(), batch)
    finally:
        before.restore()
