"""Masks: which weights are kept, as an immutable value with names, algebra and a file format.

A mask says 1 = keep. Masks know nothing of models, optimizers or attaching: they meet a model only as a mapping from
parameter name to tensor (`dict(model.named_parameters())`). Their names are clean, without what wrappers put into them:
`sapwood.names` looks at a model and translates; where there is only a mapping, `matched` compares words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapwood import mask_files
from sapwood.errors import MaskError
from sapwood.files import write_in_one_step
from sapwood.text import text_table

WRAPPERS = ("_orig_mod", "_forward_module")
WORDS = (*WRAPPERS, "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Count(NamedTuple):
    """Kept and total weights of one layer or of all."""

    kept: int
    total: int

    @property
    def density(self) -> float:
        """Share of the weights that is kept, 0 to 1."""
        return self.kept / self.total if self.total else 1.0


def clean_name(name: str) -> str:
    """Strips what DDP (`module.`), `torch.compile` (`_orig_mod.`) and Fabric (`_forward_module.`) put before a name.

    A guess by words, for state dicts and fingerprints, where there is no module to look at: see `sapwood.names`.

    >>> clean_name("module._orig_mod.fc.weight")
    'fc.weight'
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]  # a compiled submodule has one in the middle
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def matched(names: Iterable[str], named: Iterable[str]) -> dict[str, str]:
    """For each of `names` the one of `named` that is equal to it, or else equal but for the words of wrappers.

    Raises:
        MaskError: there is none, or words alone cannot tell which.
    """
    names, known = list(names), dict.fromkeys(named)
    alike: dict[str, list[str]] = {}
    for name in known:
        alike.setdefault(_bare(name), []).append(name)
    found: dict[str, str] = {}
    for name in names:
        candidates = [name] if name in known else alike.get(_bare(name), [])
        if not candidates:
            raise MaskError(f"The masks belong to another model: it has no parameter {name!r}.")
        if len(candidates) > 1:
            raise MaskError(
                f"The model has no parameter {name!r}, and both {candidates[0]!r} and {candidates[1]!r} are that name "
                "in wrappers: give the masks the names that the model's parameters have."
            )
        found[name] = candidates[0]
    if len(set(found.values())) < len(found):
        other, name = _both(found)
        raise MaskError(f"The masks {other!r} and {name!r} are both of the model's {found[name]!r}: keep one of them.")
    return found


def _both(found: Mapping[str, str]) -> tuple[str, str]:
    """The first two keys that share a value."""
    owners: dict[str, str] = {}
    return next((o, key) for key, value in found.items() if (o := owners.setdefault(value, key)) != key)


def _bare(name: str) -> str:
    *path, leaf = name.split(".")
    return ".".join([*(part for part in path if part not in WORDS), leaf])


def fingerprint(named: Mapping[str, Tensor]) -> str:
    """Identifies an architecture: a hash of its parameter names and shapes (never of their values)."""
    lines = sorted(f"{clean_name(name)}:{tuple(tensor.shape)}" for name, tensor in named.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False, repr=False)
