"""The trace of the kernel: the squared Frobenius norm of the Jacobian, the kernel's nuclear norm.

Exact: the squares of the Jacobian's rows, a chunk at a time. Hutchinson (1990): E |J^T z|^2 for random signs z.
Hutch++ (Meyer, Musco, Musco and Woodruff 2021): exact on the range of a sketch K S, Hutchinson on the rest, whose trace
and variance are small where the spectrum decays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn

from sapwood.batches import Batch
from sapwood.errors import ConfigError, unknown_name
from sapwood.isolation import device_of, isolated
from sapwood.masks import Masks
from sapwood.ntk.jacobian import rows
from sapwood.ntk.options import Keywords
from sapwood.ntk.outputs import Outputs, Parameters
from sapwood.ntk.products import Products, of_outputs

METHODS = ("exact", "hutchinson", "hutch++")


@dataclass(frozen=True)
class Trace:
    """A trace, or an estimate of one.

    Attributes:
        value: The trace.
        error: Standard error of the estimate; 0 for the exact trace.
        by_layer: What each named parameter contributes; they add up to `value`.
        probes: Random vectors that were used; 0 for the exact trace.
    """

    value: float
    error: float
    by_layer: Mapping[str, float]
    probes: int

    @property
    def shares(self) -> dict[str, float]:
        """Share of every named parameter, 0 to 1."""
        return {name: part / self.value if self.value else 0.0 for name, part in self.by_layer.items()}


def trace(
    model: nn.Module,
    x: Batch,
    masks: Masks | None = None,
    parameters: Parameters = None,
    *,
    method: str = "exact",
    probes: int = 30,
    seed: int = 0,
    **options: Unpack[Keywords],
) -> Trace:
    """The trace of the kernel of `sapwood.ntk.kernel`, and the share of every layer, without forming the kernel.

    Args:
        model: See `kernel`, as all that is not named here.
        x: Inputs.
        masks: Masks.
        parameters: Named parameters.
        method: "exact" (N backward passes), "hutchinson" (`probes` passes) or "hutch++" (4/3 as many, less error).
        probes: Random vectors of an estimate; 2 or more, for Hutch++ 6 or more.
        seed: Of the random vectors.
        **options: See `Options`.

    Raises:
        ConfigError: an unknown method or too few probes, and what `kernel` raises.
    """
    if method not in METHODS:
        raise unknown_name("way to a trace", method, METHODS)
    least = {"exact": 0, "hutchinson": 2, "hutch++": 6}[method]
    if probes < least:
        raise ConfigError(f"probes is {probes}; {method!r} needs at least {least} for an error bar.")
    with isolated(0, device_of(model)):
        outputs = Outputs.of(model, x, masks, parameters, **options)
        if method == "exact":
            return exact(outputs)
        generator = torch.Generator(outputs.net.device).manual_seed(seed)
        estimate = hutchinson if method == "hutchinson" else hutch_plus_plus
        return estimate(of_outputs(outputs), probes, generator)


def exact(outputs: Outputs) -> Trace:
    """Sum of the squares of the Jacobian, by parameter; call it under `isolated`."""
    sums = torch.zeros(len(outputs.columns), dtype=torch.float64)
    for part in rows(outputs):
        sums += torch.tensor([float(block.double().square().sum()) for block in part.blocks], dtype=torch.float64)
    return _trace(outputs, sums, 0.0, 0)


def hutchinson(product: Products, probes: int, generator: torch.Generator) -> Trace:
    """Mean of |J^T z|^2 over random signs z; call it under `isolated`."""
    samples = torch.stack([_squares(product, signs(product, generator)) for _ in range(probes)])
    return _trace(product.outputs, samples.mean(0), _standard_error(samples), probes)


def hutch_plus_plus(product: Products, probes: int, generator: torch.Generator) -> Trace:
    """Exact on an orthonormal basis of K S, Hutchinson on its complement; call it under `isolated`."""
    third = min(probes // 3, product.shape[0] - 1)
    sketch = torch.stack([product.push(product.pull(signs(product, generator))) for _ in range(third)], dim=1)
    basis = torch.linalg.qr(sketch)[0]
    inside = torch.stack([_squares(product, q) for q in basis.unbind(1)]).sum(0)
    rest = []
    for _ in range(probes - 2 * third):
        probe = signs(product, generator)
        rest.append(_squares(product, probe - basis @ (basis.T @ probe)))
    outside = torch.stack(rest)
    return _trace(product.outputs, inside + outside.mean(0), _standard_error(outside), probes)


def signs(product: Products, generator: torch.Generator) -> Tensor:
    """A vector of N random signs."""
    outputs = product.outputs
    bits = torch.randint(0, 2, (outputs.size,), generator=generator, device=outputs.net.device)
    return (2 * bits - 1).to(outputs.dtype)


def _squares(product: Products, vector: Tensor) -> Tensor:
    """|J^T v|^2 by parameter."""
    return torch.tensor([float(part.double().square().sum()) for part in product.pull(vector)], dtype=torch.float64)


def _standard_error(samples: Tensor) -> float:
    return float(samples.sum(1).std()) / math.sqrt(len(samples))


def _trace(outputs: Outputs, sums: Tensor, error: float, probes: int) -> Trace:
    return Trace(float(sums.sum()), error, dict(zip(outputs.names, sums.tolist(), strict=True)), probes)
