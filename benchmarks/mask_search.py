"""Seconds, memory and FLOPs of a full mask search, method by method, beside the published procedure.

    python benchmarks/mask_search.py --models resnet20 --methods published ntk-sap --threads 1 --repeats 3

Measurements of a network interleave (A B A B ...), since a machine's speed drifts. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import drive
import table
from cases import CASES

LOW_NOISE = "ntk-sap-analytic@epsilon=0,noise=lognormal"
MONTE_CARLO = (
    "published",
    "ntk-sap",
    "ntk-sap@merged_statistics=true",
    "ntk-sap@resamples=1,samples=16",
    "ntk-sap-jvp",
)
METHODS = (*MONTE_CARLO, "ntk-sap-analytic", LOW_NOISE, f"{LOW_NOISE},positions=flat", "synflow", "snip", "grasp")


def main(arguments: Sequence[str]) -> None:
    """Measures, writes the JSON after every measurement, and its table at the end."""
    chosen = parser().parse_args(arguments)
    out = Path(chosen.out)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if chosen.append else []
    for row in measurements(chosen):
        rows.append(row)
        drive.save(out, rows)
        seconds = f"{row['cpu_s']:.1f} CPU-s" if "cpu_s" in row else row.get("error", "counted")
        print(row["case"], row["method"], f"{row['threads']} threads", seconds, flush=True)
    out.with_suffix(".md").write_text(table.searches(rows, drive.machine()), encoding="utf-8")
    print(f"{out}\n{out.with_suffix('.md')}")


def measurements(chosen: argparse.Namespace) -> Iterator[drive.Row]:
    """Every measurement of a run, in order."""
    for case in chosen.models:
        for threads in chosen.threads:
            for repeat in range(chosen.repeats):
                for method in ("gemm", *chosen.methods):
                    yield drive.measure(case, method, threads, extent=chosen.extent) | {"repeat": repeat}
        if chosen.flops:
            for method in chosen.methods:
                yield drive.measure(case, method, max(chosen.threads), count=True, extent="part")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--models", nargs="+", choices=list(CASES), default=[name for name in CASES if name != "tiny"])
    told.add_argument("--methods", nargs="+", default=METHODS, help='"published", or NAME@FIELD=VALUE,...')
    told.add_argument("--threads", nargs="+", type=int, default=sorted({1, drive.cores()}))
    told.add_argument("--repeats", type=int, default=3)
    told.add_argument(
        "--extent",
        choices=("auto", "whole", "part"),
        default="auto",
        help='"whole" searches, one mini-batch of each ("part"), or a part where a search takes hours ("auto")',
    )
    told.add_argument("--flops", action=argparse.BooleanOptionalAction, default=True, help="count them, once a method")
    told.add_argument("--append", action="store_true", help="add to the measurements that OUT has")
    told.add_argument("--out", default="benchmarks/results/mask_search.json")
    return told


if __name__ == "__main__":
    main(sys.argv[1:])
