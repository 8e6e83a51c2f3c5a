"""Loss and accuracy of a model on labelled batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapwood.errors import DataError


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Measures a classifier in eval mode, and puts it back into the mode it came in.

    Args:
        model: Returns logits (batch x classes); already on `device`.
        batches: Pairs (input, label); labels are int64 class indices (batch).
        device: Where the batches are moved to.

    Returns:
        Mean cross-entropy, and accuracy in percent.

    Raises:
        DataError: there are no batches.
    """
    training = model.training
    model.eval()
    loss = correct = torch.zeros((), device=device)
    count = 0
    try:
        for inputs, labels in batches:
            inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            logits = model(inputs)
            loss = loss + F.cross_entropy(logits, labels, reduction="sum")
            correct = correct + (logits.argmax(1) == labels).sum()
            count += len(labels)
    finally:
        model.train(training)
    if count == 0:
        raise DataError("evaluate needs at least one labelled example, got none; is the split empty?")
    return loss.item() / count, 100 * correct.item() / count
