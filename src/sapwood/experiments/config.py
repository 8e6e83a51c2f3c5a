"""What a run is, as data: everything that its result depends on, and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from sapwood.checks import Count, Known, Natural, OneOf, Range, Resolution, Seed, check
from sapwood.experiments.environment import is_device_name
from sapwood.masks import Masks
from sapwood.methods import AFTER_TRAINING
from sapwood.text import visible
from sapwood.training import TrainConfig

DENSE = "dense"
ALWAYS = ("data", "model", "method")  # part of a run's identity even where they have their default values
CONTROLS = {
    "shuffle": "the method's masks, shuffled inside each layer",
    "shuffle-taps": "shuffled inside each layer and kernel tap",
    "reinit": "the method's masks, over initial weights that it did not see",
    "invert": "the lowest scores kept instead of the highest",
}
"""Sanity checks of a method's masks (Frankle et al. 2021). Random masks with a method's layer densities are no fifth:
a shuffle is uniform among the masks with these counts, whatever it shuffles."""
SAME_LAYERS = ("shuffle", "shuffle-taps", "reinit")  # the layer densities are the method's
RETRAINING = ("fine-tune", "rewind-weights", "rewind-lr")
# Apart, because NTK-SAP's first fresh weights would be the initial ones if both came from one seed.
INIT_SEED, ORDER_SEED, CONTROL_SEED = 10_000, 20_000, 30_000


@dataclass(frozen=True)
class RunConfig:
    """One pruning and one training.

    Attributes:
        data: Name of the data set.
        model: Name of the model.
        method: Name of the pruning method; "dense" prunes nothing.
        density: Share of the prunable weights that is kept.
        fields: Fields of the method that differ from the method table.
        resolution: Pixels that images are brought to; None keeps theirs.
        per_class: Training images of each class that SNIP and its like score on.
        min_per_layer: Weights that every layer keeps at least.
        masks: Hash of the mask file that was given instead of pruning here; None: no file.
        control: A name of `CONTROLS`: "shuffle" permutes the method's masks inside each layer, "shuffle-taps" inside
            each layer and kernel tap, "reinit" trains other initial weights under them, "invert" keeps the lowest
            scores in every round; "" does none of it.
        seed: Of the masks; initial weights and data order have seeds that follow from it.
        train: How it is trained.
        retrain: "" prunes before training. Otherwise the dense network is trained first, as `train` says, and pruned
            then, and the rest is trained again: "fine-tune" at the last learning rate (Han et al. 2015),
            "rewind-weights" from the weights and learning rate of an early epoch (Frankle et al. 2020), "rewind-lr"
            from the trained weights with the learning rate of an early epoch (Renda et al. 2020).
        rewind_epoch: That epoch; 0 is the beginning.
        rate: Share of the remaining weights that a level of training and pruning removes; None: all in one level.
    """

    data: str
    model: str
    method: str = DENSE
    density: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    fields: Mapping[str, Any] = field(default_factory=dict)
    resolution: Resolution | None = None
    per_class: Count = 10
    min_per_layer: Natural = 0
    masks: str | None = None
    control: Annotated[str, OneOf("control", ("", *CONTROLS))] = ""
    seed: Seed = 0
    train: TrainConfig = field(default_factory=TrainConfig)
    retrain: str = ""
    rewind_epoch: Natural = 0
    rate: float | None = None

    def __post_init__(self) -> None:
        """Refuses values out of range.

        Raises:
            ConfigError: one is.
        """
        check(self)

    @property
    def label(self) -> str:
        """What tables and figures call it: the method and what is particular about it, as `ntk-sap@rounds=5`."""
        retraining = {"retrain": self.retrain, "rewind_epoch": self.rewind_epoch, "rate": self.rate}
        return label_of(self.method, self.fields, self.control, retraining)

    @property
    def id(self) -> str:
        """Names the run's folder: a hash of what differs from the defaults, so that a new field keeps old names."""
        return hashlib.sha256(json.dumps(self.meaning(), sort_keys=True).encode()).hexdigest()[:12]

    def meaning(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and always data, model and method."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = RunConfig(self.data, self.model)
        changed = {k: v for k, v in own.items() if k in ALWAYS or v != getattr(plain, k)}
        if "train" in changed:
            default = dataclasses.asdict(TrainConfig())
            changed["train"] = {k: v for k, v in dataclasses.asdict(self.train).items() if v != default[k]}
        return changed

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return {**dataclasses.asdict(self), "fields": dict(self.fields)}


@dataclass(frozen=True)
class Place:
    """Where a run is computed; not part of what it means.

    Attributes:
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:0".
        data_root: Folder of the data sets; None takes $SAPWOOD_DATA, else the user's cache. For the data set "folder",
            the image folder itself.
        offline: Never download anything.
    """

    device: Annotated[str, Known(is_device_name)] = "auto"
    data_root: Path | None = None
    offline: bool = False


def label_of(method: str, fields: Mapping[str, Any], control: str, retraining: Mapping[str, Any] | None = None) -> str:
    """`ntk-sap@rounds=5,control=shuffle`, fields in alphabetical order; `imp@rewind_epoch=2` after training."""
    method, retrained = _retrained(method, {k: v for k, v in (retraining or {}).items() if v not in ("", 0, None)})
    particulars = {**dict(sorted(fields.items())), **retrained, **({"control": control} if control else {})}
    text = ",".join(f"{key}={_plain(value)}" for key, value in particulars.items())
    return f"{method}@{text}" if text else method


def _retrained(method: str, retraining: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name that a method has where it prunes after training, and what differs from that name's defaults."""
    for name, (scored_by, usual) in AFTER_TRAINING.items():
        alike = method == scored_by and retraining.get("retrain") == usual["retrain"]
        if alike and ("rate" in retraining) == ("rate" in usual):
            return name, {key: value for key, value in retraining.items() if usual.get(key) != value}
    return method, retraining


def _plain(value: Any) -> str:
    """A field's value as one types it: 0 and 1e-6 rather than 0.0 and 1e-06, false rather than False."""
    if isinstance(value, float):
        short = f"{value:g}"
        return (short if float(short) == value else str(value)).replace("e-0", "e-")
    return str(value).lower() if isinstance(value, bool) else visible(value)


def seeded(train: TrainConfig, seed: int) -> TrainConfig:
    """The same training with the data order of a run's seed."""
    return TrainConfig(**{**dataclasses.asdict(train), "seed": seed + ORDER_SEED})


def under(config: RunConfig, masks: Masks) -> RunConfig:
    """The run of the same model under masks that were found before."""
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(name.encode())
        digest.update(mask.numpy().tobytes())
    method = str(masks.provenance.get("method", "unknown"))
    density = round(masks.density, 12)
    return dataclasses.replace(config, method=method, density=density, masks=digest.hexdigest()[:16])
