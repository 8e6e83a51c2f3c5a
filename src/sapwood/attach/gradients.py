"""The mask that a weight carries: a hook on the tensor, through which everybody finds it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

from sapwood.attach.pruned import Pruned, is_sharded
from sapwood.errors import MaskError


@unserializable_hook  # the module's guard carries the mask into files; torch need not warn
class GradientMask:
    """Zeroes the pruned part of a weight's gradient before it is accumulated, or given to `autograd.grad`.

    Attributes:
        pruned: Where.
        held: An optimizer was seen to hold the weight.
        is_compiled: A compiled forward pass reads the weight, in which nothing can be zeroed.
        version: The weight's version when it was last seen to be zero.
    """

    def __init__(self, pruned: Pruned, version: int) -> None:
        self.pruned = pruned
        self.held = self.is_compiled = False
        self.version = version

    def __call__(self, gradient: Tensor) -> Tensor | None:
        """The masked gradient; None leaves it as it is."""
        # A sharded gradient may still be a sum over ranks: `accumulated` waits for the whole one.
        return None if is_sharded(gradient) else self.pruned.zeroed(gradient)

    def accumulated(self, parameter: Tensor) -> None:
        """FSDP2 writes gradients itself, past the hook above, and calls this one."""
        if parameter.grad is not None:
            self.pruned.zero_(parameter.grad.data)


def carried(tensor: Tensor) -> GradientMask | None:
    """The mask that a tensor carries, if any."""
    for hook in (tensor._backward_hooks or {}).values():
        if isinstance(hook, GradientMask):
            return hook
    return None


def carry(parameter: nn.Parameter, pruned: Pruned) -> list[RemovableHandle]:
    """Makes a weight carry a mask, also while it is frozen; none if it carries this one already.

    Raises:
        MaskError: it carries another one.
    """
    before = carried(parameter)
    if before is not None:
        if before.pruned is pruned:
            return []
        raise MaskError(
            f"Parameter {pruned.name!r} is the same tensor as {before.pruned.name!r} by now, and each was attached to "
            "masks of its own: tie weights before pruning, and attach once to all that share them."
        )
    hook, trains = GradientMask(pruned, parameter._version), parameter.requires_grad

    parameter.requires_grad_(True)  # torch hooks no frozen tensor, but keeps the hooks of a thawed one
    tensor: Any = parameter
    handles = [tensor.register_hook(hook)]
    if is_sharded(parameter):
        handles.append(tensor.register_post_accumulate_grad_hook(hook.accumulated))
    parameter.requires_grad_(trains)
    return handles
