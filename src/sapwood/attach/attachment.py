"""`attach`: from here on the model keeps its pruned weights at zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from torch import nn

from sapwood.attach.gradients import carried
from sapwood.attach.guard import Entry, Guard, guard_of, guards
from sapwood.attach.pruned import Pruned, is_sharded
from sapwood.attach.stepping import is_optimizer, masked, watch, with_inner, zero_state
from sapwood.errors import MaskError
from sapwood.masks import Masks
from sapwood.names import Names, named_parameters
from sapwood.witness import refuse_lost_zeros


@runtime_checkable
class Found(Protocol):
    """What `prune` gives: `sapwood.Result`."""

    @property
    def masks(self) -> Masks:
        """What is kept."""
        ...

    @property
    def params(self) -> Mapping[str, Any] | None:
        """New values of parameters and buffers, if there are any."""
        ...

    def load_into(self, model: nn.Module) -> None:
        """Writes its new weights."""
        ...


@dataclass(frozen=True)
class Place:
    """One masked parameter: its name, the module and attribute that own it, and its mask there."""

    name: str
    module: nn.Module
    leaf: str
    entry: Entry
    parameter: nn.Parameter

    def is_current(self) -> bool:
        """Whether no later attachment took the place."""
        guard = guard_of(self.module)
        return guard is not None and guard.entries.get(self.leaf) is self.entry


class Attachment:
    """The handle of `attach`; `remove` or the end of `with` frees the model again."""

    def __init__(self, model: nn.Module, places: list[Place], *, by_hand: bool) -> None:
        self._model = model
        self._places = places
        self._by_hand = by_hand
        self._is_removed = False

    def mask_gradients(self) -> None:
        """Zeroes the gradients of pruned weights now: where something other than a backward pass wrote them."""
        for place in self._places:
            gradient = place.entry.parameter.grad
            if gradient is not None:
                place.entry.pruned.zero_(gradient.data)

    def apply(self) -> None:
        """Zeroes the pruned weights now: where weights were written, and are read without a forward pass.

        Raises:
            MaskError: another attachment took over, or a parameter was replaced and no optimizer trains the new one.
        """
        current = named_parameters(self._model)
        for place in self._places:
            if not self._is_removed and not place.is_current():
                raise MaskError(
                    f"Parameter {place.name!r} was attached to other masks since; use the handle of that attachment."
                )
            parameter = current.get(place.name)
            if not (parameter is place.parameter or self._is_trained(parameter)):
                raise MaskError(
                    f"Parameter {place.name!r} is no longer the tensor that the masks were attached to (fully_shard, "
                    "load_state_dict(assign=True) or a conversion replaced it), and no optimizer has stepped the new "
                    "one; call attach again, with an optimizer built after that."
                )
        for place in self._places:
            place.entry.pruned.zero_(current[place.name].detach())

    def _is_trained(self, parameter: nn.Parameter | None) -> bool:
        """Whether a tensor that took a parameter's place is the one that is trained."""
        mask = None if parameter is None else carried(parameter)
        return parameter is not None and (self._by_hand or (mask is not None and mask.held))

    def remove(self) -> None:
        """Takes the hooks off the model; the weights stay as they are. A second call does nothing."""
        self._is_removed = True
        for place in filter(Place.is_current, self._places):
            _release(place.module, place.leaf)

        for module in (*self._model.modules(), *(place.module for place in self._places)):
            guard = guard_of(module)
            if guard is not None and not any(below.entries for _, below in guards(module)):
                guard.uninstall()

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
    masks: Masks | Found, model: nn.Module, optimizer: Any | Iterable[Any] | None, *, strict: bool = True
) -> Attachment:
    """Zeroes the pruned weights of `model`, which from then on keeps them at zero, whatever trains it.

    Pruned weights are zero in every forward pass, after every step, in every state dict, and in copies of the model;
    their gradients are zero before anything sees them, and so is what the optimizer knows of them (momentum, slow
    copies). docs/guarantees.md says what holds when. Wrappers of models (DDP, FSDP2, torch.compile) and of optimizers
    (accelerate, Lookahead, SAM) are seen through.

    Masks of a parameter that is attached already are replaced by the new ones; other parameters keep theirs.

    Args:
        masks: What is kept, by parameter name; parameters without a mask are left alone. A result of `prune` does as
            well: its masks, and its new weights if it has any.
        model: The model whose parameters the names refer to.
        optimizer: The optimizer, or all of them where several share the model. None: weights are updated by hand.
        strict: Refuse masks made on a model with other unmasked parameters; False asks only that the masked ones fit.

    Returns:
        The handle that takes the hooks off again.

    Raises:
        MaskError: the masks do not fit the model, or no optimizer holds a masked parameter that requires grad.
        ZerosLostError: a layer applies a weight in which the zeros of its parameter are none.
    """
    result = None if isinstance(masks, Masks) else _result(masks)
    names = Names.of(model)
    chosen = names.fit(masks if isinstance(masks, Masks) else masks.masks, strict=strict)
    parameters = {name: names.parameters[name] for name in chosen}
    optimizers = with_inner(_optimizers(optimizer))
    owners = _owners(parameters, model)
    if optimizer is not None:
        _check_held(parameters, optimizers)
    _check_free(parameters, owners)
    if not any(map(is_sharded, parameters.values())):
        refuse_lost_zeros(model, chosen)

    if result is not None and result.params is not None:
        _load(result, model, parameters)
    for _, module, leaf, _ in owners:
        _release(module, leaf)
    attachment = Attachment(model, [_placed(chosen[owner[0]], *owner) for owner in owners], by_hand=optimizer is None)
    _guard_all(model)
    attachment.mask_gradients()
    for each in optimizers:
        watch(each)
        zero_state(each)
        for _, mask in masked(each):
            mask.held = True
    return attachment


