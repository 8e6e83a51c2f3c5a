"""Tangent kernels of dense and pruned networks side by side, each computed once and kept on disk."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from sapwood import ntk
from sapwood.checks import Count, OneOf, Range
from sapwood.errors import SapwoodError
from sapwood.experiments import identity
from sapwood.experiments.config import DENSE
from sapwood.files import checksum, write_in_one_step, write_text
from sapwood.masks import Masks
from sapwood.ntk.options import BATCHNORM

RECORD = "ntk.json"
DIGITS = 7  # of an eigenvalue in a file
Step = Callable[[str, int, int], None]


@dataclass(frozen=True)
class KernelConfig:
    """What a kernel is the kernel of, besides model and masks.

    Attributes:
        batchnorm: What BatchNorm does: train (statistics of the batch, with their gradient), calibrated (those
            statistics as constants) or eval (running statistics).
        batch_size: Images that share BatchNorm's statistics; the default is all.
        per_class: Training images of each class.
        memory: Gigabytes that the derivatives and the kernel may take; what does not fit is computed again.
    """

    batchnorm: Annotated[str, OneOf("batchnorm", BATCHNORM)] = "train"
    batch_size: Count | None = None
    per_class: Count = 10
    memory: Annotated[float, Range(0, 2**30, open_low=True)] = 2.0


@dataclass(frozen=True)
class Network:
    """What is known of one network's kernel.

    Attributes:
        label: What tables and figures call it; "dense" for the unpruned one.
        sparsity: Share of the prunable weights removed.
        size: Number of outputs, and so of eigenvalues.
        eigenvalues: Descending: all of them up to size 4096, else the hundred largest.
        trace: Their sum.
        condition_number: Largest over smallest; None where the smallest is zero or unknown.
        effective_rank: Exponential of the entropy of the spectrum; None where not all of it is known.
        largest_stable_lr: 2 / largest eigenvalue, for the sum of squared errors / 2.
        alignment: Centred alignment with the dense kernel; None without one.
        distance: Relative Frobenius distance from the dense kernel.
        seconds: CPU seconds of the kernel.
    """

    label: str
    sparsity: float
    size: int
    eigenvalues: tuple[float, ...]
    trace: float
    condition_number: float | None
    effective_rank: float | None
    largest_stable_lr: float
    alignment: float | None
    distance: float | None
    seconds: float

    @property
    def smallest(self) -> float | None:
        """The smallest eigenvalue, if it is known."""
        return self.eigenvalues[-1] if len(self.eigenvalues) == self.size else None


@dataclass(frozen=True)
class Spectra:
    """Networks and the settings that their kernels have in common, as a file holds them."""

    settings: Mapping[str, Any]
    networks: tuple[Network, ...]

    def save(self, path: Path) -> None:
        """Writes JSON, eigenvalues in seven digits, in one step."""
        found = dataclasses.asdict(self)
        for network in found["networks"]:
            network["eigenvalues"] = [float(f"{value:.{DIGITS}g}") for value in network["eigenvalues"]]
        write_text(path, json.dumps(found, separators=(",", ":")).replace('{"label"', '\n{"label"') + "\n")

    @classmethod
    def load(cls, path: Path) -> Spectra | None:
        """Reads what `save` wrote; None where there is no such file, or another one."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            networks = [Network(**{**n, "eigenvalues": tuple(n["eigenvalues"])}) for n in found["networks"]]
            return cls(dict(found["settings"]), tuple(networks))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def compute(
    model: nn.Module,
    x: Tensor,
    networks: Mapping[str, Masks | None],
    config: KernelConfig,
    cache: Path,
    *,
    weights: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
    origin: object = None,
    on_rows: Step = lambda label, done, total: None,
) -> tuple[Network, ...]:
    """The kernels of a model's conv and linear weights under each of the masks, on inputs x.

    Args:
        model: The model at its initial weights.
        x: Inputs.
        networks: Masks by label, None for the dense network.
        config: The settings.
        cache: Folder in which kernels are kept: one that is there is not computed again.
        weights: Parameters and buffers of those networks that have others than the model, by label.
        origin: What kernels that are kept depend on besides: plain values, such as digests of the model's source.
        on_rows: Called with a label, rows done and all rows.
    """
    cache.mkdir(parents=True, exist_ok=True)
    found, dense = [], None
    for label, masks in networks.items():
        net = with_weights(model, weights.get(label))
        path = cache / f"{_name(net, x, masks, config, origin)}.npz"
        gram, seconds = _kept(path)
        if gram is None:
            begin = time.process_time()
            gram = ntk.kernel(
                net,
                x,
                masks,
                dropout="off",
                batchnorm=config.batchnorm,
                batch_size=config.batch_size,
                memory=int(config.memory * 2**30),
                on_rows=lambda done, total, label=label: on_rows(label, done, total),  # type: ignore[misc]
            ).cpu()
            seconds = time.process_time() - begin
            _keep(path, gram, seconds)
        dense = gram if masks is None else dense
        found.append(_network(label, masks, gram, dense, seconds))
    return tuple(found)


def with_weights(model: nn.Module, weights: Mapping[str, Tensor] | None) -> nn.Module:
    """The model itself, or a copy with these parameters and buffers."""
    if weights is None:
        return model
    other = copy.deepcopy(model)
    other.load_state_dict({**other.state_dict(), **weights})
    return other


def _network(label: str, masks: Masks | None, gram: Tensor, dense: Tensor | None, seconds: float) -> Network:
    spectrum = ntk.spectrum(gram)
    condition = spectrum.condition_number
    compared = None if masks is None else dense
    return Network(
        label=label,
        sparsity=0.0 if masks is None else round(masks.sparsity, 6),
        size=len(gram),
        eigenvalues=tuple(spectrum.values.tolist()),
        trace=float(gram.diagonal().double().sum()),
        condition_number=None if condition in (None, float("inf")) else condition,
        effective_rank=spectrum.effective_rank,
        largest_stable_lr=spectrum.largest_stable_lr if spectrum.largest > 0 else 0.0,
        alignment=None if compared is None else _alignment(compared, gram),
        distance=None if compared is None else ntk.distance(compared, gram),
        seconds=round(seconds, 1),
    )


def _alignment(first: Tensor, second: Tensor) -> float:
    try:
        return ntk.alignment(first, second)
    except SapwoodError:  # a network through which nothing flows any more
        return 0.0


def _name(model: nn.Module, x: Tensor, masks: Masks | None, config: KernelConfig, origin: object) -> str:
    """Names a kernel by all that it depends on."""
    parts = {
        "config": [config.batchnorm, config.batch_size],
        "inputs": x,
        "model": identity.structure(model),
        "weights": model.state_dict(),
        "masks": None if masks is None else dict(masks),
        "versions": identity.versions(),
        "origin": origin,
    }
    return f"{DENSE if masks is None else 'masked'}-{checksum(parts)[:16]}"


def _kept(path: Path) -> tuple[Tensor | None, float]:
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            return torch.from_numpy(file["kernel"]).double(), float(file["seconds"])
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        BadZipFile,
    ):  # missing or damaged
        return None, 0.0


def _keep(path: Path, gram: Tensor, seconds: float) -> None:
    content = io.BytesIO()
    np.savez(content, kernel=gram.numpy(), seconds=seconds)
    write_in_one_step(path, content.getvalue())
