"""Tables of measurements: `python benchmarks/table.py benchmarks/results/mask_search.json` prints one."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def searches(rows: list[Row], machine: dict[str, str]) -> str:
    """One table a network: medians over repeats, with least and most."""
    parts = [_heading(rows, machine)]
    for case in _distinct(rows, "case"):
        mine = [row for row in rows if row["case"] == case]
        threads = _distinct(mine, "threads")
        parts += [f"## {case}\n", _table(_search_head(threads), _search_lines(mine, threads))]
    return "\n".join(parts)


def growth(rows: list[Row], machine: dict[str, str]) -> str:
    """One table an axis, with the exponents of time and memory."""
    parts = [_heading(rows, machine)]
    for axis in _distinct(rows, "axis"):
        mine = [row for row in rows if row["axis"] == axis and "error" not in row]
        sizes = _distinct(mine, "size")
        head = ["method", *(f"{axis} {size:,}: CPU-s (MB)" for size in sizes), "exponent of time", "of memory"]
        parts += [
            f"## {axis}\n",
            _table(head, [_growth_line(mine, method, sizes) for method in _distinct(mine, "method")]),
        ]
    return "\n".join(parts)


def looks(rows: list[Row], machine: dict[str, str]) -> str:
    """One line a network and method: CPU seconds of reading, of looking and of the whole search; the looks' share."""
    lines = []
    for case in _distinct(rows, "case"):
        for method in _distinct(rows, "method"):
            mine = [row for row in rows if (row["case"], row["method"]) == (case, method) and "cpu_s" in row]
            if not mine:
                continue
            reads, seconds = ([row[key] for row in mine] for key in ("read_cpu_s", "look_cpu_s"))
            searches = [_with_looks(row) for row in mine]
            shares = [100 * look / search for look, search in zip(seconds, searches, strict=True)]
            cells = map(_spread, (reads, seconds, searches, shares))
            lines.append([case, method, *cells, _basis(mine[0])])
    head = ["network", "method", "reading, CPU-s", "looking, CPU-s", "whole search, CPU-s", "looking, %", "from"]
    return "\n".join([_heading(rows, machine), _table(head, lines)])


def _with_looks(row: Row) -> float:
    """CPU seconds of the whole search, the looks in it once."""
    whole = row["mini_batches"] == row["all_mini_batches"]
    return float(row["cpu_s"]) if whole else _full(row, "cpu_s") + row["read_cpu_s"] + row["look_cpu_s"]


def steps(rows: list[Row], machine: dict[str, str]) -> str:
    """One line a network, optimizer and batch size: what masks add to a training step."""
    head = ["network and optimizer", "batch", "CPU-ms a step", "with masks", "added, ms", "added, %", "pairs"]
    return "\n".join([_heading(rows, machine), _table(head, [_step_line(row) for row in rows])])


def _step_line(row: Row) -> list[str]:
    plain, masked = ([1000 * seconds for seconds in row[key]] for key in ("plain_s", "masked_s"))
    middle = statistics.median(plain)
    added = [after - before for before, after in zip(plain, masked, strict=True)]
    quarters = statistics.quantiles([100 * each / middle for each in added], n=4)
    share = f"{quarters[1]:.2f} (quartiles {quarters[0]:.2f} to {quarters[2]:.2f})"
    cells = [_spread(plain), _spread(masked), f"{statistics.median(added):.2f}", share]
    return [row["step"], str(row["batch_size"]), *cells, str(len(plain))]


def _search_head(threads: Iterable[int]) -> list[str]:
    timed = [f"{kind}, {n} thread{'s' * (n > 1)}" for n in threads for kind in ("CPU-s", "wall s")]
    return [
        "method",
        *timed,
        "times as fast as published",
        "peak MB above the model",
        "GFLOP",
        "share of GEMM rate",
        "from",
    ]


