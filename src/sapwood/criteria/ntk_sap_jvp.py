r"""NTK-SAP with exact directional derivatives: the limit of the published score (Wang, Li, Sun 2023) as epsilon -> 0.

Formula: S(m_j) = | d/dm_j  sum_i || J(z_i; w_i*m) (u_i*m) ||^2 |, J the Jacobian of the outputs with respect to the
effective weights, u_i ~ N(0, 1) a direction, w_i and z_i as in NTK-SAP. The expectation over u of the squared norm is
sum_j m_j^2 ||J_j||^2, the squared Frobenius norm of the mask-weighted Jacobian. J u comes from forward-mode
differentiation (`torch.func.jvp`) without a perturbed network; reverse mode then differentiates it in m.

**It is not the published score.** It targets epsilon -> 0, whereas the published variance, 1e-4, is not small: layer
sums there are up to twice (ResNet-20) or eight times (VGG-16) those of the limit. And it drops the terms of gate
crossings: where a perturbation moves a unit over its kink, finite differences see a change that no derivative at the
point has; second derivatives of ReLU, zero almost everywhere, are zero here.

BatchNorm normalises with the mean and unbiased variance of the mini-batch, as constants, in the one pass there is.

Cost: nine forward-equivalents a mini-batch (value 1, tangent 2, backward 6) against seven of NTK-SAP. The spread of a
weight's score is 1.3 to 2.2 times lower on ResNet-20, and small mini-batches serve as well as large ones: at 64 inputs
in all the relative error of layer sums is 1.05 to 1.25 with one draw of weights, 0.15 to 0.18 with four. So the
defaults draw 20 times 16 inputs a round, which takes about the time of the published 5 x 100. Below 16 inputs
BatchNorm's statistics are biased in networks that end in maps of 2x2 pixels.

Defaults: 20 exponential rounds, resamples = 20, samples = batch_size = 16.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sapwood.batches import Batch
from sapwood.criteria.monte_carlo import MonteCarlo, mask_leaves
from sapwood.errors import UnsupportedModelError
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks

FORWARD_MODE = ("forward AD", "not implemented", "setup_context", "jvp")
"""Words of PyTorch's errors where it has no directional derivative."""


@dataclass(frozen=True)
class NtkSapJvp(MonteCarlo):
    """The Monte-Carlo estimator of the limit epsilon -> 0.

    Raises:
        UnsupportedModelError: an operation of the model has no forward-mode derivative in PyTorch.
    """

    resamples: int = 20
    samples: int = 16
    batch_size: int = 16

    def mask_gradient(
        self, net: FunctionalModel, masks: Masks, params: Params, direction: Params, batch: Batch
    ) -> Params:
        """That of `squared_jvp`."""
        leaves = mask_leaves(net, masks, params)
        try:
            with _differentiable_kernels(net):
                return net.differentiate(squared_jvp(net, leaves, params, direction, batch), leaves)
        except torch.OutOfMemoryError:
            raise
        except (UnsupportedModelError, RuntimeError) as error:
            if not any(words in str(error) for words in FORWARD_MODE):
                raise
            raise UnsupportedModelError(
                f"PyTorch has no exact directional derivative of an operation of this model: {error}. "
                "Use method='ntk-sap', which takes finite differences."
            ) from error


def squared_jvp(net: FunctionalModel, masks: Params, params: Params, direction: Params, batch: Batch) -> Tensor:
    """|| J(z; w*m) (u*m) ||^2 summed over the batch and the outputs."""
    names = list(masks)

    def outputs(*effective: Tensor) -> Tensor:
        return net.calibrating({**params, **dict(zip(names, effective, strict=True))}, batch)

    weights, tangents = (tuple(of[name] * masks[name] for name in names) for of in (params, direction))
    return torch.func.jvp(outputs, weights, tangents)[1].square().sum()  # type: ignore[no-any-return]


def _differentiable_kernels(net: FunctionalModel) -> ExitStack:
    """The kernels that forward mode knows: plain attention; recurrent layers without oneDNN."""
    stack = ExitStack()
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    if any(isinstance(module, nn.RNNBase) for module in net.module.modules()):
        switch = partial(torch.backends.mkldnn.set_flags, _fp32_precision=None)  # `mkldnn.flags` warns on a CPU
        before, *_ = switch(_enabled=False)
        stack.callback(switch, _enabled=before)
    return stack
