r"""The analytic kernel: the limit of the expected kernel at infinite width (Jacot et al. 2018; Arora et al. 2019).

With fresh weights N(0, 2 / fan-in), the units of a layer become independent Gaussians as the layer before it widens.
Two quantities go from layer to layer: S, the covariance of a unit over pairs of inputs (and pairs of pixels), and T,
the tangent kernel of a unit. For a weight layer, with A the mean over the inputs of a unit,

    S' = 2 A(S) + b^2,     T' = 2 A(T) + 2 A(S),

where b^2 is the mean square of the layer's biases, which a fresh draw keeps, and the second term of T' is the layer's
own weights' (parametrization="standard": fan-in * A(S), which grows with the width). ReLU turns (S, T) into (k1(S),
k0(S) T), k0 and k1 being the arc-cosine kernels (Cho and Saul 2009). Outputs are independent of each other, so that the
kernel of k outputs is that of one, times the identity.

Masks enter by the density of each layer, as random masks do: the variance of a unit shrinks by it. A bias-free ReLU
network of L layers at density c has c^L times the dense kernel.

The module is traced by `torch.fx`; there is one small rule for each operation, and what has none is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sapwood.batches import inputs_of
from sapwood.errors import UnsupportedModelError, unknown_name
from sapwood.isolation import device_of, isolated, skeleton
from sapwood.masks import Masks
from sapwood.names import Names, unwrapped
from sapwood.ntk.options import MEMORY, PARAMETRIZATIONS
from sapwood.ntk.outputs import Parameters
from sapwood.ntk.recursions import FUNCTIONS, MODULES, SUMS, Limit, Unit, added, no_rule
from sapwood.prunable import all_weights, select


def analytic_kernel(
    model: nn.Module,
    x: Any,
    masks: Masks | None = None,
    parameters: Parameters = None,
    *,
    parametrization: str = "ntk",
    memory: int = MEMORY,
) -> Tensor:
    """The infinite-width kernel of a fully connected or convolutional ReLU network.

    Rules: Linear, Conv2d (zero padding, no groups), ReLU, Flatten, average pooling, Identity, Dropout (off), and sums
    of a weight layer's output with another Gaussian (the residual stream of a pre-activation network).

    Args:
        model: A module that `torch.fx` can trace; it is not changed; of its parameters only shapes and biases count.
        x: Inputs, (n, features) or (n, channels, height, width), or a pair whose first is taken.
        masks: Masks, of which only each layer's density counts.
        parameters: Parameters that the kernel is with respect to; None: the prunable weights; "*": all.
        parametrization: "ntk": derivatives with respect to weights in units of their initial standard deviation, which
            have a limit. "standard": with respect to the weights themselves, as `kernel` does by default: the widths
            of the model enter as factors.
        memory: Bytes that may be taken; convolutions need all pairs of pixels of all pairs of inputs.

    Returns:
        (n * k, n * k), float64, in the order of `kernel`.

    Raises:
        ConfigError: an unknown parameter or parametrization, or too little memory.
        UnsupportedModelError: an operation without a rule, which is named.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> round(float(analytic_kernel(model, torch.ones(1, 1), parametrization="ntk")), 3) >= 4
        True
    """
    if parametrization not in PARAMETRIZATIONS:
        raise unknown_name("parametrization", parametrization, PARAMETRIZATIONS)
    core = unwrapped(model)
    names = Names.of(core)
    masks = None if masks is None else Names.of(model).fit(masks, strict=False)
    with isolated(0, device_of(core)):
        limit = Limit(
            frozenset(_trained(model, parameters)),
            {} if masks is None else {name: count.density for name, count in masks.per_layer().items()},
            parametrization == "standard",
            memory,
        )
        return _walk(core, names.modules, _input(inputs_of(x), device_of(core)), limit)


def _trained(model: nn.Module, parameters: Parameters) -> Iterable[str]:
    if parameters is None:
        return [w.name for w in select(model)]
    patterns = (parameters,) if isinstance(parameters, str | type | nn.Module) else tuple(parameters)
    select(model, include=patterns)  # which refuses patterns that match nothing
    return [w.name for w in all_weights(model) if any(w.matches(p) for p in patterns)]


def _input(x: Tensor, device: torch.device) -> Unit:
    x = x.to(device, torch.float64)
    if x.dim() not in (2, 4):
        raise UnsupportedModelError(
            f"The analytic kernel is of inputs (n, features) or (n, channels, height, width); {tuple(x.shape)} came."
        )
    pattern = "ic,jc->ij" if x.dim() == 2 else "ichw,jcuv->ijhwuv"
    covariance = torch.einsum(pattern, x, x) / x.shape[1]
    return Unit(covariance, torch.zeros_like(covariance))


class _Tracer(fx.Tracer):
    """Calls modules by their clean names, and looks into wrappers."""

    def path_of_module(self, mod: nn.Module) -> str:
        return next(name for name, module in Names.of(self.root).modules.items() if module is mod)


def _walk(model: nn.Module, modules: Mapping[str, nn.Module], unit: Unit, limit: Limit) -> Tensor:
    """Applies the rules along the graph, which is traced on a copy; the modules are the model's own, by clean name."""
    known: dict[fx.Node, Unit] = {}
    try:
        graph = _Tracer().trace(skeleton(model))
    except Exception as error:
        raise UnsupportedModelError(
            f"torch.fx cannot trace {type(model).__name__} ({error}), so there is no analytic kernel: expected_kernel "
            "averages over draws of any model."
        ) from error
    last: nn.Module | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = unit
        elif node.op == "output":
            return _outputs(known[node.args[0]], last)
        else:
            last = modules[str(node.target)] if node.op == "call_module" else None
            known[node] = _apply(node, last, known, limit)
    raise UnsupportedModelError("The traced model has no output.")


def _apply(node: fx.Node, module: nn.Module | None, known: dict[fx.Node, Unit], limit: Limit) -> Unit:
    units = [known[a] for a in node.args if isinstance(a, fx.Node) and a in known]
    options = [a for a in node.args if not isinstance(a, fx.Node)]
    if module is not None:
        for kind, rule in MODULES.items():
            if isinstance(module, kind):
                return rule(units[0], module, str(node.target), limit)
        raise no_rule(type(module).__name__, str(node.target))
    if node.target in SUMS and len(units) == 2:
        return added(units[0], units[1], node.name)
    if node.target in FUNCTIONS:
        return FUNCTIONS[node.target](units[0], *options, **dict(node.kwargs))
    raise no_rule(getattr(node.target, "__name__", str(node.target)), node.name)


def _outputs(unit: Unit, last: nn.Module | None) -> Tensor:
    if not isinstance(last, nn.Linear) or unit.spatial:
        raise UnsupportedModelError("The analytic kernel is of networks that end in a linear layer; this one does not.")
    return torch.kron(unit.tangent, torch.eye(last.out_features, dtype=torch.float64, device=unit.tangent.device))
