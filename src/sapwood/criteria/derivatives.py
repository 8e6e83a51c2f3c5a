"""Derivatives that several criteria need: second ones, and those of single samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sapwood.batches import Batch, inputs_of
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks
from sapwood.witness import look_at_second_derivatives
from sapwood.witness.rows import single


@contextmanager
def plain_kernels(net: FunctionalModel) -> Iterator[None]:
    """Fused attention kernels, and cuDNN's recurrent ones, have no second derivative; the plain ones do."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in net.module.modules())
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=not recurrent):
        yield


@contextmanager
def twice_differentiable(net: FunctionalModel, batch: Batch, *, temperature: float = 1.0) -> Iterator[None]:
    """Plain kernels, and second derivatives that were seen to be right.

    Args:
        net: The model.
        batch: A batch, on one sample of which its second derivatives are looked at.
        temperature: What logits are divided by before the loss.

    Raises:
        UnsupportedModelError: they are not what autograd says (see `look_at_second_derivatives`).
    """
    with plain_kernels(net):
        look_at_second_derivatives(net, batch, temperature)
        yield


def sample_losses(
    net: FunctionalModel, masks: Masks, batch: Batch, *, batch_statistics: bool
) -> Iterator[Callable[[Params], Tensor]]:
    """The loss of each sample as a function of effective weights, one sample after another.

    Args:
        net: The model.
        masks: Masks of the effective weights.
        batch: A labelled batch.
        batch_statistics: BatchNorm is held at the statistics of the whole batch (else at the running ones): a single
            sample has none of its own.
    """
    effective = {name: weight.detach() for name, weight in net.leaves(masks).items()}
    buffers = net.calibrated(effective, inputs_of(batch)) if batch_statistics else None
    for sample in single(net, batch):
        yield lambda params, sample=sample: net.loss(params, sample, train=False, buffers=buffers)  # type: ignore[misc]


def sample_gradients(net: FunctionalModel, masks: Masks, batch: Batch, *, batch_statistics: bool) -> Iterator[Params]:
    """Gradient of the loss of each sample with respect to the effective weights, one sample after another.

    One forward and backward pass a sample, and the memory of one; `torch.func.vmap` would be faster, and fails on
    models with data-dependent control flow. Arguments as for `sample_losses`.
    """
    for loss in sample_losses(net, masks, batch, batch_statistics=batch_statistics):
        leaves = net.leaves(masks)
        yield net.differentiate(loss(leaves), leaves)
