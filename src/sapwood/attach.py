"""Masks on a model that trains: two optimizer step hooks, and the model stays the plain model it was.

Before a step the gradients of pruned weights are zeroed, after it the weights themselves. The second half alone keeps
the zeros with any optimizer, whatever momentum, weight decay or Adam state it carries; the first half matters where
an optimizer mixes entries (LAMB, Muon). State dict, deepcopy, compile, DDP and FSDP2 see nothing unusual.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sapwood.errors import MaskError
from sapwood.masks import Masks, clean_name


class Attachment:
    """Keeps pruned weights at zero while the model trains: see `attach`; `remove` or the end of `with` undoes it."""

    def __init__(self, masks: Masks, model: nn.Module, optimizers: Sequence[Optimizer], *, strict: bool) -> None:
        self._model = model
        self._parameters = _masked_parameters(masks, model, strict)
        self._pruned = {name: _pruned(masks[name], parameter) for name, parameter in self._parameters.items()}
        self._handles: list[RemovableHandle] = []
        self.apply()
        for optimizer, names in zip(optimizers, _held_names(self._parameters, optimizers), strict=True):
            self._hook(optimizer, names)

    def _hook(self, optimizer: Optimizer, names: Sequence[str]) -> None:
        def before(*_: Any) -> None:
            self._zero_gradients(names)

        def after(*_: Any) -> None:
            self._zero_weights(names)

        self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    @torch.no_grad()
    def _zero_gradients(self, names: Sequence[str]) -> None:
        for name in names:
            gradient = self._parameters[name].grad
            if gradient is not None:
                # Filled, not multiplied: NaN and inf times 0 are NaN.
                _local(gradient).masked_fill_(self._pruned[name], 0)

    @torch.no_grad()
    def _zero_weights(self, names: Sequence[str]) -> None:
        for name in names:
            _local(self._parameters[name]).masked_fill_(self._pruned[name], 0)

    def mask_gradients(self) -> None:
        """Zeroes the gradients of pruned weights now: call it between `backward()` and gradient clipping."""
        self._zero_gradients(list(self._parameters))

    def apply(self) -> None:
        """Zeroes the pruned weights now: call it after `load_state_dict`.

        Raises:
            MaskError: the model's parameters were replaced since `attach`, so the hooks guard tensors nobody trains.
        """
        current = _named_parameters(self._model)
        for name, parameter in self._parameters.items():
            if current.get(name) is not parameter:
                raise MaskError(
                    f"Parameter {name!r} is no longer the tensor that the masks were attached to (fully_shard, "
                    "load_state_dict(assign=True) or a conversion replaced it); call attach again, "
                    "with an optimizer built after that."
                )
        self._zero_weights(list(self._parameters))

    def remove(self) -> None:
        """Takes the hooks off the optimizers; the weights stay as they are. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def finalize(self) -> None:
        """Zeroes the pruned weights a last time, then removes the hooks."""
        self.apply()
        self.remove()

    def __enter__(self) -> Attachment:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes the hooks."""
        self.remove()


def attach(
    masks: Masks, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], *, strict: bool = True
) -> Attachment:
    """Zeroes the pruned weights of `model` and keeps them zero through every step of the optimizer.

    Build the optimizer first, and after anything that replaces parameters (`fully_shard`). Wrappers (DDP, FSDP2,
    torch.compile) are seen through. A closure-based optimizer (LBFGS) ends each step at zero, but its inner iterations
    see the gradients of pruned weights unless the closure calls `mask_gradients`.

    Args:
        masks: True = keep, keyed by parameter name; parameters without a mask are left alone.
        model: The model whose parameters the names refer to.
        optimizer: The optimizer, or all of them where several share the model.
        strict: Refuse masks made on a model with other unmasked parameters; False asks only that the masked ones fit.

    Returns:
        The handle that takes the hooks off again.

    Raises:
        MaskError: the masks do not fit the model, or no optimizer holds a masked parameter that requires grad.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    return Attachment(masks, model, optimizers, strict=strict)


@torch.no_grad()
def assert_masked(model: nn.Module, masks: Masks, *, strict: bool = True) -> None:
    """Checks that every pruned weight of `model` is exactly zero; sharded parameters are checked on this rank's shard.

    Raises:
        MaskError: a weight is not zero (NaN included), or the masks do not fit the model.
    """
    for name, parameter in _masked_parameters(masks, model, strict).items():
        pruned = _local(parameter)[_pruned(masks[name], parameter)]
        alive = int(pruned.count_nonzero())
        if alive:
            raise MaskError(
                f"Layer {name!r}: {alive} of {pruned.numel()} pruned weights are not zero (largest magnitude "
                f"{pruned.abs().max().item():.3g}); was an optimizer stepped, or a state loaded, without attach?"
            )


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {clean_name(name): parameter for name, parameter in model.named_parameters()}


def _masked_parameters(masks: Masks, model: nn.Module, strict: bool) -> dict[str, nn.Parameter]:
    parameters = _named_parameters(model)
    masks.check(parameters, strict=strict)
    return {name: parameters[name] for name in masks}


def _held_names(parameters: dict[str, nn.Parameter], optimizers: Sequence[Optimizer]) -> list[list[str]]:
    """Per optimizer, the masked parameters it updates; every trainable one must be in some optimizer."""
    ids = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    orphans = [name for name, p in parameters.items() if p.requires_grad and not any(id(p) in held for held in ids)]
    if orphans:
        raise MaskError(
            f"{len(orphans)} masked parameters that require grad are in no optimizer given to attach, {orphans[0]!r} "
            "first; build the optimizer from this model's parameters, after fully_shard or any other call that "
            "replaces them, and pass every optimizer."
        )
    return [[name for name, p in parameters.items() if id(p) in held] for held in ids]


def _local(tensor: Tensor) -> Tensor:
    """The tensor itself, or this rank's shard of a DTensor (which shares its storage)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _pruned(mask: Tensor, parameter: Tensor) -> Tensor:
    """True where the weight is pruned; on the parameter's device, sharded and laid out in memory like it."""
    if hasattr(parameter, "device_mesh"):
        mask = _sharded_like(mask, parameter)
    return torch.empty_like(_local(parameter), dtype=torch.bool).copy_(mask.logical_not())


def _sharded_like(mask: Tensor, parameter: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor  # takes a second to import; only sharded models need it

    mesh = parameter.device_mesh
    # Every rank holds the whole mask, so each cuts out its own shard (src_data_rank=None: nothing is sent).
    return distribute_tensor(mask.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None).to_local()
