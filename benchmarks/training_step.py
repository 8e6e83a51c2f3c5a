"""What `attach` adds to a training step: CPU-seconds of the same step with and without masks, turn by turn.

    python benchmarks/training_step.py --models resnet20 --batch-sizes 128 --repeats 40

Two equal models train on equal batches in one process, A B A B ..., since a machine's speed drifts; "added" is the
median of the differences within pairs over the median step without masks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import drive
import table
import torch
from torch import nn

import sapwood
from sapwood import models

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
}


def main(arguments: Sequence[str]) -> None:
    """Measures, writes the JSON after every network, and its table at the end."""
    chosen = parser().parse_args(arguments)
    torch.set_num_threads(1)
    out = Path(chosen.out)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if chosen.append else []
    for name in chosen.models:
        for optimizer in chosen.optimizers:
            for size in chosen.batch_sizes:
                row = {"step": f"{name}, {optimizer}", "batch_size": size, "torch": torch.__version__}
                row |= measured(name, OPTIMIZERS[optimizer], size, chosen.repeats)
                rows.append(row | {"sapwood": sapwood.__version__})
                drive.save(out, rows)
                print(name, optimizer, size, f"{added(row):.2%}", flush=True)
    out.with_suffix(".md").write_text(table.steps(rows, drive.machine()), encoding="utf-8")
    print(f"{out}\n{out.with_suffix('.md')}")


def measured(
    name: str, optimizer: Callable[[nn.Module], torch.optim.Optimizer], size: int, repeats: int
) -> dict[str, list[float]]:
    """CPU-seconds of every step, in order; the first three of each are left out."""
    plain, masked = (steps(name, optimizer, size, masked=masked) for masked in (False, True))
    for _ in range(3):
        next(plain)
        next(masked)
    pairs = [(next(plain), next(masked)) for _ in range(repeats)]
    return {"plain_s": [pair[0] for pair in pairs], "masked_s": [pair[1] for pair in pairs]}


def steps(
    name: str, build: Callable[[nn.Module], torch.optim.Optimizer], size: int, *, masked: bool
) -> Iterator[float]:
    """Trains without end, and says what each step took."""
    torch.manual_seed(0)
    model = models.create(name, num_classes=10)
    optimizer = build(model)
    masks = sapwood.prune(model, method="random", sparsity=0.95, seed=0).masks
    if masked:
        sapwood.attach(masks, model, optimizer)
    images, labels = torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))

    while True:
        begin = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        yield time.process_time() - begin


def added(row: dict[str, list[float]]) -> float:
    """Share of a step that masks add."""
    differences = [after - before for before, after in zip(row["plain_s"], row["masked_s"], strict=True)]
    return statistics.median(differences) / statistics.median(row["plain_s"])


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--models", nargs="+", default=["resnet20"], help="Sapwood's own, for 32x32 images")
    told.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    told.add_argument("--batch-sizes", nargs="+", type=int, default=[16, 128])
    told.add_argument("--repeats", type=int, default=40)
    told.add_argument("--append", action="store_true", help="add to the measurements that OUT has")
    told.add_argument("--out", default="benchmarks/results/training_step.json")
    return told


if __name__ == "__main__":
    main(sys.argv[1:])
