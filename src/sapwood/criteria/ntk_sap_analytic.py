r"""NTK-SAP in closed form: the expectation of its score by moment propagation, times the noise that it needs.

Formula: S(m_j) = |dF / dm_j| x noise_j, where F(m) = E |f(z; w*m) - f(z; (w+dw)*m)|^2 / epsilon is what the published
estimator (`sapwood.criteria.ntk_sap`; Wang, Li, Sun, ICLR 2023, eq. 10) averages over weights w ~ N(0, 2 / fan-in),
inputs z ~ N(0, 1) and perturbations dw ~ N(0, epsilon). Here the expectation is taken layer by layer
(`sapwood.moments`) instead of by drawing: one forward and one backward pass of a deterministic network of second
moments. In the limit of epsilon to 0, F is E |df/dw|_F^2, the expected trace of the neural tangent kernel.

**The noise is part of the method.** Inside a layer of a dense network the expected scores are tied, and a global
threshold would take whole layers at once. The published estimator breaks the ties with its sampling noise; here a
random factor does, drawn anew in every round.

Modes: *faithful* (the default) follows the published epsilon and multiplies by chi-square noise, which is about what
five draws of the published estimator have; *low-noise* is `epsilon=0, noise="lognormal"`; *flat* is
`positions="flat"`, which takes all positions of a map as alike: borders, and so differences between the taps of a
kernel, disappear.

Weight-agnostic: the model's weights play no part. Biases, embeddings and other parameters that are not layer weights
keep their values and norms have scale 1 and shift 0, as in `NtkSap`; excluded layers have fresh weights, but are
neither masked nor perturbed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.batches import Data
from sapwood.errors import ConfigError, DataError, SapwoodWarning, UnsupportedModelError, unknown_name
from sapwood.fresh import reset_norms
from sapwood.functional import FunctionalModel, Params
from sapwood.masks import Masks
from sapwood.moments import Weight, propagate, traced

NOISES = ("chi2", "lognormal")
POSITIONS = ("full", "flat")


@dataclass(frozen=True)
class NtkSapAnalytic:
    """The closed form of `NtkSap`'s score.

    Attributes:
        noise: Factor on every score, drawn anew in every round: "chi2" (the square of a standard normal) or "lognormal"
            (the exponential of `strength` times one).
        strength: Standard deviation of the logarithm of "lognormal" noise, above 0; "chi2" has no strength.
        positions: "full" follows every position of a map; "flat" takes them as alike.
        epsilon: Variance of the weight perturbation; 0 is the limit.
        average_taps: Average the scores over the kept taps of every pair of channels, so that no tap is preferred.
    """

    noise: str = "chi2"
    strength: float = 0.5
    positions: str = "full"
    epsilon: float = 1e-4
    average_taps: bool = False
    needs_data = False

    def __post_init__(self) -> None:
        if self.noise not in NOISES:
            raise unknown_name("noise", self.noise, NOISES)
        if self.positions not in POSITIONS:
            raise unknown_name("positions", self.positions, POSITIONS)
        if not self.strength > 0:
            raise ConfigError(
                f"strength is {self.strength}; it must be above 0: without noise the scores inside a layer are tied, "
                "and whole layers would be pruned at once."
            )
        if not self.epsilon >= 0:
            raise ConfigError(f"epsilon is {self.epsilon}; it must be 0 (the limit) or above.")

    def __call__(self, net: FunctionalModel, masks: Masks, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores every weight; pruned ones get 0."""
        scores = self.expected(net, masks, data)
        for name, score in scores.items():
            if self.average_taps and score.dim() > 2:
                score = _tap_average(score, masks[name])
            normal = torch.randn(score.shape, generator=generator, device=score.device, dtype=score.dtype)
            scores[name] = score * (normal.square() if self.noise == "chi2" else (self.strength * normal).exp())
        return scores

    def expected(self, net: FunctionalModel, masks: Masks, data: Data) -> Params:
        """The expected scores |dF / dm|, without noise."""
        return {name: gradient.abs() for name, gradient in self.gradient(net, masks, data).items()}

    def gradient(self, net: FunctionalModel, masks: Masks, data: Data) -> Params:
        """DF / dm, signed, for one sample and over epsilon.

        Raises:
            UnsupportedModelError: the network cannot be traced, has an operation without a moment rule, or has prunable
                parameters that are not layer weights.
        """
        if masks.kept == masks.total:  # the first round
            _warn_if_trained(net)
        _refuse_rewritten(net)
        trace = traced(net, _sample_shape(data))
        leaves = {name: masks[name].to(net.dtype).requires_grad_() for name in net.prunable}
        output = propagate(
            trace, weights(net, leaves, self.epsilon), constants(net), epsilon=self.epsilon,
            flat=self.positions == "flat",
        )  # fmt: skip
        assert output.td is not None
        full = output.td.expand(output.shape).sum()
        return net.differentiate(full, leaves)


