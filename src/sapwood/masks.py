"""Masks: which weights are kept, as an immutable value with names, algebra and a file format.

A mask says 1 = keep. Masks know nothing of models, optimizers or attaching: they meet a model only as a mapping from
parameter name to tensor (`dict(model.named_parameters())`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors
from torch import Tensor

from sapwood.errors import MaskError, MaskFileError
from sapwood.files import write_in_one_step

FORMAT = "sapwood-masks"
VERSION = "1"
WRAPPERS = ("_orig_mod", "_forward_module")


class Count(NamedTuple):
    """Kept and total weights of one layer or of all."""

    kept: int
    total: int

    @property
    def density(self) -> float:
        """Share of the weights that is kept, 0 to 1."""
        return self.kept / self.total if self.total else 1.0


def clean_name(name: str) -> str:
    """Strips what DDP (`module.`), `torch.compile` (`_orig_mod.`) and Fabric (`_forward_module.`) put into a name.

    >>> clean_name("module._orig_mod.fc.weight")
    'fc.weight'
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]  # a compiled submodule has one in the middle
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def clean_names(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under names without wrapper prefixes."""
    return {clean_name(name): tensor for name, tensor in named.items()}


def fingerprint(named: Mapping[str, Tensor]) -> str:
    """Identifies an architecture: a hash of its parameter names and shapes (never of their values)."""
    lines = sorted(f"{name}:{tuple(tensor.shape)}" for name, tensor in clean_names(named).items())
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
        for name, mask in self.tensors.items():
            if mask.dtype != torch.bool:
                raise MaskError(f"The mask of {name!r} has dtype {mask.dtype}; masks are bool tensors (mask != 0).")
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
        return Masks({name: operation(mask, other[name].to(mask.device)) for name, mask in self.items()})

    # Use.

    def apply(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Effective weights: `params` with the masked ones multiplied by their masks. Nothing is changed in place."""
        return {name: p * self[name].to(p.dtype) if name in self else p for name, p in params.items()}

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
            named: `dict(model.named_parameters())`; wrapper prefixes are ignored.
            strict: Also compare the model's fingerprint with the one in the provenance, if it has one.

        Raises:
            MaskError: a masked name is missing, a shape differs, or the fingerprint is another model's.
        """
        params = clean_names(named)
        for name, mask in self.items():
            if name not in params:
                raise MaskError(f"The masks belong to another model: it has no parameter {name!r}.")
            if params[name].shape != mask.shape:
                raise MaskError(
                    f"The masks belong to another model: {name!r} has shape {tuple(params[name].shape)} in the model "
                    f"and {tuple(mask.shape)} in the masks."
                )
        origin = self.provenance.get("fingerprint")
        if strict and origin and origin != fingerprint(params):
            raise MaskError(
                f"The masks belong to another model: all masked layers fit, but the fingerprint is {origin} where the "
                f"model's is {fingerprint(params)}. Pass strict=False to use them all the same."
            )

    # Files.

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: one bit per weight, with shapes and provenance. Replaces `path` in one step."""
        packed = {name: np.packbits(mask.cpu().numpy().ravel()) for name, mask in self.items()}
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "shapes": json.dumps({name: list(mask.shape) for name, mask in self.items()}),
            "provenance": json.dumps(dict(self.provenance)),
        }
        metadata["sha256"] = _checksum(metadata, packed)
        write_in_one_step(Path(path), to_safetensors(packed, metadata))

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Reads a file that `save` wrote.

        Raises:
            MaskFileError: the file is missing, damaged, no mask file, or of another format version.
        """
        try:
            with safe_open(str(path), framework="np") as file:
                metadata = file.metadata() or {}
                packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        except FileNotFoundError as error:
            raise MaskFileError(f"There is no mask file {str(path)!r}.") from error
        except (SafetensorError, OSError) as error:
            raise MaskFileError(
                f"{str(path)!r} is not a readable mask file (truncated, or not safetensors): {error}."
            ) from error
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise MaskFileError(
                f"{str(path)!r} is not a Sapwood mask file of version {VERSION}: its format is "
                f"{metadata.get('format')!r}, its version {metadata.get('version')!r}."
            )
        if metadata.get("sha256", _checksum(metadata, packed)) != _checksum(metadata, packed):
            raise MaskFileError(f"{str(path)!r} is damaged: its content contradicts its checksum.")
        shapes = json.loads(metadata["shapes"])
        tensors = {
            name: _unpack(packed.get(name), shape, f"{name!r} in {str(path)!r}") for name, shape in shapes.items()
        }
        return cls(tensors, json.loads(metadata["provenance"]))


def _checksum(metadata: Mapping[str, str], packed: Mapping[str, np.ndarray]) -> str:
    """Of all that a file says; one of an older version has none."""
    digest = hashlib.sha256()
    for key in ("shapes", "provenance"):
        digest.update(metadata.get(key, "").encode())
    for name in sorted(packed):
        digest.update(name.encode())
        digest.update(packed[name].tobytes())
    return digest.hexdigest()


def _order(length: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(length, generator=generator, device=generator.device)


def _unpack(bits: np.ndarray | None, shape: list[int], where: str) -> Tensor:
    size = int(np.prod(shape, dtype=np.int64))
    if bits is None or bits.dtype != np.uint8 or bits.size != (size + 7) // 8:
        raise MaskFileError(f"The mask of {where} is missing or does not fit its shape {shape}: the file is damaged.")
    return torch.from_numpy(np.unpackbits(bits, count=size).astype(bool).reshape(shape))


def text_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Aligns columns: the first two to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)
