"""Products with the kernel that never form it: J^T v by reverse mode, then J (J^T v) by forward mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor, nn

from sapwood.batches import Batch
from sapwood.errors import DataError, UnsupportedModelError
from sapwood.functional import Params, differentiating
from sapwood.isolation import device_of, isolated
from sapwood.masks import Masks
from sapwood.ntk.options import Keywords
from sapwood.ntk.outputs import Column, Outputs, Parameters, Piece

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped]

SAFETY = 3  # a graph's memory in terms of what it saves: gradients and temporaries besides


@dataclass(frozen=True)
class Products:
    """The kernel as something to multiply with: `products(...) @ v` for v of shape (N,) or (N, m).

    Attributes:
        outputs: What it is the kernel of.
        step: Samples that go through the network at a time, where they are independent.
    """

    outputs: Outputs
    step: int = field(default=1)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""
        return self.outputs.size, self.outputs.size

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """K v, in the derivatives' precision.

        Raises:
            DataError: the vectors are not N long.
        """
        if vectors.dim() not in (1, 2) or len(vectors) != self.outputs.size:
            raise DataError(
                f"A kernel of {self.outputs.size} outputs multiplies vectors of that length, (N,) or (N, m); "
                f"{tuple(vectors.shape)} came."
            )
        with isolated(0, self.outputs.net.device):
            if vectors.dim() == 1:
                return self.push(self.pull(vectors))
            return torch.stack([self.push(self.pull(v)) for v in vectors.unbind(1)], dim=1)

    def pull(self, vector: Tensor) -> list[Tensor]:
        """J^T v: one tensor a named parameter, without masked entries; call it under `isolated`."""
        outputs = self.outputs
        vector = vector.to(outputs.net.device, outputs.dtype)
        total = [vector.new_zeros(column.width) for column in outputs.columns]
        for piece in outputs.pieces(self.step):
            leaves = outputs.leaves()
            values = outputs.forward(leaves, piece)
            part = vector[piece.start : piece.start + len(values)]
            with differentiating():
                gradients = torch.autograd.grad(values, list(leaves.values()), part, materialize_grads=True)
            for into, column, gradient in zip(total, outputs.columns, gradients, strict=True):
                into += _gathered(column, gradient)
        return total

    def push(self, direction: list[Tensor]) -> Tensor:
        """J w for w as `pull` returns it: (N,); call it under `isolated`."""
        outputs = self.outputs
        tangents = {
            column.name: _scattered(column, part, outputs.params[column.name])
            for column, part in zip(outputs.columns, direction, strict=True)
        }
        return torch.cat([_forward_derivative(outputs, piece, tangents) for piece in outputs.pieces(self.step)])

    def linear_operator(self) -> LinearOperator:
        """The same for scipy, on float64 numpy vectors."""
        from scipy.sparse.linalg import LinearOperator  # here, because scipy takes a while to import

        def multiply(vector: object) -> object:
            return (self @ torch.as_tensor(vector).flatten()).double().cpu().numpy()

        return LinearOperator(self.shape, matvec=multiply, dtype="float64")


def products(
    model: nn.Module,
    x: Batch,
    masks: Masks | None = None,
    parameters: Parameters = None,
    **options: Unpack[Keywords],
) -> Products:
    """The kernel of `sapwood.ntk.kernel` in product form, for outputs so many that the matrix has no room.

    A product costs a forward and a backward pass over the inputs, and a forward pass with derivatives. The model's
    weights are referenced, not copied: the products are those of the weights at the time.

    Args, errors: see `kernel`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> (products(model, torch.tensor([[1.0, 2.0], [0.0, 1.0]])) @ torch.tensor([1.0, 0.0])).tolist()
        [5.0, 2.0]
    """
    with isolated(0, device_of(model)):
        outputs = Outputs.of(model, x, masks, parameters, **options)
        return Products(outputs, _samples_at_once(outputs))


def of_outputs(outputs: Outputs) -> Products:
    """Products of outputs that are read already; call it under `isolated`."""
    return Products(outputs, _samples_at_once(outputs))


def _samples_at_once(outputs: Outputs) -> int:
    if not outputs.independent:
        return outputs.samples
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs.forward(outputs.leaves(), next(outputs.pieces(1)))
    return max(1, min(outputs.samples, outputs.options.memory // (SAFETY * max(1, sum(saved)))))


def _gathered(column: Column, gradient: Tensor) -> Tensor:
    flat = gradient.flatten()
    return (flat if column.kept is None else flat[column.kept]) * column.scale


def _scattered(column: Column, part: Tensor, like: Tensor) -> Tensor:
    if column.kept is None:
        return (part * column.scale).view_as(like)
    flat = torch.zeros(like.numel(), dtype=part.dtype, device=part.device)
    flat[column.kept] = part * column.scale
    return flat.view_as(like)


def _forward_derivative(outputs: Outputs, piece: Piece, tangents: Params) -> Tensor:
    def at(leaves: Params) -> Tensor:
        return outputs.forward(leaves, piece)

    leaves = {name: outputs.params[name].detach() for name in outputs.names}
    try:
        derivative: Tensor = torch.func.jvp(at, (leaves,), (tangents,))[1]
    except UnsupportedModelError:  # an operation without a forward-mode rule, such as a fused recurrent cell
        derivative = _by_double_backward(at, outputs.leaves(), tangents)
    return derivative.detach()


def _by_double_backward(at: Callable[[Params], Tensor], leaves: Params, tangents: Params) -> Tensor:
    """J w as the derivative of <J^T u, w> with respect to u, which reverse mode can do alone."""
    values = at(leaves)
    probe = torch.zeros_like(values, requires_grad=True)
    wanted = list(leaves.values())
    with differentiating():
        gradients = torch.autograd.grad(values, wanted, probe, create_graph=True, materialize_grads=True)
        inner = torch.stack([(g * tangents[name]).sum() for name, g in zip(leaves, gradients, strict=True)]).sum()
        return torch.autograd.grad(inner, probe)[0]
