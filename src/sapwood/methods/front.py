"""The front door: `prune(model, method=..., density=...)`."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sapwood.allocation import Layerwise, target_density
from sapwood.batches import Batch, Data
from sapwood.checks import CalledWith, Natural, OneOf, check_arguments
from sapwood.coverage import Coverage
from sapwood.diagnosis import diagnose
from sapwood.errors import SapwoodWarning
from sapwood.functional import Forward, FunctionalModel, Loss
from sapwood.isolation import device_of, isolated
from sapwood.masks import Masks, fingerprint
from sapwood.methods.table import METHOD_FIELDS, configured, find, settings
from sapwood.names import Names, named_parameters, unwrapped
from sapwood.prunable import Pattern, select
from sapwood.pruning import Criterion, OnRound, Procedure, Result
from sapwood.version import __version__
from sapwood.witness import opened


def prune(  # noqa: PLR0913  # the front door: every argument but the model is a keyword
    model: nn.Module,
    *,
    method: str | Procedure | Criterion = "ntk-sap",
    density: float | None = None,
    sparsity: float | None = None,
    compression: float | None = None,
    input_shape: Iterable[int] | None = None,
    batches: Iterable[Batch] | None = None,
    draw: Iterable[str] | None = None,
    loss: Annotated[Loss | None, CalledWith(("output", "target"))] = None,
    forward: Annotated[Forward | None, CalledWith(("model", "inputs"))] = None,
    include: Iterable[Pattern] | Pattern = (),
    exclude: Iterable[Pattern] | Pattern = (),
    min_per_layer: Natural = 0,
    zero_init: Annotated[str, OneOf("zero_init", ("ones", "keep"))] = "ones",
    seed: Natural = 0,
    on_round: Annotated[OnRound | None, CalledWith(("round", "masks"))] = None,
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
        batches: Any iterable of inputs, of (input, target) pairs, or of mappings of keyword arguments (Hugging Face
            style), whose targets are the first of "labels", "label", "target", "targets" that they have; read once and
            whole. Samples are in the first dimension of all inputs, or a batch is taken as one whole.
        draw: Which entries of a mapping (positions of a tuple) are numbers that methods without data may replace by
            noise or ones; (): none. Needed only where a floating-point tensor is not the one input: it might be a mask.
        loss: `loss(output, target)`, a mean or a sum over the batch; for mappings `loss(output, batch)`. Where batches
            weigh unequally and it cannot be seen what it is a mean over, it returns a pair (mean, number of units that
            it is over). Default: the model's own loss for mappings with targets, else cross-entropy over all targets
            but -100.
        forward: `forward(model, inputs)`, for models that are not simply called; `inputs` is the first of a pair, or a
            mapping without its targets.
        include: What to prune besides the weights of linear, convolution, attention and recurrent layers: names, globs,
            module types, modules. NTK-SAP scores what is no layer's weight at its present values: it has no known
            fan-in for a fresh draw.
        exclude: What to leave dense; it does not count into the density.
        min_per_layer: Weights that every layer keeps at least.
        zero_init: "ones" scores zero-initialised branch scales (zero-gamma BatchNorm, LayerScale) as ones, "keep" as
            they are.
        seed: Seed of every random draw, 0 or more; the global generators are left as they were.
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
        ConfigError: an unknown method, field or pattern, or an argument of a wrong type or out of range.
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
    check_arguments(prune, locals())
    begin = time.perf_counter()
    name, found = find(method)
    recipe = configured(name, found, fields)
    density = _density(recipe, density, sparsity, compression)
    core = unwrapped(model)
    names, device = Names.of(model), device_of(model)
    recipe = _in_names_of(names, recipe)
    within = None if within is None else names.fit(within, strict=False)
    with isolated(seed, device):
        data = Data.collect(batches, input_shape, device, draw)
        net = opened(
            model, data, include=include, exclude=exclude, loss=loss, forward=forward, zero_init=zero_init, group=group
        )
        generator = torch.Generator(net.device).manual_seed(seed)
        options: dict[str, Any] = {"min_per_layer": min_per_layer, "on_round": on_round, "within": within}
        masks, history, params = recipe.run(net, data, density, generator, **options)
        _warn_of_unseen(net)
    masks = Masks(masks, _provenance(name, recipe, seed, density, core))
    seconds = time.perf_counter() - begin
    diagnosis = None
    if diagnosed:
        shown = None if data.input_shape else data.batches or None
        diagnosis = diagnose(
            core, masks, input_shape=data.input_shape, batches=shown, draw=data.draw, forward=forward, seed=seed
        )
    coverage = Coverage.of(model, masks, exclude)
    return Result(masks, history, seconds, seed, name, _as_held(params, core), diagnosis, coverage)


def prunable(
    model: nn.Module, include: Iterable[Pattern] | Pattern = (), exclude: Iterable[Pattern] | Pattern = ()
) -> dict[str, Tensor]:
    """The weights that `prune` would prune, by name, in order; tied weights once."""
    return {weight.name: weight.tensor for weight in select(model, include, exclude)}


def _in_names_of(names: Names, recipe: Procedure) -> Procedure:
    """The recipe with the densities of its allocation, if it gives them by layer, under the model's clean names."""
    rule = getattr(recipe, "allocation", None)
    shares = rule.shares if isinstance(rule, Layerwise) else rule
    if not isinstance(shares, Mapping):
        return recipe
    clean = names.translated(shares)
    renamed: Any = {clean[name]: share for name, share in shares.items()}
    if isinstance(shares, Masks):
        renamed = Masks(renamed, shares.provenance)
    if isinstance(rule, Layerwise):
        renamed = dataclasses.replace(rule, shares=renamed)
    return dataclasses.replace(recipe, allocation=renamed)  # type: ignore[type-var]  # methods are dataclasses


def _warn_of_unseen(net: FunctionalModel) -> None:
    """Says which layers the method cannot have known to be idle; whatever differentiates finds that out itself."""
    if net.unseen and not net.derivatives.asked:
        warnings.warn(
            f"{len(net.unseen)} of {len(net.prunable)} prunable weights are not run by the forward on this input, "
            f"{net.unseen[0]!r} first, and yet count into the budget: exclude={net.unseen!r} leaves them out.",
            SapwoodWarning,
            stacklevel=3,
        )


def _as_held(params: Mapping[str, Tensor] | None, model: nn.Module) -> dict[str, Tensor] | None:
    """New weights in the precision in which the model holds them."""
    if params is None:
        return None
    held = named_parameters(model)
    return {name: value.detach().to(held[name].dtype) for name, value in params.items()}


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
        "sapwood": __version__,
        "fingerprint": fingerprint(named_parameters(model)),
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None)


def _described(allocation: Any) -> Any:
    if isinstance(allocation, Masks):
        return "like masks"
    if isinstance(allocation, Mapping):
        return dict(allocation)
    return allocation if isinstance(allocation, str) else repr(allocation)
