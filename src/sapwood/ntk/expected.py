"""The expected kernel: the mean of the fixed-weight kernel over draws of the initial weights (Wang, Li, Sun 2023).

Its infinite-width limit is the analytic kernel, which a single draw only fluctuates around.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn

from sapwood.batches import Batch
from sapwood.errors import ConfigError
from sapwood.fresh import fresh_parameters
from sapwood.functional import FunctionalModel, Params
from sapwood.isolation import device_of, isolated
from sapwood.masks import Masks
from sapwood.ntk.gram import gram
from sapwood.ntk.options import Keywords
from sapwood.ntk.outputs import Outputs, Parameters

Initialise = Callable[[FunctionalModel, torch.Generator], Params]


@dataclass(frozen=True)
class Expected:
    """A running mean of kernels.

    Attributes:
        mean: (N, N), float64.
        error: Standard error of every entry, (N, N); NaN for a single draw.
        draws: Number of draws.
    """

    mean: Tensor
    error: Tensor
    draws: int


def expected_kernel(
    model: nn.Module,
    x: Batch,
    masks: Masks | None = None,
    parameters: Parameters = None,
    *,
    draws: int = 5,
    seed: int = 0,
    initialise: Initialise = fresh_parameters,
    on_draw: Callable[[int], None] = lambda index: None,
    **options: Unpack[Keywords],
) -> Expected:
    """Mean of `kernel` over fresh draws of the weights, masks and inputs fixed.

    Args:
        model: See `kernel`, as all that is not named here.
        x: Inputs.
        masks: Masks.
        parameters: Named parameters.
        draws: Number of draws R.
        seed: Of the draws; the same seed gives networks of one architecture the same weights under all masks.
        initialise: `initialise(net, generator)` returns all parameters of a draw; the default draws every layer weight
            from N(0, 2 / fan-in), resets norms and keeps the rest.
        on_draw: Called after every draw with its number, from 1.
        **options: See `Options`.

    Raises:
        ConfigError: `draws` is below 1, and what `kernel` raises.
    """
    if draws < 1:
        raise ConfigError(f"draws is {draws}; at least one draw of the weights is needed.")
    with isolated(seed, device_of(model)):
        outputs = Outputs.of(model, x, masks, parameters, **options)
        generator = torch.Generator(outputs.net.device).manual_seed(seed)
        mean = torch.zeros(outputs.size, outputs.size, dtype=torch.float64, device=outputs.net.device)
        squares = torch.zeros_like(mean)
        for index in range(1, draws + 1):
            found = gram(outputs.at(initialise(outputs.net, generator), masks))
            change = found - mean
            mean += change / index
            squares += change * (found - mean)  # Welford's sum of squared deviations
            on_draw(index)
        spread = squares / (draws - 1) if draws > 1 else torch.full_like(squares, torch.nan)
        return Expected(mean, (spread / draws).sqrt(), draws)
