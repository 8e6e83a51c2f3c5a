"""The front door: `prune(model, method=..., density=...)`."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sapwood.allocation import target_density
from sapwood.batches import Batch, Data
from sapwood.diagnosis import diagnose
from sapwood.functional import Forward, FunctionalModel, Loss
from sapwood.isolation import isolated, unwrapped
from sapwood.masks import Masks, clean_names, fingerprint
from sapwood.methods.table import METHOD_FIELDS, configured, find, settings
from sapwood.prunable import Pattern, select
from sapwood.pruning import Criterion, OnRound, Procedure, Result


def prune(  # noqa: PLR0913  # the front door: every argument but the model is a keyword
    model: nn.Module,
    *,
    method: str | Procedure | Criterion = "ntk-sap",
    density: float | None = None,
    sparsity: float | None = None,
    compression: float | None = None,
    input_shape: Iterable[int] | None = None,
    batches: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    include: Iterable[Pattern] | Pattern = (),
    exclude: Iterable[Pattern] | Pattern = (),
    min_per_layer: int = 0,
    zero_init: str = "ones",
    seed: int = 0,
    on_round: OnRound | None = None,
    within: Masks | None = None,
    group: dist.ProcessGroup | None = None,
    diagnosed: bool = False,
    **fields: Any,
) -> Result:
    """Finds which weights of a model to keep. The model itself is not changed: see `attach` for that.

    Args:
        model: Any `nn.Module`, on any device, in any mode.
        method: A name of `METHODS` ("ntk-sap", "ntk-sap-analytic", "ntk-sap-jvp", "random", "erk", "magnitude", "snip",
            "iter-snip", "force", "grasp", "synflow", "synflow-l2", "px", "prospr", "ntt"; for trained weights
            "janowsky", "taylor", "obd", "skeletonization", "obs"), an import path "package.module:object", a `Method`,
            another `Procedure`, or a criterion.
        density: Share of the prunable weights to keep, (0, 1]. Exactly one of these three words is given, or none where
            `allocation` brings a density with it.
        sparsity: 1 - density, [0, 1).
        compression: 1 / density, 1 or more.
        input_shape: Shape of one sample without the batch, e.g. (3, 32, 32); for NTK-SAP and SynFlow.
        batches: Any iterable of (input, target) pairs, or of mappings (Hugging Face style); read once and whole.
        loss: `loss(output, target)`, the mean over the batch; for mappings `loss(output, batch)`. Default: the model's
            own `.loss` for mappings with labels, else cross-entropy.
        forward: `forward(model, inputs)`, for models that are not simply called.
        include: What to prune besides the weights of linear, convolution, attention and recurrent layers: names, globs,
            module types, modules.
        exclude: What to leave dense; it does not count into the density.
        min_per_layer: Weights that every layer keeps at least.
        zero_init: "ones" scores zero-initialised branch scales (zero-gamma BatchNorm, LayerScale) as ones, "keep" as
            they are.
        seed: Seed of every random draw; the global generators are left as they were.
        on_round: Called after every round with its record and masks.
        within: Masks to begin from, such as those of an earlier call: what they prune stays pruned. `density` is still
            a share of all prunable weights.
        group: Processes that score together (`torch.distributed.group.WORLD`): all of them call `prune` with the same
            model and seed, each with its share of the batches, and all get the same masks. NTK-SAP divides its
            mini-batches among them.
        diagnosed: Also probe what the masks leave of the network (`Result.diagnosis`: weights on no path, dead and
            bottleneck units, paths, gradients), which needs an input shape or batches.
        **fields: Fields of the method (rounds, schedule, allocation, regrow, invert, rounding) and of its criterion
            (for NTK-SAP: resamples, samples, batch_size, epsilon, fresh_weights, random_inputs, layout,
            merged_statistics, chunk_size).

    Returns:
        Masks that keep exactly density x prunable weights, rounded to the nearest number (or as `rounding` says), the
        history, seconds and seed; and new weights, where the method changes them (`params`; `load_into` writes them
        into a model).

    Raises:
        BudgetError: the budget cannot be met, or not exactly one of the three words is given.
        ConfigError: an unknown method, field or pattern.
        DataError: the method needs batches, targets or an input shape that were not given.
        ScoreError: a weight or a score is NaN or infinite.
        UnsupportedModelError: the model cannot be scored, or has nothing to prune.

    Example:
        >>> import torch, sapwood
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> result = sapwood.prune(model, density=0.1, input_shape=(8,))
        >>> result.masks.kept, result.masks.total
        (38, 384)
    """
    begin = time.perf_counter()
    name, found = find(method)
    recipe = configured(name, found, fields)
    density = _density(recipe, density, sparsity, compression)
    core = unwrapped(model)
    device = next((parameter.device for parameter in core.parameters()), torch.device("cpu"))
    with isolated(seed, device):
        data = Data.collect(batches, input_shape, device)
        net = FunctionalModel.of(
            core, include=include, exclude=exclude, loss=loss, forward=forward, zero_init=zero_init, group=group
        )
        generator = torch.Generator(net.device).manual_seed(seed)
        options: dict[str, Any] = {"min_per_layer": min_per_layer, "on_round": on_round, "within": within}
        masks, history, params = recipe.run(net, data, density, generator, **options)
    masks = Masks(clean_names(masks), _provenance(name, recipe, seed, density, core))
    seconds = time.perf_counter() - begin
    diagnosis = None
    if diagnosed:
        shown = None if data.input_shape else data.batches or None
        diagnosis = diagnose(core, masks, input_shape=data.input_shape, batches=shown, forward=forward, seed=seed)
    return Result(masks, history, seconds, seed, name, _as_held(params, core), diagnosis)


def prunable(
    model: nn.Module, include: Iterable[Pattern] | Pattern = (), exclude: Iterable[Pattern] | Pattern = ()
) -> dict[str, Tensor]:
    """The weights that `prune` would prune, by name, in order; tied weights once."""
    return {weight.name: weight.tensor for weight in select(unwrapped(model), include, exclude)}


def _as_held(params: Mapping[str, Tensor] | None, model: nn.Module) -> dict[str, Tensor] | None:
    """New weights under clean names, in the precision in which the model holds them."""
    if params is None:
        return None
    held = dict(model.named_parameters())
    return clean_names({name: value.detach().to(held[name].dtype) for name, value in params.items()})


def _density(recipe: Procedure, density: float | None, sparsity: float | None, compression: float | None) -> float:
    words = (density, sparsity, compression)
    like = getattr(recipe, "allocation", None)
    if isinstance(like, Masks) and words == (None, None, None):
        return like.density
    return target_density(*words)


def _provenance(name: str, recipe: Procedure, seed: int, density: float, model: nn.Module) -> dict[str, Any]:
    own = settings(recipe)
    plain = {key: own[key] for key in own if key not in METHOD_FIELDS and _is_plain(own[key])}
    shared = {key: own[key] for key in METHOD_FIELDS if key in own}
    if "allocation" in shared:
        shared["allocation"] = _described(shared["allocation"])
    return {
        "method": name,
        "fields": {**dict(sorted(plain.items())), **shared},
        "seed": seed,
        "density": density,
        "torch": torch.__version__,
        "sapwood": importlib.metadata.version("sapwood"),
        "fingerprint": fingerprint(dict(model.named_parameters())),
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None)


def _described(allocation: Any) -> Any:
    if isinstance(allocation, Masks):
        return "like masks"
    if isinstance(allocation, Mapping):
        return dict(allocation)
    return allocation if isinstance(allocation, str) else repr(allocation)