def _result(value: Any) -> Found:
    if isinstance(value, Found):
        return value
    raise MaskError(
        f"attach takes Masks or a result of prune, and got {type(value).__name__}; sapwood.Masks(mapping) makes masks "
        "of a mapping from parameter name to bool tensor."
    )


def _load(result: Found, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """The result's new weights."""
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            raise MaskError(
                f"The result has new weights, and {name!r} is sharded: call result.load_into(model) before "
                "fully_shard, then attach(result.masks, ...)."
            )
    result.load_into(model)


def _optimizers(given: Any) -> list[Any]:
    if given is None:
        return []
    optimizers = [given] if is_optimizer(given) or not isinstance(given, Iterable) else list(given)
    for each in optimizers:
        if not is_optimizer(each):
            raise MaskError(
                f"attach takes optimizers, which have param_groups and step(), and got {type(each).__name__}; where "
                "weights are updated by hand, pass None."
            )
    return optimizers


Owner = tuple[str, nn.Module, str, nn.Parameter]


def _owners(parameters: Mapping[str, nn.Parameter], model: nn.Module) -> list[Owner]:
    """Name, module, attribute and tensor of every masked parameter, a tied one wherever it is."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [
        (names[id(parameter)], module, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if id(parameter) in names and parameter is not None
    ]


def _placed(mask: Any, name: str, module: nn.Module, leaf: str, parameter: nn.Parameter) -> Place:
    guard = guard_of(module)
    if guard is None:
        guard = Guard()
        guard.install(module)
    before = carried(parameter)  # a tied parameter has one mask in all its places
    entry = guard.entries[leaf] = Entry(Pruned(name, mask) if before is None else before.pruned, parameter)
    return Place(name, module, leaf, entry, parameter)


def _release(module: nn.Module, leaf: str) -> None:
    """Ends an attachment's hold on one parameter."""
    guard = guard_of(module)
    if guard is not None and leaf in guard.entries:
        guard.entries.pop(leaf).release()


def _guard_all(model: nn.Module) -> None:
    """A guard on every module that has a guarded one below: each may be called alone."""
    for module in model.modules():
        if guard_of(module) is None and any(True for _ in guards(module)):
            Guard().install(module)


def _check_held(parameters: Mapping[str, nn.Parameter], optimizers: list[Any]) -> None:
    """Every trainable masked parameter must be in some optimizer."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    orphans = [name for name, p in parameters.items() if p.requires_grad and id(p) not in held]
    if orphans:
        raise MaskError(
            f"{len(orphans)} masked parameters that require grad are in no optimizer given to attach, {orphans[0]!r} "
            "first; build the optimizer from this model's parameters, after fully_shard or any other call that "
            "replaces them, and pass every optimizer."
        )


def _check_free(parameters: Mapping[str, nn.Parameter], owners: list[Owner]) -> None:
    """Every masked parameter can carry a mask, and carries none for a module outside of this model."""
    inside = set[int]()
    for _, module, leaf, _ in owners:
        guard = guard_of(module)
        if guard is not None and leaf in guard.entries:
            inside.add(id(guard.entries[leaf].pruned))

    for name, parameter in parameters.items():
        mask = carried(parameter)
        if mask is not None and id(mask.pruned) not in inside:
            raise MaskError(
                f"Parameter {name!r} is shared with another model, which is attached to masks: remove() that "
                "attachment first."
            )
        if parameter.is_inference() or not (parameter.is_floating_point() or parameter.is_complex()):
            kind = "was made in inference mode" if parameter.is_inference() else f"is of dtype {parameter.dtype}"
            raise MaskError(
                f"Parameter {name!r} {kind} and cannot be trained under a mask; attach needs ordinary floating-point "
                "parameters (result.load_into(model) zeroes pruned weights once)."
            )