def _warn_if_trained(net: FunctionalModel) -> None:
    trained = [
        name
        for name, buffer in net.buffers.items()
        if (name.endswith("num_batches_tracked") or name.endswith("running_mean")) and bool(buffer.any())
    ]
    if trained:
        warnings.warn(
            f"The model seems to be trained ({trained[0]!r} is not as a fresh one's): NTK-SAP's score draws fresh "
            "weights and ignores the trained ones; method='magnitude' looks at them.",
            SapwoodWarning,
            stacklevel=6,
        )


def weights(net: FunctionalModel, masks: Params, epsilon: float) -> dict[str, Weight]:
    """The layer weights under fresh draws: variance 2 / fan-in, masked and perturbed where they are prunable."""
    for name in net.prunable:
        if name not in net.fan_in:
            raise UnsupportedModelError(
                f"{name!r} is not the plain weight of a layer, for whose fresh draws the closed form has no moments: "
                'exclude it, or use method="ntk-sap" (Monte Carlo), which runs any model.'
            )
    found = {}
    for name, fan_in in net.fan_in.items():
        if name in masks:
            v = masks[name].square() * (2 / fan_in)
            found[name] = Weight(name, v, fan_in / 2, epsilon * fan_in / 2)
        else:
            v = torch.full_like(net.params[name], 2 / fan_in, dtype=net.dtype)
            found[name] = Weight(name, v, 0.0, 0.0)
    return found


def _refuse_rewritten(net: FunctionalModel) -> None:
    """Weights that are computed from others are not the fresh draws that the moments are of."""
    for name in net.fan_in:
        if "parametrizations" in name or name.endswith(("weight_orig", "weight_g", "weight_v")):
            raise UnsupportedModelError(
                f"{name!r} is under a parametrization (spectral norm, weight norm), which the closed form has no "
                'moments for: remove it, or use method="ntk-sap" (Monte Carlo), which runs any model.'
            )


def constants(net: FunctionalModel) -> Params:
    """Everything that is not a layer weight, with norms as a fresh network has them."""
    return {**net.params, **net.buffers, **reset_norms(net)}


def _sample_shape(data: Data) -> tuple[int, ...]:
    template = data.templates()[0]
    if not isinstance(template, Tensor) or not template.is_floating_point():
        raise UnsupportedModelError(
            "The closed form needs one tensor of numbers as the model's input (input_shape=(3, 32, 32)), not token ids "
            'or a mapping: use method="ntk-sap" (Monte Carlo), which runs any model.'
        )
    if template.dim() < 2:
        raise DataError(f"A batch has shape {tuple(template.shape)}; a batch axis and at least one more were expected.")
    return tuple(template.shape[1:])


def _tap_average(score: Tensor, mask: Tensor) -> Tensor:
    taps = tuple(range(2, score.dim()))
    kept = mask.to(score.dtype)
    mean = (score * kept).sum(taps, keepdim=True) / kept.sum(taps, keepdim=True).clamp_min(1)
    return mean * kept
