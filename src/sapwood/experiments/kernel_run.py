"""What `sapwood ntk` does: networks under masks from files and from methods, their kernels, their training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sapwood import ntk
from sapwood.data import Dataset, pruning_batches
from sapwood.errors import ConfigError, DataError, SapwoodWarning
from sapwood.experiments import identity, kernels, store, terminal
from sapwood.experiments.compare import Outcome, run_folder
from sapwood.experiments.config import CONTROL_SEED, DENSE, Place, RunConfig
from sapwood.experiments.environment import device_of, environment
from sapwood.experiments.fields import Variant, parse_variant
from sapwood.experiments.kernels import KernelConfig, Spectra
from sapwood.experiments.material import create_model, load_data
from sapwood.experiments.stages import NEW_WEIGHTS, pruned
from sapwood.experiments.store import RunFolder
from sapwood.experiments.summary import finished, sparsity
from sapwood.experiments.weights import load_new
from sapwood.masks import Masks
from sapwood.methods import METHODS
from sapwood.names import Names
from sapwood.text import visible

PAPER = ("ntk-sap", "snip", "iter-snip", "synflow", "magnitude", "grasp")
ALL = "all"
TRAINED_IMAGES = 50  # of a training that is compared with its prediction: its kernel is computed several times
Dynamics = Mapping[str, ntk.Dynamics]


def variants(name: str) -> list[Variant]:
    """The method of a name, or every one for "all".

    Raises:
        ConfigError: there is no such method, or no such field of it.
    """
    return [parse_variant(method) for method in (METHODS if name == ALL else [name])]


@dataclass(frozen=True)
class Networks:
    """Pruned networks as they are before training.

    Attributes:
        masks: By label.
        weights: Parameters and buffers of those that do not begin from the initial weights of the seed, by label.
    """

    masks: Mapping[str, Masks]
    weights: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __or__(self, other: Networks) -> Networks:
        return Networks({**self.masks, **other.masks}, {**self.weights, **other.weights})


def find_masks(
    model: str, data: str, methods: Sequence[str], density: float, seed: int, out: Path, place: Place
) -> Networks:
    """The networks that methods leave; masks that an earlier call left in `out/masks` are read.

    Raises:
        ConfigError: a method that prunes after training, or masks that were left by another model, data or code.
        SapwoodError: what the methods refuse.
    """
    named = [(name, variant) for name in methods for variant in variants(name)]
    configs = [_before_training(name, variant, model, data, density, seed) for name, variant in named]
    dataset, device = load_data(data, None, place), device_of(place.device)
    found = Networks({})
    with terminal.progress("name") as bar:
        task = bar.add_task("masks", total=len(configs), name="")
        for config in configs:
            bar.update(task, name=config.label)
            net = create_model(model, dataset, seed)
            with RunFolder(out / "masks" / config.id, config) as here:
                identity.claim(here, identity.of(config, dataset, net))
                masks = pruned(config, net.to(device), dataset, here.path, None)
                found |= _network(config, masks, dataset, here.path)
            bar.advance(task)
    return found


def _before_training(name: str, variant: Variant, model: str, data: str, density: float, seed: int) -> RunConfig:
    if variant.retraining:
        raise ConfigError(
            f"{name!r} trains the network before it prunes it, and these are kernels of networks before "
            "training: leave it out, or give a mask file of it with --masks."
        )
    return RunConfig(data, model, variant.method, density, fields=variant.fields, control=variant.control, seed=seed)


def _network(config: RunConfig, masks: Masks, dataset: Dataset, folder: Path) -> Networks:
    """The masks of a run, and the weights that its training begins from where the method or the control set them."""
    weights = {}
    if config.control == "reinit":
        weights[config.label] = create_model(config.model, dataset, config.seed + CONTROL_SEED).state_dict()
    elif masks.provenance.get(NEW_WEIGHTS):
        weights[config.label] = load_new(folder / store.NEW_WEIGHTS, torch.device("cpu"))
    return Networks({config.label: masks}, weights)


def read_masks(files: Sequence[Path]) -> Networks:
    """Masks from files, by the files' names, over the initial weights."""
    found: dict[str, Masks] = {}
    for file in files:
        label = visible(file.stem)
        while label in found:
            label = f"{file.parent.name}/{label}" if "/" not in label else f"{label}+"
        found[label] = Masks.load(file)
    return Networks(found)


def spectra(
    model: str, data: str, networks: Networks, config: KernelConfig, seed: int, cache: Path, place: Place
) -> Spectra:
    """The kernels of the dense network and of those under masks.

    Raises:
        ConfigError: fewer images than `batch_size`.
        MaskError: masks of another model.
    """
    dataset = load_data(data, None, place)
    net, (images, _) = _subject(model, dataset, seed, config.per_class, place)
    names = Names.of(net)
    networks = replace(networks, masks={label: names.fit(masks) for label, masks in networks.masks.items()})
    if config.batch_size is not None and len(images) % config.batch_size:
        raise ConfigError(
            f"--batch-size {config.batch_size} does not divide the {len(images)} images: choose another, or another "
            "--per-class."
        )
    if net.training and config.batchnorm == "eval":
        net.eval()
    origin = [identity.inputs(RunConfig(data, model), dataset), identity.versions(model)]
    with terminal.progress() as bar:
        tasks = {label: bar.add_task(label, total=None) for label in (DENSE, *networks.masks)}
        found = kernels.compute(
            net,
            images,
            {DENSE: None, **networks.masks},
            config,
            cache,
            weights=networks.weights,
            origin=origin,
            on_rows=lambda label, done, total: bar.update(tasks[label], completed=done, total=total),
        )
    return Spectra(settings_of(model, data, config, seed, len(images)), found)


