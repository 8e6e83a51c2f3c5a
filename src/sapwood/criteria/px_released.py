"""Path eXclusion as the authors' code computes it, which on networks with BatchNorm is not its formula (see `px`).

R = sum over samples n and outputs k of z1[n, k] z2[n, k], and S_j = |sum over batches of dR/d(w_j^2)| w_j^2, with

* z1: the squared inputs through a network whose parameters are all one, whose rectifiers have the gates that they have
  in the real network (eval mode) on x; a constant;
* z2: as many inputs of ones through the network of squared parameters, all rectifiers open.

Both run in train mode, so that BatchNorm normalises and centres with batch statistics, which makes the sum of p dR/dp
over every filter zero: R is no sum over paths. In both, BatchNorm's parameters keep their values, and so does the last
linear layer, if it is spared: its weights enter signed and unsquared. Biases are ones and squares like other
parameters.

In the authors' code what keeps its values has "bn" or "fc" in its name, as BatchNorms and classifiers of the authors'
networks have; here they are found by looking, so that the BatchNorm of a shortcut called otherwise keeps its own too.
Rectifiers are calls of ReLU, as there; other functions are left as they are. In float64 (there: float32).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sapwood.batches import Batch, Data, filled
from sapwood.errors import UnsupportedModelError
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks

RELU = frozenset((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_))


class _Gates(TorchFunctionMode):
    """A context that notes where rectifiers are open, or, given gates, multiplies by these instead."""

    def __init__(self, given: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.given = None if given is None else iter(given)
        self.noted: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes or multiplies; makes all other calls.

        Raises:
            UnsupportedModelError: the pass does not call the same rectifiers on the same shapes as the noted one.
        """
        kwargs = kwargs or {}
        if func not in RELU:
            return func(*args, **kwargs)
        value = args[0] if args else kwargs["input"]
        if self.given is None:
            self.noted.append(value.detach() > 0)  # now: the call may be in place
            return func(*args, **kwargs)
        gate = next(self.given, None)
        if gate is None or gate.shape != value.shape:
            raise UnsupportedModelError(
                "The model does not call the same rectifiers whatever its weights are (does its forward depend on "
                "values?), so that paths cannot be followed through it; synflow-l2 needs no activations."
            )
        return value * gate


class _Layers(TorchFunctionMode):
    """A context that notes the tensors which BatchNorms, and the linear layer called last, are given."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[Any] = []
        self.last: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes them and makes the call."""
        given = [*args, *(kwargs or {}).values()]
        if func is F.batch_norm:
            self.norms += given
        elif func is F.linear:
            self.last = given
        return func(*args, **(kwargs or {}))


def released_scores(net: FunctionalModel, masks: Masks, data: Data, *, spare_classifier: bool) -> Params:
    """The scores; pruned weights get 0 through the mask.

    Args:
        net: The model.
        masks: Masks of its weights.
        data: Inputs.
        spare_classifier: The last linear layer keeps its values in both auxiliary networks.
    """
    batches = data.inputs()
    spared = _spared(net, batches[0], spare_classifier)
    ones, squares = (_auxiliary(net, masks, value, spared) for value in (torch.ones_like, torch.square))
    total = {name: torch.zeros_like(squares[name]) for name in net.prunable}
    for batch in batches:
        leaves = {name: squares[name].detach().requires_grad_() for name in net.prunable}
        gates = _gates(net, masks, batch)
        with torch.no_grad(), _Gates(gates):
            paths = net.outputs(ones, filled(batch, torch.square, data.draw), buffers=_buffers(net), train=True)
        with _Gates([torch.ones_like(gate) for gate in gates]):
            start = filled(batch, torch.ones_like, data.draw)
            values = net.outputs({**squares, **leaves}, start, buffers=_buffers(net), train=True)
        for name, gradient in net.differentiate((paths * values).sum(), leaves).items():
            total[name] += gradient
    squared = masks.apply({name: weight.double().square() for name, weight in net.weights.items()})
    return {name: squared[name] * gradient.abs() for name, gradient in net.summed(total).items()}


def _gates(net: FunctionalModel, masks: Masks, batch: Batch) -> list[Tensor]:
    """Which rectifiers are open in the real network."""
    gates = _Gates()
    with torch.no_grad(), gates:
        net.outputs(masks.apply(net.weights), batch)
    return gates.noted


def _spared(net: FunctionalModel, batch: Batch, spare_classifier: bool) -> set[str]:
    """Names of the parameters that keep their values."""
    with torch.no_grad(), _Layers() as layers:
        net.outputs(net.params, batch)
    kept = layers.norms + (layers.last if spare_classifier else [])
    pointers = {tensor.data_ptr() for tensor in kept if isinstance(tensor, Tensor)}
    return {name for name, parameter in net.params.items() if parameter.data_ptr() in pointers}


def _auxiliary(net: FunctionalModel, masks: Masks, value: Callable[[Tensor], Tensor], spared: set[str]) -> Params:
    """All parameters in float64, under the masks: their own if spared, else `value` of them."""
    params = {
        name: p.double() if name in spared else value(p.double())
        for name, p in net.params.items()
        if p.is_floating_point()
    }
    return masks.apply(params)


def _buffers(net: FunctionalModel) -> Params:
    return {name: b.double() if b.is_floating_point() else b for name, b in net.own_buffers().items()}
