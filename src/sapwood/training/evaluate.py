"""Loss and accuracy of a model on labelled batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapwood.errors import DataError
from sapwood.training.devices import Device, own_part, total


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: Device = "cpu") -> tuple[float, float]:
    """Measures a classifier in eval mode, and puts it back into the mode it came in.

    Args:
        model: Returns logits (batch x classes); already on `device`, or set up by the Fabric.
        batches: Pairs (input, label); labels are int64 class indices (batch).
        device: Where the batches are moved to; or a Fabric, each of whose processes measures its slice of every batch.

    Returns:
        Mean cross-entropy, and accuracy in percent, over all processes.

    Raises:
        DataError: there are no batches.
    """
    training = model.training
    model.eval()
    place = device if isinstance(device, (str, torch.device)) else device.device
    loss = correct = torch.zeros((), device=place)
    count = 0
    try:
        for batch in batches:
            inputs, labels = own_part(batch, device)
            logits = model(inputs)
            loss = loss + F.cross_entropy(logits, labels, reduction="sum")
            correct = correct + (logits.argmax(1) == labels).sum()
            count += len(batch[1])
    finally:
        model.train(training)
    if count == 0:
        raise DataError("evaluate needs at least one labelled example, got none; is the split empty?")
    return total(loss, device).item() / count, 100 * total(correct, device).item() / count
