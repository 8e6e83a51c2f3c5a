"""Whether a comparison's folder holds runs of what is asked for now: of the same data, model and code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sapwood.errors import ConfigError, DataError, SapwoodWarning
from sapwood.experiments import identity, levels, store
from sapwood.experiments.config import Place, RunConfig
from sapwood.experiments.identity import Identity
from sapwood.experiments.material import create_model, load_data
from sapwood.experiments.store import RunFolder, RunResult

Results = Mapping[str, RunResult | None]


def run_folder(out: Path, config: RunConfig) -> Path:
    """Where a comparison keeps a run."""
    return out / "runs" / config.id


def check(configs: Sequence[RunConfig], results: Results, out: Path, place: Place) -> None:
    """Makes sure, before anything is run, that every run can be made and that those that have begun can be used.

    Args:
        configs: The runs of the comparison.
        results: Of the finished ones, by the run's id; None for the others.
        out: The comparison's folder.
        place: Where the data are.

    Raises:
        SapwoodError: what would make every run fail: data, or a model, that is not there.
        ConfigError: something that runs in the folder depend on has changed.
    """
    every = {each.id: each for config in configs for each in (*levels.chain(config), config)}
    before = {name: identity.read(run_folder(out, config)) for name, config in every.items()}
    unknown = [name for name, result in results.items() if result is not None and before[name] is None]
    if unknown:
        _warn(
            f"{len(unknown)} finished runs in {out / 'runs'} are of an older version, which did not note the data and "
            "code that they depend on: they are taken as they are."
        )

    known = [config for name, config in every.items() if before[name] is not None]
    if not known and all(results.values()):
        return
    try:
        changed = dict(_changed(known or configs[:1], out, place, results))
    except DataError as error:
        if not all(results.values()):
            raise
        _warn(f"It is not known whether the data are those of the finished runs in {out / 'runs'}: {error}")
        return

    if changed:
        words = dict.fromkeys(word for found in changed.values() for word in found)
        raise ConfigError(identity.refusal(list(changed), list(words)))


def _changed(
    configs: Sequence[RunConfig], out: Path, place: Place, results: Results
) -> Iterator[tuple[Path, list[str]]]:
    """What has changed for each run that has left something, by its folder."""
    models: dict[object, Identity] = {}
    for config in configs:
        dataset = load_data(config.data, config.resolution, place)
        key = (config.data, config.resolution, config.model, config.seed)
        if key not in models:  # runs of a seed begin from the same weights
            models[key] = identity.of_model(config, create_model(config.model, dataset, config.seed))

        now = {**identity.inputs(config, dataset), **models[key]}
        folder = run_folder(out, config)
        finished = store.read_result(folder) is not None
        changed = identity.changes(folder, now, finished=finished)
        if changed and (finished or RunFolder(folder, config).half_done()):
            yield folder, changed


def _warn(message: str) -> None:
    warnings.warn(message, SapwoodWarning, stacklevel=4)