class Masks(Mapping[str, Tensor]):
    """A read-only mapping from parameter name to a bool tensor of the parameter's shape; True = kept.

    Attributes:
        tensors: The masks, in the model's parameter order.
        provenance: How they came about (method, its fields, seed, target, versions, model fingerprint); JSON values.

    Raises:
        MaskError: a tensor is not of dtype bool.
    """

    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, Mapping) or not isinstance(self.provenance, Mapping):
            raise MaskError(
                "Masks are made of a mapping from parameter name to bool tensor, and one of their provenance."
            )
        for name, mask in self.tensors.items():
            came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            if came != torch.bool:
                raise MaskError(f"The mask of {name!r} is of {came}; masks are tensors of dtype bool (mask != 0).")
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @classmethod
    def dense(cls, params: Mapping[str, Tensor]) -> Masks:
        """Keeps every weight of `params`."""
        return cls({name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()})

    # The mapping.

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"Masks({len(self)} layers, {self.kept:,} of {self.total:,} weights kept, sparsity {self.sparsity:.2%})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Masks, (dict(self.tensors), dict(self.provenance))  # a mappingproxy can be neither pickled nor copied

    # Counts.

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(count.kept for count in self.per_layer().values())

    @property
    def total(self) -> int:
        """Number of weights under these masks, kept or not."""
        return sum(mask.numel() for mask in self.values())

    @property
    def density(self) -> float:
        """Share of the weights that is kept, 0 to 1."""
        return Count(self.kept, self.total).density

    @property
    def sparsity(self) -> float:
        """Share of the weights that is pruned, 0 to 1."""
        return 1.0 - self.density

    def per_layer(self) -> dict[str, Count]:
        """Kept and total weights of every layer, in order."""
        return {name: Count(int(mask.count_nonzero()), mask.numel()) for name, mask in self.items()}

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Names of the layers in which nothing is kept."""
        return tuple(name for name, count in self.per_layer().items() if not count.kept)

    def table(self) -> str:
        """The layers as a plain-text table: name, shape, kept, total, density."""
        rows = [
            (name, "x".join(map(str, self[name].shape)), f"{c.kept:,}", f"{c.total:,}", f"{c.density:8.2%}")
            for name, c in self.per_layer().items()
        ]
        rows.append(("all", "", f"{self.kept:,}", f"{self.total:,}", f"{self.density:8.2%}"))
        return text_table(("layer", "shape", "kept", "weights", "density"), rows)

    # Algebra.

    def __and__(self, other: Masks) -> Masks:
        return self._combine(other, torch.logical_and)

    def __or__(self, other: Masks) -> Masks:
        return self._combine(other, torch.logical_or)

    def __invert__(self) -> Masks:
        return Masks({name: ~mask for name, mask in self.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return list(self) == list(other) and all(torch.equal(mask, other[name]) for name, mask in self.items())

    def __le__(self, other: Masks) -> bool:
        """True where every weight kept here is kept in `other` too (nested masks)."""
        return (self & other) == self

    __hash__ = None  # type: ignore[assignment]  # equality by content, as for dict

    def _combine(self, other: Masks, operation: Any) -> Masks:
        other.check(self, strict=False)
        self.check(other, strict=False)
        theirs = matched(self, other)
        return Masks({name: operation(mask, other[theirs[name]].to(mask.device)) for name, mask in self.items()})

    # Use.

    def apply(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Effective weights: `params` with the masked ones multiplied by their masks. Nothing is changed in place.

        Raises:
            MaskError: `params` lacks a masked name.
        """
        masks = {theirs: self[name] for name, theirs in matched(self, params).items()}
        return {name: p * masks[name].to(p.dtype) if name in masks else p for name, p in params.items()}

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on `device`."""
        return replace(self, tensors={name: mask.to(device) for name, mask in self.items()})

    def shuffled(self, generator: torch.Generator, *, taps: bool = False) -> Masks:
        """Permutes every mask inside its layer: same counts, random positions (Frankle et al. 2021's sanity check).

        Args:
            generator: Source of the permutations.
            taps: Also keep the count of every kernel tap: a convolution's weights, (out, in, *kernel), change places
                only with others of the same position in the kernel. Other weights have one tap.
        """
        tensors = {}
        for name, mask in self.items():
            by_tap = mask.flatten(2) if taps and mask.dim() > 2 else mask.reshape(-1, 1)
            by_tap = by_tap.reshape(-1, by_tap.shape[-1])  # (out x in, taps)
            columns = [column[_order(len(column), generator).to(mask.device)] for column in by_tap.unbind(1)]
            tensors[name] = torch.stack(columns, 1).reshape(mask.shape)
        return Masks(tensors, {**self.provenance, "shuffled": "taps" if taps else True})

    def check(self, named: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Checks that the masks fit a model, given as a mapping from parameter name to tensor.

        Args:
            named: `dict(model.named_parameters())`; the words of wrappers in its names are ignored.
            strict: Also compare the model's fingerprint with the one in the provenance, if it has one.

        Raises:
            MaskError: a masked name is missing, a shape differs, or the fingerprint is another model's.
        """
        for name, theirs in matched(self, named).items():
            if named[theirs].shape != self[name].shape:
                raise MaskError(
                    f"The masks belong to another model: {name!r} has shape {tuple(named[theirs].shape)} in the model "
                    f"and {tuple(self[name].shape)} in the masks."
                )
        origin = self.provenance.get("fingerprint")
        if strict and origin and origin != fingerprint(named):
            raise MaskError(
                f"The masks belong to another model: all masked layers fit, but the fingerprint is {origin} where the "
                f"model's is {fingerprint(named)}. Pass strict=False to use them all the same."
            )

    # Files.

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: one bit per weight, with shapes and provenance. Replaces `path` in one step.

        Equal masks with an equal provenance give files that are equal to the byte.

        Raises:
            MaskError: the provenance is not made of JSON values, or what the program reads from it has another type.
            OSError: there is no such folder, or no room.
        """
        write_in_one_step(Path(path), mask_files.encoded(self, self.provenance))

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Reads a file that `save` wrote.

        Raises:
            MaskFileError: the file is missing, damaged, no mask file, or of another format version.
        """
        return cls(*mask_files.read(Path(path)))


def _order(length: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(length, generator=generator, device=generator.device)
