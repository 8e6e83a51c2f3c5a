"""How much the loss of one batch weighs beside that of another: the number of units that it is the mean over.

What is wanted is the gradient of the mean over all data, however these are cut into batches. A user's loss, or a
model's own, does not say what it is a mean over; so it is found out, on a few single samples and on all of them
together. A sum, and means over samples or targets, are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood.batches.losses import IGNORED, Measured
from sapwood.batches.reading import Batch, target_of
from sapwood.batches.slicing import sample, size, sliceable, targets_follow
from sapwood.batches.trees import joined, tensors
from sapwood.errors import DataError

PICKS = 12  # samples that a loss is looked at on
AGREE = 1e-3  # of weights that are taken for the same

Counts = dict[str, list[float]]
Row = tuple[tuple[float, float], int, int]  # what its targets are like, number of its batch, place in it


def _samples(batch: Batch) -> float:
    return size(batch)


def _targets(batch: Batch) -> float:
    return float(sum(int((target != IGNORED).sum()) for target in tensors(target_of(batch))))


def _later_targets(batch: Batch) -> float:
    found = [target[:, 1:] for target in tensors(target_of(batch)) if target.dim() > 1]
    return float(sum(int((target != IGNORED).sum()) for target in found))


SUM = "sum"
UNITS: Mapping[str, Callable[[Batch], float]] = {
    "samples": _samples,
    "targets": _targets,
    "targets but the first of each sample": _later_targets,  # language models, which predict the next one
    SUM: lambda batch: 1.0,
}


def counts(
    batches: Sequence[Batch],
    looks: Sequence[Callable[[Batch], Measured]],
    gather: Callable[[Counts], Iterable[Counts]],
) -> list[float]:
    """What the loss of each batch is to be multiplied by.

    Args:
        batches: Labelled batches.
        looks: Each measures the loss of a batch, at other weights; BatchNorm with its running statistics.
        gather: What all processes found.

    Raises:
        DataError: it cannot be known.
    """
    chosen = _chosen(batches)
    if looks[0](chosen[0] if chosen else batches[0]).units is not None:
        return [float(looks[0](batch).units or 0) for batch in batches]
    readings = set.intersection(*(_readings(chosen, look) for look in looks)) if len(chosen) > 1 else set()
    fits = {name: [unit(batch) for batch in batches] for name, unit in UNITS.items() if name in readings}
    everywhere = list(gather(fits))
    names = [name for name in fits if all(name in others for others in everywhere)]
    if not names or not _agree([_all(everywhere, name) for name in names]):
        raise DataError(_refusal(names))
    return fits[names[0]]


def _readings(chosen: Sequence[Batch], look: Callable[[Batch], Measured]) -> set[str]:
    """What the loss may be a mean over, by the losses of single samples and of all of them together."""
    losses, together = [float(look(piece).loss) for piece in chosen], look(joined(chosen)).loss
    tolerance = 3e-5 if together.device.type == "cpu" else 1e-3
    near = tolerance * max((abs(loss) for loss in losses if math.isfinite(loss)), default=0.0)
    found = set()
    for name, unit in UNITS.items():
        weighed = [(unit(piece), loss) for piece, loss in zip(chosen, losses, strict=True)]
        # A mean over no targets is no number, and weighs nothing.
        total = sum(weight * loss for weight, loss in weighed if weight)
        whole = 1.0 if name == SUM else sum(weight for weight, _ in weighed)
        if whole and abs(total / whole - float(together)) <= near * (len(chosen) if name == SUM else 1):
            found.add(name)
    return found


def _chosen(batches: Sequence[Batch]) -> list[Batch]:
    """Single samples of one shape, as unlike in their targets as can be; none where samples cannot be told apart."""
    by_shape: dict[Any, list[Row]] = {}
    for index, batch in enumerate(batches):
        if not sliceable(batch) or not targets_follow(batch):
            continue
        shape = tuple(tuple(tensor.shape[1:]) for tensor in tensors(batch))
        rows = by_shape.setdefault(shape, [])
        rows += [(key, index, row) for row, key in enumerate(_keys(batch))]
    if not by_shape:
        return []
    _, _, rows = max((len({key for key, *_ in found}), len(found), sorted(found)) for found in by_shape.values())
    firsts = {key: place for place, (key, *_) in reversed(list(enumerate(rows)))}
    places = sorted(firsts.values())
    places += [place for place in range(len(rows)) if place not in set(places)]
    few = places[:PICKS] if len(firsts) <= PICKS else _spread(sorted(firsts.values()))
    return [sample(batches[index], row) for _, index, row in (rows[place] for place in few)]


def _spread(places: list[int]) -> list[int]:
    return [places[round(i * (len(places) - 1) / (PICKS - 1))] for i in range(PICKS)]


def _keys(batch: Batch) -> list[tuple[float, float]]:
    """For every sample, the number of its targets that count, and their sum."""
    number = torch.zeros(size(batch), dtype=torch.float64)
    total = number.clone()
    for target in tensors(target_of(batch)):
        kept = (target != IGNORED).flatten(1) if target.dim() > 1 else (target != IGNORED)[:, None]
        number += kept.sum(1).cpu()
        total += _numbers(target, kept).cpu()
    return list(zip(number.tolist(), total.tolist(), strict=True))


def _numbers(target: Tensor, kept: Tensor) -> Tensor:
    return (target.detach().to(torch.float64).reshape(kept.shape) * kept).sum(1)


def _all(everywhere: Iterable[Counts], name: str) -> list[float]:
    return [count for found in everywhere for count in found[name]]


def _agree(vectors: Sequence[Sequence[float]]) -> bool:
    """Whether all weights are the same but for a factor."""
    shares = [[weight / sum(vector) for weight in vector] for vector in vectors if sum(vector)]
    first = shares[0] if shares else []
    return all(abs(a - b) <= AGREE * max(a, b) for other in shares[1:] for a, b in zip(first, other, strict=True))


def _refusal(names: Sequence[str]) -> str:
    what = (
        f"the loss may be {' or '.join(_reading(name) for name in names)}, which weigh these batches differently"
        if names
        else "the loss of samples together is neither the sum nor a mean of their own, over samples or targets (class "
        "weights, a random forward, samples that depend on each other?)"
    )
    return (
        f"How much each batch weighs is not known: {what}. Give all data in one batch, a loss= that sums, or one that "
        "returns a pair (mean, number of units that it is over)."
    )


def _reading(name: str) -> str:
    return "a sum" if name == SUM else f"a mean over {name}"
