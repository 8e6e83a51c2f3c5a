"""The copy of the user's module that is run, and what a failure of it means."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from sapwood.batches import Batch, argument, call, label_of
from sapwood.functional.kinds import Forward, Params
from sapwood.names import Names


class Runner(nn.Module):
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
        """What the user's forward, or the model itself, makes of a batch."""
        return self.run(self.model, argument(batch))

    def raw(self, state: Params) -> Params:
        """The same tensors under the names that they have in this module."""
        return {f"model.{self.names.raw[name]}": tensor for name, tensor in state.items()}


def way_out(error: Exception) -> str:
    """What a user can do about a forward that failed."""
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