def trainings(
    model: str, data: str, networks: Networks, config: KernelConfig, seed: int, steps: int, place: Place
) -> Dynamics:
    """Real and predicted training of all networks, at a quarter of the rate that is stable for all of them."""
    dataset = load_data(data, None, place)
    per_class = max(1, min(config.per_class, TRAINED_IMAGES // dataset.num_classes))
    net, (images, labels) = _subject(model, dataset, seed, per_class, place)
    options: Any = {
        "dropout": "off",
        "batchnorm": config.batchnorm,
        "memory": int(config.memory * 2**30),
        "batch_size": config.batch_size if config.batch_size and len(images) % config.batch_size == 0 else None,
    }
    masks: dict[str, Masks | None] = {DENSE: None, **networks.masks}
    nets = {label: kernels.with_weights(net, networks.weights.get(label)) for label in masks}
    with terminal.progress("name") as bar:
        task = bar.add_task("trainings", total=len(masks) * (steps + 1), name="")
        rates = []
        for label, mask in masks.items():
            bar.update(task, name=label)
            rates.append(_stable(nets[label], images, mask, options))
            bar.advance(task)
        found = {}
        for label, mask in masks.items():
            bar.update(task, name=label)
            found[label] = ntk.train_dynamics(
                nets[label],
                images,
                labels,
                mask,
                rate=min(rates) / 4,
                steps=steps,
                on_step=lambda _: bar.advance(task),
                **options,
            )
    return found


def of_comparison(outcomes: Sequence[Outcome], out: Path, at: float, config: KernelConfig, place: Place) -> Spectra:
    """The kernels of a comparison's networks at one sparsity, of the first seed that has results; kept as ntk.json.

    Networks that do not begin from initial weights, as most that are pruned after training, have none.

    Raises:
        ConfigError: the comparison has no such sparsity.
    """
    levels = sorted({sparsity(o) for o in outcomes if o.config.method != DENSE})
    if not any(abs(at - s) < 1e-9 for s in levels):
        legal = ", ".join(f"{s:g}" for s in levels)
        raise ConfigError(f"--ntk {at:g} is none of the comparison's sparsities: {legal}.")
    there = [o.config for o, _ in finished(outcomes) if o.config.method != DENSE and abs(sparsity(o) - at) < 1e-9]
    done = [c for c in there if not c.retrain or (c.retrain == "rewind-weights" and not c.rewind_epoch)]
    if left_out := {c.label for c in there if c not in done}:
        names = ", ".join(sorted(left_out))
        warnings.warn(f"No kernel of {names}: it does not begin from initial weights.", SapwoodWarning, stacklevel=2)
    if not done:
        raise DataError(f"No run at {100 * at:g} % sparsity gave a network before training to look at.")

    seed = min(c.seed for c in done)
    dataset, networks = load_data(done[0].data, None, place), Networks({})
    for each in done:
        if each.seed == seed:
            folder = run_folder(out, each)
            networks |= _network(each, Masks.load(folder / store.MASKS), dataset, folder)

    found = spectra(done[0].model, done[0].data, networks, config, seed, out / "kernels", place)
    found.save(out / kernels.RECORD)
    return found


def settings_of(model: str, data: str, config: KernelConfig, seed: int, images: int) -> dict[str, Any]:
    """What the numbers depend on, for people."""
    return {
        "model": model,
        "data": data,
        "images": images,
        "images a class": config.per_class,
        "BatchNorm": config.batchnorm,
        "images a batch": images if config.batch_size is None else config.batch_size,
        "parameters": "prunable weights",
        "seed": seed,
    }


def setup(spectra: Spectra, place: Place) -> dict[str, str]:
    """The settings, the time and the hardware, as text by name."""
    seconds = ", ".join(f"{n.label} {n.seconds:.0f}" for n in spectra.networks)
    facts = {key: str(value) for key, value in spectra.settings.items()}
    return {**facts, "CPU seconds of a kernel": seconds, **environment(device_of(place.device))}


def _subject(
    name: str, dataset: Dataset, seed: int, per_class: int, place: Place
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model at its initial weights, and images with their labels, on the device."""
    device = device_of(place.device)
    count = per_class * dataset.num_classes
    (images, labels), *_ = pruning_batches(dataset, per_class=per_class, batch_size=count, seed=seed)
    layout = torch.channels_last if images.dim() == 4 else torch.contiguous_format  # a tenth faster on a CPU
    net = create_model(name, dataset, seed).to(device)
    return net, (images.to(device).contiguous(memory_format=layout), labels.to(device))


def _stable(net: nn.Module, images: Tensor, masks: Masks | None, options: Any) -> float:
    return ntk.spectrum(ntk.products(net, images, masks, **options), leading=1, full_below=0).largest_stable_lr
