"""What it costs to look at a model before it is scored, beside the searches that the looks precede.

    python benchmarks/looks.py --repeats 5

Reading a model and the two looks at it (half-masked weights on two samples) take the same time whatever follows; each
method is timed with them, one mini-batch of it where it has many.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import drive
import table


def main(arguments: Sequence[str]) -> None:
    """Measures, writes the JSON after every measurement, and its table at the end."""
    chosen = parser().parse_args(arguments)
    out, rows = Path(chosen.out), []
    for case in chosen.models:
        for repeat in range(chosen.repeats):
            for method in chosen.methods:
                rows.append(drive.measure(case, method, 1, extent="part") | {"repeat": repeat})
                drive.save(out, rows)
                print(case, method, rows[-1].get("look_cpu_s", rows[-1].get("error")), flush=True)

    out.with_suffix(".md").write_text(table.looks(rows, drive.machine()), encoding="utf-8")
    print(f"{out}\n{out.with_suffix('.md')}")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--models", nargs="+", default=("resnet20", "resnet50", "vit-s"))
    told.add_argument("--methods", nargs="+", default=("magnitude", "snip", "ntk-sap-analytic", "ntk-sap"))
    told.add_argument("--repeats", type=int, default=5)
    told.add_argument("--out", default="benchmarks/results/looks.json")
    return told


if __name__ == "__main__":
    main(sys.argv[1:])
