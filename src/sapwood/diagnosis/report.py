"""A diagnosis of masks on a model: one record a layer, and a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sapwood.batches import Batch, Data, filled, resized
from sapwood.diagnosis.counting import Paths, count
from sapwood.diagnosis.paths import effective
from sapwood.errors import SapwoodError
from sapwood.fresh import normal
from sapwood.functional import Forward, FunctionalModel
from sapwood.isolation import device_of, isolated
from sapwood.masks import Masks
from sapwood.names import Names, unwrapped
from sapwood.ntk.outputs import Outputs
from sapwood.ntk.products import of_outputs
from sapwood.ntk.traces import hutchinson
from sapwood.prunable import Weight, all_weights
from sapwood.text import text_table
from sapwood.witness.rows import shortened

SAMPLES, PROBES = 8, 8
ALL_PATHS = 1 - 1e-9


@dataclass(frozen=True)
class LayerDiagnosis:
    """What is left of one layer.

    Attributes:
        kept: Weights that the mask keeps.
        effective: Those on a path from an input to an output.
        weights: All weights.
        units: Output units (neurons, channels); none of a matrix that is no layer's weight, as they are not known.
        dead: Units through which no path goes.
        bottlenecks: Numbers of the units through which all paths of the network go, where the layer has others.
        busiest: Share of all paths that go through the layer's busiest unit, 0 to 1; NaN where it has no units.
        gradient: Root of the mean over inputs and random signs z of |d(z . f)/d(kept weights)|^2: the norm of the
            gradient that reaches the layer from outputs of unit gradients (the square root of its share of the tangent
            kernel's trace, per input); NaN where it was not measured.
    """

    kept: int
    effective: int
    weights: int
    units: int
    dead: int
    bottlenecks: tuple[int, ...]
    busiest: float
    gradient: float


@dataclass(frozen=True)
class Diagnosis:
    """What masks leave of a network.

    Attributes:
        effective: The masks without the kept weights that are on no path.
        log10_paths: Decimal logarithm of the number of paths; -inf for none.
        layers: A record of each masked layer.
    """

    effective: Masks
    log10_paths: float
    layers: Mapping[str, LayerDiagnosis]

    @property
    def sparsity(self) -> float:
        """Effective sparsity: share of the weights that are removed, or on no path."""
        return self.effective.sparsity

    @property
    def dead(self) -> int:
        """Dead units in all layers."""
        return sum(layer.dead for layer in self.layers.values())

    @property
    def bottlenecks(self) -> dict[str, tuple[int, ...]]:
        """Units through which all paths go, by layer."""
        return {name: layer.bottlenecks for name, layer in self.layers.items() if layer.bottlenecks}

    def table(self) -> str:
        """One line a layer, and a sentence, as plain text."""
        return f"{text_table(HEADER, self.rows())}\n{self.sentence()}"

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table."""
        return [
            (
                name,
                f"{layer.effective:,}",
                f"{layer.kept:,}",
                f"{layer.dead:,} of {layer.units:,}",
                "-" if math.isnan(layer.busiest) else f"{100 * layer.busiest:.3g} %" + " all" * bool(layer.bottlenecks),
                "-" if math.isnan(layer.gradient) else f"{layer.gradient:.3g}",
            )
            for name, layer in self.layers.items()
        ]

    def sentence(self) -> str:
        """The whole in one sentence."""
        paths = "no path" if self.log10_paths == -math.inf else f"10^{self.log10_paths:.1f} paths"
        through = _many(sum(map(len, self.bottlenecks.values())), "bottleneck unit")
        dead = _many(self.dead, "dead unit")
        return f"effective sparsity {self.sparsity:.2%}, {dead}, {through}, {paths} from inputs to outputs"


HEADER = ("layer", "on a path", "kept", "dead units", "busiest unit", "gradient")


def diagnose(
    model: nn.Module,
    masks: Masks,
    *,
    input_shape: Iterable[int] | None = None,
    batches: Iterable[Batch] | None = None,
    draw: Iterable[str] | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> Diagnosis:
    """Probes a model under masks; all but the gradients depends on structure and input shape alone.

    Args:
        model: The model that the masks are for; it is not changed.
        masks: Its masks.
        input_shape: Shape of one sample without the batch, e.g. (3, 32, 32): gradients are on eight Gaussian inputs.
        batches: Batches whose first gives the inputs instead.
        draw: Which tensors of a mapping are numbers, as in `prune`.
        forward: `forward(model, inputs)`, for models that are not simply called.
        seed: Of the inputs and signs of the gradients.

    Raises:
        MaskError: the masks are another model's.
        DataError: neither an input shape nor batches were given.
        UnsupportedModelError: the model cannot be run on such an input.

    Example:
        >>> import torch
        >>> from sapwood import Masks
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> cut = {"0.weight": torch.tensor([[True, True], [True, False]]), "1.weight": torch.tensor([[True, False]])}
        >>> found = diagnose(model, Masks(cut), input_shape=(2,))
        >>> found.dead, found.bottlenecks, round(10**found.log10_paths)
        (1, {'0.weight': (0,)}, 2)
    """
    core = unwrapped(model)
    batches = None if batches is None else list(batches)
    masks = Names.of(model).fit(masks, strict=False)
    live = effective(core, masks, input_shape=input_shape, batches=batches, draw=draw, forward=forward)
    device = device_of(core)
    with isolated(seed, device):
        net = FunctionalModel.of(core, include=tuple(masks), forward=forward, zero_init="keep")
        data = Data.collect(batches, input_shape, device, draw)
        paths = count(net, masks, shortened(net, data.templates()[0], 1), data.draw)
        generator = torch.Generator(device).manual_seed(seed)
        gradients = _gradients(core, net, masks, data, forward, generator)
    owners = {weight.name: weight for weight in all_weights(core)}
    layers = {
        name: _layer(mask, live[name], paths, name, owners[name], gradients.get(name, math.nan))
        for name, mask in masks.items()
    }
    return Diagnosis(live, paths.log10, layers)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _layer(mask: Tensor, live: Tensor, paths: Paths, name: str, weight: Weight, gradient: float) -> LayerDiagnosis:
    by_unit = _unit_first(live, weight).any(1)
    shares = _unit_first(paths.shares[name].to(mask.device), weight).sum(1)
    full = (shares >= ALL_PATHS).nonzero()[:, 0].tolist() if len(shares) > 1 else []
    return LayerDiagnosis(
        kept=int(mask.sum()),
        effective=int(live.sum()),
        weights=mask.numel(),
        units=len(by_unit),
        dead=int((~by_unit).sum()),
        bottlenecks=tuple(full),
        busiest=float(shares.max()) if len(shares) else math.nan,
        gradient=gradient,
    )


def _unit_first(tensor: Tensor, weight: Weight) -> Tensor:
    """Units x weights that lead into them; no units where the weight's layout is not known."""
    if tensor.dim() < 2:
        return tensor[:, None]
    layout = weight.layout
    return tensor.new_empty(0, 1) if layout is None else tensor.movedim(layout.output, 0).flatten(1)


def _gradients(
    model: nn.Module,
    net: FunctionalModel,
    masks: Masks,
    data: Data,
    forward: Forward | None,
    generator: torch.Generator,
) -> dict[str, float]:
    """Norms by layer; empty where a random or otherwise unfit model has no kernel."""
    inputs = resized(data.templates()[0], SAMPLES)
    if data.input_shape is not None:
        inputs = filled(inputs, lambda t: normal(t.to(net.device, net.dtype), generator))
    try:
        outputs = Outputs.of(
            model, inputs, masks, tuple(net.prunable), batchnorm="calibrated", dropout="off", forward=forward
        )
        found = hutchinson(of_outputs(outputs), PROBES, generator)
    except SapwoodError:
        return {}
    return {name: math.sqrt(part / SAMPLES) for name, part in found.by_layer.items()}
