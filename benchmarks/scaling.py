"""How the time and memory of a mask search grow with depth, width, resolution and classes.

    python benchmarks/scaling.py --methods published ntk-sap --repeats 3

One axis at a time, around a ResNet-20 with 32x32 inputs, 16 channels and 10 classes. One mini-batch of 32 inputs is
measured for the Monte-Carlo methods, a whole search for the others. The exponent is the slope of log seconds (or log
bytes) over the log of the size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import drive
import table

_ONE = {"budget": {"rounds": 1, "resamples": 1, "samples": 32}, "batch_size": 32, "labelled": 32}

AXES: dict[str, dict[int, dict[str, Any]]] = {
    "depth": {n: {"model": f"resnet{n}"} for n in (20, 32, 56, 110)},
    "width": {n: {"settings": {"widths": (n, 2 * n, 4 * n)}} for n in (8, 16, 32, 64)},
    "resolution": {n: {"input_shape": (3, n, n)} for n in (16, 32, 64, 128)},
    "classes": {n: {"num_classes": n} for n in (10, 100, 1000, 10_000)},
}


def main(arguments: Sequence[str]) -> None:
    """Measures, writes the JSON after every measurement, and its table at the end."""
    chosen = parser().parse_args(arguments)
    out, rows = Path(chosen.out), []
    for axis in chosen.axes:
        sizes = list(AXES[axis])[: chosen.sizes]
        for repeat in range(chosen.repeats):
            for size in sizes:
                for method in chosen.methods:
                    changes = {"density": 0.05, **_ONE, **AXES[axis][size]}
                    row = drive.measure(chosen.case, method, chosen.threads, changes=changes)
                    rows.append(row | {"axis": axis, "size": size, "repeat": repeat})
                    drive.save(out, rows)
                    print(axis, size, method, row.get("cpu_s", row.get("error")), flush=True)
    out.with_suffix(".md").write_text(table.growth(rows, drive.machine()), encoding="utf-8")
    print(f"{out}\n{out.with_suffix('.md')}")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    told.add_argument("--sizes", type=int, default=4, help="how many sizes of each axis, from the smallest")
    told.add_argument("--methods", nargs="+", default=("published", "ntk-sap", "ntk-sap-analytic"))
    told.add_argument("--threads", type=int, default=1)
    told.add_argument("--repeats", type=int, default=3)
    told.add_argument("--case", default="resnet20", help=argparse.SUPPRESS)
    told.add_argument("--out", default="benchmarks/results/scaling.json")
    return told


if __name__ == "__main__":
    main(sys.argv[1:])
