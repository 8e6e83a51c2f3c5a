"""Where masked weights arrive in a forward pass, and whether their zeros are still zeros there.

A mask promises that a connection is gone. That holds only if the weight that a layer multiplies by is zero wherever
its parameter is: weight standardisation, orthogonal and low-rank parametrizations, weights to which something is added
all break it. Nothing in a module's class says so; the pass itself does. `Applied` follows every masked parameter
through the torch functions that are called on it, up to the one that brings it together with something else: a linear
map, a convolution, a recurrent or attention kernel, a product of matrices, or any function of an activation.

On the way a tensor is a *form* of the parameters that it was computed from as long as it has as many entries as they
have (a transpose, a standardised weight, three projections in one) or is a part cut out of such a tensor. What is
smaller otherwise is a statistic (a norm, a mean, a scale): zeros need not be zeros in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sapwood.errors import UnsupportedModelError, ZerosLostError

WEIGHT_SECOND = frozenset((
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.embedding,
))  # fmt: skip
"""Functions `f(input, weight, ...)`: a form in another place than the second is an input here, not a weight."""

PRODUCTS = frozenset((
    "addbmm", "addmm", "addmv", "baddbmm", "bilinear", "bmm", "chain_matmul", "dot", "einsum", "embedding_bag",
    "fft_fft", "fft_fft2", "fft_fftn", "fft_rfft", "fft_rfft2", "fft_rfftn", "gru", "gru_cell", "inner", "kron",
    "lstm", "lstm_cell", "matmul", "__matmul__", "__rmatmul__", "mm", "multi_head_attention_forward",
    "multi_dot", "mv", "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell", "tensordot", "vdot",
))  # fmt: skip
"""Functions that sum products: with them a form ends, whatever stands beside it."""

CUTS = frozenset(("__getitem__", "gather", "index_select", "masked_select", "narrow_copy", "take", "take_along_dim"))
"""Functions that cut a part out of a tensor into memory of its own; those that return views are seen by that."""


@dataclass(eq=False)
class Applied(TorchFunctionMode):
    """A context that watches one pass of a model under masks.

    Attributes:
        weights: The masked parameters as the pass gets them, by name.
        pruned: True where they are pruned, by name.
        inputs: The tensors that the model is called with.
        users: Names of the user's own tensors, by id: none of them may be seen here.
        seen: Names of the masked parameters that arrived somewhere.
    """

    weights: Mapping[str, Tensor]
    pruned: Mapping[str, Tensor]
    inputs: Iterable[Tensor]
    users: Mapping[int, str]
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self._forms = {id(weight): frozenset((name,)) for name, weight in self.weights.items()}
        self._activations = {id(tensor) for tensor in self.inputs}
        self._versions = {name: weight._version for name, weight in self.weights.items()}
        # As long as they live, nobody else has their ids.
        self._alive: list[Any] = [*self.weights.values(), *self.inputs]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Makes the call, and notes what comes out of it.

        Raises:
            ZerosLostError: a weight arrives whose zeros are gone.
            UnsupportedModelError: the call is on a tensor of the user's.
        """
        kwargs = kwargs or {}
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._refuse_users(operands)

        forms = [tensor for tensor in operands if id(tensor) in self._forms]
        activated = any(id(tensor) in self._activations for tensor in operands)
        if not forms and not activated:
            return func(*args, **kwargs)

        ends = activated or func in WEIGHT_SECOND or _name(func) in PRODUCTS
        arriving = {id(tensor): (tensor, self._zeros_lost(tensor)) for tensor in forms if ends}
        versions = [tensor._version for tensor in operands]
        result = func(*args, **kwargs)
        written = [t for t, version in zip(operands, versions, strict=True) if t._version != version]
        outcomes = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)] + written

        if outcomes:
            self._arrive(func, args, kwargs, arriving)
            self._note(func, outcomes, forms, activated, ends)
        return result

    def _refuse_users(self, operands: list[Tensor]) -> None:
        for tensor in operands:
            if (name := self.users.get(id(tensor))) is not None:
                raise UnsupportedModelError(
                    f"The model's forward runs on its own {name!r} and not on the copy that is scored: a closure, a "
                    "hook, a weak reference or a replaced forward holds the original layer. Have the layer reach its "
                    "weights through self, or take the wrapper (checkpointing, profiling, a patch) off before pruning."
                )

    def _arrive(self, func: Any, args: Any, kwargs: Any, arriving: Mapping[int, tuple[Tensor, str]]) -> None:
        """Notes which parameters have arrived, and refuses those whose zeros were lost on the way."""
        if func in WEIGHT_SECOND:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            arriving = {key: value for key, value in arriving.items() if key == id(weight)}

        for tensor, lost in arriving.values():
            if lost:
                empty = "it divides by the norm of a unit, 0/0 where none of its weights is left (weight_norm)"
                other = "it is computed from the parameter (standardised, parametrized, added to, quantised)"
                raise ZerosLostError(
                    f"Zeros in the parameter {lost!r} are no zeros in the weight that {_name(func)} applies: "
                    f"{empty if bool(tensor.isnan().any()) else other}. Replace the layer by a plain one, remove the "
                    f"parametrization, or leave it dense with exclude=({lost!r},)."
                )
            self.seen |= self._forms[id(tensor)]

    def _note(self, func: Any, outcomes: list[Tensor], forms: list[Tensor], activated: bool, ends: bool) -> None:
        """What has an activation in it is one; what is as large as the forms that it comes from is one of theirs."""
        names = frozenset().union(*(self._forms[id(tensor)] for tensor in forms))
        for tensor in outcomes:
            self._alive.append(tensor)
            if activated:
                self._activations.add(id(tensor))
                self._forms.pop(id(tensor), None)
            elif not ends and _is_form(func, tensor, forms):
                self._forms[id(tensor)] = names | self._forms.get(id(tensor), frozenset())

    def _zeros_lost(self, tensor: Tensor) -> str:
        """The parameter whose pruned entries are not zero in this form of it, or ""."""
        names = self._forms[id(tensor)]
        tensor = tensor.detach().to_dense()
        if any(_is_view(tensor, self.weights[name], self._versions[name]) for name in names):
            return ""

        zero = tensor == 0
        placed = {name: list(_placements(self.pruned[name], tensor)) for name in names}
        for name, placements in placed.items():
            kept = any(bool((zero | ~pruned).all()) for pruned in placements)
            if placements and not kept and not _rearranged(tensor, self.weights[name]):
                return name

        return "" if any(placed.values()) else self._zeros_missing(zero, names)

    def _zeros_missing(self, zero: Tensor, names: frozenset[str]) -> str:
        """The same where entries have changed places or were joined with others: by the number of zeros."""
        pruned = sum(int(self.pruned[name].sum()) for name in names)
        total = sum(self.pruned[name].numel() for name in names)
        zeros = int(zero.sum())
        enough = zeros >= pruned if zero.numel() >= total else zeros * total >= 0.25 * pruned * zero.numel()
        return "" if enough else min(names)


