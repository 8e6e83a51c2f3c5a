"""Is the closed form's score right for a network? Layer by layer against a small Monte-Carlo run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sapwood.batches import Data, filled, resized
from sapwood.criteria.ntk_sap import mask_gradient
from sapwood.criteria.ntk_sap_analytic import NtkSapAnalytic
from sapwood.errors import ConfigError
from sapwood.fresh import fresh_parameters, normal
from sapwood.functional import FunctionalModel, Params
from sapwood.isolation import device_of, isolated
from sapwood.masks import Masks
from sapwood.names import Names
from sapwood.prunable import Pattern
from sapwood.text import text_table
from sapwood.witness import opened

LIMIT = 0.25
"""Standard deviation of log(closed form / Monte Carlo) between layers up to which the allocation stands."""

Estimator = Callable[[FunctionalModel, Masks, Tensor, float, torch.Generator], Params]
"""`estimate(net, masks, inputs, epsilon, generator)`: the signed mask gradient of one draw, summed over its inputs and
not divided by epsilon."""


@dataclass(frozen=True)
class ScoreCheck:
    """How the closed form compares with Monte Carlo; printing it prints the table and the recommendation.

    Attributes:
        ratios: Closed form over Monte Carlo for every layer, by regression over its kept weights. NaN where the
            Monte-Carlo run gives no positive factor.
        errors: Relative standard error of every ratio, from the spread between draws.
        scatter: Mean size of one draw's scores over the mean of the closed form's, among a layer's kept weights; the
            median of the draws. Far above 1, as in most networks, the published estimator's few draws are nearly all
            noise; and where it differs between layers, that noise decides how many weights they keep.
        log_sd: Standard deviation between layers of the logarithm of the ratio; a common factor does not count.
        noise: What of `log_sd` the errors alone would give.
        draws: Weight draws of the Monte-Carlo run.
        seconds: Of the whole check.
    """

    ratios: dict[str, float]
    errors: dict[str, float]
    scatter: dict[str, float]
    log_sd: float
    noise: float
    draws: int
    seconds: float

    @property
    def trusted(self) -> bool:
        """Whether the closed form may stand in for Monte Carlo."""
        return self.log_sd <= LIMIT

    @property
    def recommendation(self) -> str:
        """One sentence."""
        if self.trusted:
            return f'The closed form fits this network (log-sd {self.log_sd:.2f} <= {LIMIT}): use "ntk-sap-analytic".'
        if self.noise > LIMIT / 2:
            return (
                f"Not decided: log-sd {self.log_sd:.2f}, of which the Monte-Carlo run's own noise is about "
                f'{self.noise:.2f}. Give more draws, or use method="ntk-sap".'
            )
        return f'The closed form is off on this network (log-sd {self.log_sd:.2f} > {LIMIT}): use method="ntk-sap".'

    def __str__(self) -> str:
        rows = [
            (name, "", f"{ratio:.3f}", f"{self.errors[name]:.1%}", f"{self.scatter[name]:.1f}")
            for name, ratio in self.ratios.items()
        ]  # fmt: skip
        table = text_table(("layer", "", "closed form / Monte Carlo", "standard error", "scatter of one draw"), rows)
        return f"{table}\n\n{self.draws} draws, {self.seconds:.1f} s. {self.recommendation}"


def check_score(  # noqa: PLR0913  # every argument but the model is a keyword
    model: nn.Module,
    input_shape: Iterable[int],
    *,
    masks: Masks | None = None,
    draws: int = 100,
    batch_size: int = 16,
    epsilon: float = 1e-4,
    seed: int = 0,
    include: Iterable[Pattern] | Pattern = (),
    exclude: Iterable[Pattern] | Pattern = (),
    estimator: Estimator | None = None,
) -> ScoreCheck:
    """Compares the closed form of NTK-SAP's score with a small Monte-Carlo run on a network of one's own.

    Args:
        model: The network; it is left as it is.
        input_shape: Shape of one sample without the batch.
        masks: Where to compare; default: the dense network. The closed form is worst at extreme sparsity.
        draws: Weight draws of the Monte-Carlo run. Its error falls with their root.
        batch_size: Inputs that share a draw. Few inputs bias BatchNorm's statistics, by one factor for all layers.
        epsilon: Variance of the perturbation, above 0.
        seed: Of all draws.
        include: As in `prune`.
        exclude: As in `prune`.
        estimator: Another Monte-Carlo estimator; default: the published finite difference, one draw at a time.

    Raises:
        UnsupportedModelError: the closed form has no rule for the network; the message names the operation.
        ConfigError: draws below 2, or epsilon not above 0.

    Example:
        >>> import torch, sapwood
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> sapwood.check_score(model, (8,)).trusted
        True
    """
    if draws < 2 or not epsilon > 0:
        raise ConfigError(f"draws is {draws} and epsilon {epsilon}; draws must be 2 or more, epsilon above 0.")
    begin = time.perf_counter()
    device = device_of(model)
    with isolated(seed, device):
        data = Data.collect(None, input_shape, device)
        net = opened(model, data, include=include, exclude=exclude)
        masks = Masks.dense(net.weights) if masks is None else Names.of(model).fit(masks.to(device), strict=False)
        masks.check(net.weights, strict=False)
        closed = NtkSapAnalytic(epsilon=epsilon).gradient(net, masks, data)
        generator = torch.Generator(net.device).manual_seed(seed)
        template = data.templates()[0]
        factors: dict[str, list[tuple[float, float]]] = {name: [] for name in net.prunable}
        for _ in range(draws):
            inputs = filled(resized(template, batch_size), lambda t: normal(t.to(net.device, net.dtype), generator))
            drawn = (estimator or finite_difference)(net, masks, inputs, epsilon, generator)
            for name, gradient in drawn.items():
                factors[name].append(_against(gradient / (batch_size * epsilon), closed[name], masks[name]))
    return _compared(factors, draws, time.perf_counter() - begin)


def finite_difference(
    net: FunctionalModel, masks: Masks, inputs: Tensor, epsilon: float, generator: torch.Generator
) -> Params:
    """The published estimator on one draw (`sapwood.criteria.ntk_sap`)."""
    params = fresh_parameters(net, generator)
    noise = {name: math.sqrt(epsilon) * normal(params[name], generator) for name in net.prunable}
    return mask_gradient(net, masks, params, noise, inputs)


def _against(drawn: Tensor, closed: Tensor, mask: Tensor) -> tuple[float, float]:
    """Over the kept weights: regression of the drawn gradient on the closed form's, and the ratio of their sizes."""
    expected, found = closed.double() * mask, drawn.double() * mask
    square, size = float(expected.square().sum()), float(expected.abs().sum())
    return (float((found * expected).sum()) / square, float(found.abs().sum()) / size) if square else (math.nan,) * 2


def _compared(factors: dict[str, list[tuple[float, float]]], draws: int, seconds: float) -> ScoreCheck:
    ratios, errors, scatter = {}, {}, {}
    for name, values in factors.items():
        sample, sizes = torch.tensor(values, dtype=torch.float64).T
        mean = float(sample.mean())
        ratios[name] = 1 / mean if mean > 0 else math.nan
        errors[name] = float(sample.std()) / math.sqrt(draws) / abs(mean) if mean else math.nan
        scatter[name] = float(sizes.quantile(0.5))
    logs = torch.tensor([math.log(ratio) if ratio > 0 else math.nan for ratio in ratios.values()])
    log_sd = float(logs.std(correction=0)) if bool(logs.isfinite().all()) else math.inf
    noise = math.sqrt(sum(error**2 for error in errors.values()) / len(errors))
    return ScoreCheck(ratios, errors, scatter, log_sd, noise, draws, seconds)
