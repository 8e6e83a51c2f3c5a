"""A run by several processes: the first one does what is done once, and all of them hear how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from sapwood.errors import SapwoodError

if TYPE_CHECKING:  # imported late, as it is slow to import
    from lightning_fabric import Fabric

T = TypeVar("T")


def first(fabric: Fabric | None, action: Callable[[], T]) -> T:
    """Does something in the first process; gives its value, or raises its error, in all of them.

    Raises:
        SapwoodError: what `action` raised.
        OSError: what `action` raised.
    """
    if fabric is None or fabric.world_size == 1:
        return action()
    value, error = None, None
    if fabric.is_global_zero:
        try:
            value = action()
        except (SapwoodError, OSError) as raised:
            error = raised
    value, error = fabric.broadcast((value, error))
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # without an error it is what `action` gave


def gathered(model: nn.Module, fabric: Fabric, fresh: Callable[[], nn.Module]) -> nn.Module:
    """A model of its own, on the CPU, with the weights that the processes hold together.

    Args:
        model: As it was trained, perhaps in shards.
        fabric: Of the training; all processes call this.
        fresh: Makes a model like it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = fresh()
    if fabric.is_global_zero:  # the others are given none
        whole.load_state_dict(weights)
    return whole


def end(fabric: Fabric) -> None:
    """Takes leave of the other processes, which must not find this one gone while they still talk to it."""
    import torch.distributed as dist

    if fabric.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()
