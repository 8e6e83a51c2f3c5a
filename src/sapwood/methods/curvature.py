"""Inverse curvature of the loss with respect to the kept weights, in diagonal blocks, for Optimal Brain Surgeon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sapwood.batches import Batch, Data
from sapwood.criteria.derivatives import sample_gradients, twice_differentiable
from sapwood.errors import ScoreError
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks
from sapwood.witness.rows import single


def inverse_fisher(net: FunctionalModel, masks: Masks, data: Data, width: int, damping: float) -> Tensor:
    """Diagonal blocks of ((1/N) sum_n g_n g_n' + damping I)^-1, one rank-one update a sample."""
    batches = data.labelled()
    count = sum(len(list(single(net, batch))) for batch in batches)
    blocks = math.ceil(masks.total / width)
    inverse = torch.eye(width, dtype=torch.float64, device=net.device).div(damping).repeat(blocks, 1, 1)
    for batch in batches:
        for found in sample_gradients(net, masks, batch, batch_statistics=False):
            gradient = in_blocks(masks.apply(found), width).unsqueeze(-1)
            along = inverse @ gradient
            scale = count + (gradient * along).sum(1, keepdim=True)
            inverse.baddbmm_(along / scale, along.mT, alpha=-1)
    return inverse


def hessian(net: FunctionalModel, masks: Masks, data: Data) -> Tensor:
    """Of the mean loss with respect to the kept weights, float64; pruned weights have the rows and columns of I."""
    batches = data.labelled()
    with twice_differentiable(net, batches[0]):
        return _hessian(net, masks, batches)


def _hessian(net: FunctionalModel, masks: Masks, batches: Sequence[Batch]) -> Tensor:
    leaves = net.leaves(masks)
    counted = tuple(net.counted(batches))
    loss = torch.stack([net.loss(leaves, batch, train=False) * count for batch, count in counted]).sum()
    slope = net.differentiate(loss / sum(count for _, count in counted), leaves, create_graph=True)
    entries = torch.cat([part.flatten() for part in slope.values()])
    kept = torch.cat([masks[name].flatten() for name in leaves])
    matrix = torch.eye(len(entries), dtype=torch.float64, device=net.device)
    for index in kept.nonzero().flatten().tolist() if entries.requires_grad else ():
        row = net.differentiate_again(entries[index], leaves)
        matrix[index] = torch.cat([part.flatten() for part in row.values()]).double() * kept
    return (matrix + matrix.mT) / 2


def inverted(matrix: Tensor, damping: float) -> Tensor:
    """The inverse of matrix + damping I, as one block.

    Raises:
        ScoreError: it is not positive definite.
    """
    damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        least = torch.linalg.eigvalsh(matrix)[0].item()
        raise ScoreError(
            f"The Hessian is not positive definite (least eigenvalue {least:.3g}), so the network is at no minimum: "
            f"train it first, set damping above {max(0.0, -least):.3g}, or take curvature='fisher'."
        )
    return torch.cholesky_inverse(factor).unsqueeze(0)


def in_blocks(tensors: Mapping[str, Tensor], width: int) -> Tensor:
    """All entries in one row, float64, cut into blocks and filled up with zeros (blocks, width)."""
    flat = torch.cat([tensor.flatten().double() for tensor in tensors.values()])
    return torch.nn.functional.pad(flat, (0, -len(flat) % width)).view(-1, width)


def by_name(blocks: Tensor, like: Params) -> Params:
    """What `in_blocks` took apart, in the shapes of `like`."""
    sizes = [tensor.numel() for tensor in like.values()]
    parts = torch.split(blocks.flatten()[: sum(sizes)], sizes)
    return {name: part.view_as(tensor) for (name, tensor), part in zip(like.items(), parts, strict=True)}
