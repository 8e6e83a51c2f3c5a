"""Runs measurements one after another, each in a process of its own, and keeps what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
Row = dict[str, Any]


def measure(
    case: str,
    method: str,
    threads: int,
    *,
    changes: dict[str, Any] | None = None,
    count: bool = False,
    extent: str = "auto",
) -> Row:
    """One measurement; a failure is a row with an `error`.

    Args:
        case: A name of `CASES`.
        method: A method with its fields, "published", or "gemm" (the machine's rate).
        threads: Threads of torch.
        changes: Fields of the case that differ.
        count: Count floating-point operations instead of measuring time.
        extent: "whole" searches, one mini-batch of each ("part"), or a part where a search takes hours ("auto").
    """
    spec = {"case": case, "changes": changes or {}, "method": method, "threads": threads}
    spec |= {"count": count, "extent": extent}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(spec)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        found: Row = {"error": said[-1] if said else f"ended with status {done.returncode} (out of memory?)"}
    else:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    return {**spec, **found}


def save(path: Path, rows: list[Row]) -> None:
    """Writes all rows, after every measurement, so that an interrupted run keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def machine() -> dict[str, str]:
    """Processor and cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else "unknown", "cores": str(cores())}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