def _search_lines(rows: list[Row], threads: list[int]) -> list[list[str]]:
    lines = []
    for method in (name for name in _distinct(rows, "method") if name != "gemm"):
        mine = [row for row in rows if row["method"] == method and not row["count"]]
        failed = [row["error"] for row in mine if "error" in row]
        if failed:
            lines.append([method, failed[0]])
            continue
        times = [
            _spread([_full(r, key) for r in mine if r["threads"] == n]) for n in threads for key in ("cpu_s", "wall_s")
        ]
        memory = _spread([(row["peak_bytes"] - row["before_bytes"]) / 2**20 for row in mine])
        flops = _flops(rows, method)
        ratio = _ratio(rows, method, threads[0])
        share = _share(rows, mine, flops, threads[0])
        lines.append(
            [method, *times, ratio, memory, "" if flops is None else _number(flops / 1e9), share, _basis(mine[0])]
        )
    return lines


def _growth_line(rows: list[Row], method: str, sizes: list[int]) -> list[str]:
    medians = {}
    for size in sizes:
        mine = [row for row in rows if row["method"] == method and row["size"] == size]
        medians[size] = [
            statistics.median(row["cpu_s"] for row in mine),
            statistics.median(row["peak_bytes"] - row["before_bytes"] for row in mine),
        ]
    cells = [f"{seconds:.2f} ({memory / 2**20:.0f})" for seconds, memory in medians.values()]
    return [method, *cells, *(f"{_slope(sizes, [m[i] for m in medians.values()]):.2f}" for i in (0, 1))]


def _slope(sizes: list[int], values: list[float]) -> float:
    if len(sizes) < 2 or min(values) <= 0:
        return math.nan
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def _full(row: Row, key: str) -> float:
    """Seconds of the whole search."""
    return float(row[key] * row["all_inputs"] / row["inputs"])


def _flops(rows: list[Row], method: str) -> float | None:
    found = [row for row in rows if row["method"] == method and row["count"] and "flops" in row]
    return found[0]["flops"] * found[0]["all_inputs"] / found[0]["inputs"] if found else None


def _ratio(rows: list[Row], method: str, threads: int) -> str:
    """CPU time against that of the published procedure, repeat by repeat."""
    ours, theirs = (
        {r["repeat"]: _full(r, "cpu_s") for r in rows if r["method"] == m and r["threads"] == threads and "cpu_s" in r}
        for m in (method, "published")
    )
    return _spread([theirs[repeat] / ours[repeat] for repeat in ours if repeat in theirs])


def _share(rows: list[Row], mine: list[Row], flops: float | None, threads: int) -> str:
    rates = [r["gemm_flops_a_second"] for r in rows if r["threads"] == threads and "gemm_flops_a_second" in r]
    if flops is None or not rates or threads != 1:
        return ""
    seconds = statistics.median(_full(row, "cpu_s") for row in mine if row["threads"] == threads)
    return f"{flops / seconds / max(rates):.0%}"


def _basis(row: Row) -> str:
    if row["mini_batches"] == row["all_mini_batches"]:
        return f"all {row['all_mini_batches']:,} {row['unit']}"
    return (
        f"extrapolated from {row['mini_batches']:,} of {row['all_mini_batches']:,} {row['unit']} "
        f"({row['inputs']:,} of {row['all_inputs']:,} inputs)"
    )


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    middle = statistics.median(values)
    return _number(middle) if len(values) == 1 else f"{_number(middle)} ({_number(min(values))}-{_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _heading(rows: list[Row], machine: dict[str, str]) -> str:
    told = next((row for row in rows if "torch" in row), {"torch": "?", "sapwood": "?"})
    place = f"{machine['processor']}, {machine['cores']} cores; torch {told['torch']}, sapwood {told['sapwood']}"
    return f"{place}. Medians, with least and most in brackets.\n"


def _table(head: list[str], lines: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *(line + [""] * (len(head) - len(line)) for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def _distinct(rows: list[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    kinds = {"axis": growth, "step": steps}
    show = next((kinds[key] for key in kinds if key in read["rows"][0]), searches)
    print(show(read["rows"], read["machine"]))