def _is_view(tensor: Tensor, weight: Tensor, version: int) -> bool:
    """Whether a tensor is memory of a weight that nobody has written into."""
    same = tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    return same and weight._version == version and tensor.dtype == weight.dtype


def _placements(pruned: Tensor, tensor: Tensor) -> Iterator[Tensor]:
    """The pruned entries of a parameter in a tensor of its shape, its axes in any order, or spread over more of them.

    Of a square weight, the shape does not say whether it was transposed.
    """
    orders = itertools.permutations(range(pruned.dim())) if pruned.dim() == tensor.dim() else ()
    for order in orders:
        moved = pruned.permute(order)
        if all(size in (1, whole) for size, whole in zip(moved.shape, tensor.shape, strict=True)):
            yield moved.expand(tensor.shape)


def _rearranged(tensor: Tensor, weight: Tensor) -> bool:
    """Whether a tensor has the entries of a weight, in another order (flipped, rolled, shuffled)."""
    if tensor.numel() != weight.numel():
        return False
    one, other = (values.detach().flatten().sort().values for values in (tensor, weight))
    return torch.equal(one, other)


def _is_form(func: Any, tensor: Tensor, forms: list[Tensor]) -> bool:
    if tensor.numel() >= max(form.numel() for form in forms) or _name(func) in CUTS:
        return True
    memory = tensor.untyped_storage().data_ptr()
    return any(form.untyped_storage().data_ptr() == memory for form in forms)


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))
