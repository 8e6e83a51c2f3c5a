"""Samples of a batch: counted, taken, repeated; where they can be told apart."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sapwood.batches.losses import counted
from sapwood.batches.reading import Batch, inputs_of, target_of
from sapwood.batches.trees import described, has_list, is_opaque, leaves, mapped, tensors
from sapwood.errors import DataError


def sliceable(batch: Batch) -> bool:
    """Whether the shapes of a batch's inputs let samples be in the first dimension of all of them.

    Tensors without dimensions and plain values are shared by all samples. Lists are not cut, nor objects: what is in
    them may be samples or their parts.
    """
    inputs = inputs_of(batch)
    if has_list(inputs) or any(map(is_opaque, leaves(inputs))):
        return False
    return len({tensor.shape[0] for tensor in tensors(inputs) if tensor.dim()}) == 1


def size(batch: Batch) -> int:
    """Number of samples in a batch.

    Raises:
        DataError: its samples cannot be told apart.
    """
    if not sliceable(batch):
        raise DataError(
            f"A batch of {described(inputs_of(batch))} cannot be cut into samples, which are in the first dimension of "
            "every tensor where they can: give it such tensors, one sample a row."
        )
    return next(tensor.shape[0] for tensor in tensors(inputs_of(batch)) if tensor.dim())


def size_or_one(batch: Batch) -> int:
    """Number of samples; 1 for a batch that is one whole."""
    return size(batch) if sliceable(batch) else 1


def samples(batch: Batch) -> Iterator[Batch]:
    """The batches of one that a labelled or unlabelled batch is made of, without those none of whose targets counts.

    Raises:
        DataError: its samples cannot be told apart, or its targets are not one a sample.
    """
    count, target = size(batch), target_of(batch)
    if not targets_follow(batch):
        raise DataError(
            f"Targets of {described(target)} are not one row for each of {count} samples, so that samples have no loss "
            "of their own: give a tensor with samples in its first dimension."
        )
    for i in range(count):
        one = sample(batch, i)
        if counted(target_of(one)):
            yield one


def sample(batch: Batch, index: int) -> Batch:
    """A batch of the one sample at `index`, labelled if the batch is."""
    return sliced(batch, index, index + 1)


def targets_follow(batch: Batch) -> bool:
    """Whether targets, if there are any, have as many rows as there are samples."""
    target = target_of(batch)
    if has_list(target) or any(map(is_opaque, leaves(target))):
        return False
    return all(tensor.dim() and tensor.shape[0] == size(batch) for tensor in tensors(target))


def small(batch: Batch, samples: int = 2) -> Batch:
    """The first samples of a batch, without targets; all of it where its samples cannot be told apart."""
    inputs = inputs_of(batch)
    return sliced(inputs, 0, samples) if sliceable(inputs) else inputs


def first(batch: Batch, samples: int = 1) -> Batch:
    """A batch, labelled or not, of the first samples; all of it where its samples cannot be told apart."""
    return sliced(batch, 0, samples) if sliceable(batch) and targets_follow(batch) else batch


def resized(batch: Batch, samples: int) -> Batch:
    """The first `samples` of an unlabelled batch, repeated where it has fewer; all of one that cannot be cut."""
    if not sliceable(batch):
        return batch
    return taken(batch, torch.arange(samples) % size(batch))


def parts(batch: Batch, samples: int) -> Iterator[Batch]:
    """An unlabelled batch in pieces of at most `samples`, in order."""
    for start in range(0, size(batch), samples):
        yield sliced(batch, start, start + samples)


def taken(batch: Batch, index: Tensor) -> Batch:
    """The samples of an unlabelled batch at the positions `index`."""
    return mapped(lambda t: t[index.to(t.device)] if t.dim() else t, batch)


def sliced(batch: Batch, start: int, stop: int) -> Batch:
    """The samples `start` to `stop` (excluded) of a batch."""
    return mapped(lambda t: t[start:stop] if t.dim() else t, batch)
