"""`kill -9` at random moments of a sweep: nothing is lost, nothing is done twice, and the results are the same.

The sweeps are of tiny runs, slowed down. $SAPWOOD_KILL_SECONDS says for how long there are kills (default 45; the
full trial is 600), $SAPWOOD_KILL_SEED when they come, $SAPWOOD_KILL_SEEDS how many seeds the sweep has (four runs each;
default: one in 6 s, enough to outlast the kills). $SAPWOOD_KILL_EVIDENCE is a folder for what was seen, as JSON.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from processes import PATH
from sapwood import Masks, files
from sapwood.experiments import store
from sapwood.experiments.compare import compare, run_folder
from sapwood.experiments.config import ORDER_SEED, Place
from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.environment import environment
from sapwood.experiments.grid import Grid
from sapwood.training import TrainConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]

SECONDS = float(os.environ.get("SAPWOOD_KILL_SECONDS", "45"))
SEED = int(os.environ.get("SAPWOOD_KILL_SEED", "0"))
LOG, PAUSE = "SAPWOOD_TEST_LOG", "SAPWOOD_TEST_PAUSE"
SEEDS = tuple(range(int(os.environ.get("SAPWOOD_KILL_SEEDS") or max(5, round(SECONDS / 6)))))


# In the processes of the sweep.


def configs():
    train = TrainConfig(epochs=3, milestones=(), lr=0.05, seed=ORDER_SEED)
    return Grid(model="mlp", methods=("snip", "random", "synflow"), sparsities=(0.9,), seeds=SEEDS).runs(train)


@contextlib.contextmanager
def completions(config, folder):
    """A tracker that makes epochs long, and adds a line to a log once the run is over."""
    yield lambda row: time.sleep(float(os.environ[PAUSE]))
    with open(os.environ[LOG], "a") as log:
        log.write(f"{config.id}\n")


def sweep(out, engine):
    config = EngineConfig(engine, workers=2, cpus_per_run=1, retries=100)
    outcomes = compare(configs(), Path(out), Place("cpu", offline=True), engine=config, tracker="test_kill:completions")
    sys.exit(any(outcome.result is None for outcome in outcomes))


# In the process that kills.


def start(out, engine, pause):
    environment = {**os.environ, LOG: str(out / "log"), PAUSE: str(pause), "PYTHONPATH": PATH}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    code = f"import test_kill; test_kill.sweep({str(out)!r}, {engine!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    with (out / "output").open("ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def processes():
    """(pid, time of start) -> (parent, command line), of all processes."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            state, parent, *rest = (folder / "stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                found[int(folder.name), rest[17]] = int(parent), (folder / "cmdline").read_text().replace("\0", " ")
    return found


def descendants(driver):
    """The processes below the driver."""
    everything, family, size = processes(), {driver.pid}, 0
    while len(family) > size:
        size = len(family)
        family |= {key[0] for key, (parent, _) in everything.items() if parent in family}
    return {key: line for key, (_, line) in everything.items() if key[0] in family - {driver.pid}}


VICTIMS = {
    "run": lambda line: "spawn_main" in line and "resource_tracker" not in line,
    "worker": lambda line: line.startswith("ray::sapwood"),
    "head": lambda line: "/raylet " in line or "gcs_server" in line,
}


def kill(driver, victim, chance):
    """Kills the driver, or a random process below it; returns whether there was one."""
    if victim == "driver":
        driver.kill()
        driver.wait()
        return True
    candidates = sorted(key for key, line in descendants(driver).items() if VICTIMS[victim](line))
    if not candidates:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(chance.choice(candidates)[0], signal.SIGKILL)
    if victim == "head":  # a driver may wait long for a head that is no more: its user ends it
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(20)
        driver.kill()
        driver.wait()
    return True


def linger(out, already, chance):
    """Mostly waits for a run to finish first, as processes that die before they have begun say little."""
    patience = time.monotonic() + (300 if chance.random() < 0.8 else 0)  # on a loaded machine a process begins slowly
    while len(finished(out)) == already and time.monotonic() < patience:
        time.sleep(0.1)
    time.sleep(chance.uniform(0, 3))


def finished(out):
    """Every result there is, and when it was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (out / "runs").glob("*/result.json")}


def essence(out):
    """All that a sweep found, less the times: accuracies, losses and masks of every run."""
    found = {}
    for config in configs():
        folder = run_folder(out, config)
        result = store.finished(folder, config)
        rows = files.read_rows(folder / "metrics.jsonl")
        masks = Masks.load(folder / "masks.safetensors") if config.method != "dense" else None
        losses = [(row["epoch"], row["train_loss"], row["test_accuracy"]) for row in rows]
        bits = masks and {name: mask.numpy().tobytes() for name, mask in masks.items()}
        found[config.id] = result.test_accuracy, result.layers, losses, bits
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert start(out, "local", 0).wait() == 0, (out / "output").read_text()
    return essence(out)


@pytest.mark.parametrize(("engine", "victims"), [("local", ("run", "driver")), ("ray", ("worker", "driver", "head"))])
def test_kill(tmp_path, undisturbed, engine, victims):
    pytest.importorskip("ray", reason="the extra 'cluster' is not installed") if engine == "ray" else None
    chance, kills, before, family, moments = random.Random(SEED), Counter(), {}, {}, []
    driver = start(tmp_path, engine, 0.5)
    begin = time.monotonic()
    end = begin + SECONDS
    queue = itertools.cycle(victims)
    while (time.monotonic() < end or len(kills) < len(victims)) and len(before) < len(undisturbed):
        linger(tmp_path, len(before), chance)
        family |= descendants(driver)
        victim = next(queue)
        if kill(driver, victim, chance):
            kills[victim] += 1
            moments.append((round(time.monotonic() - begin, 1), victim, len(before)))
        now = finished(tmp_path)
        assert before.items() <= now.items(), "a finished run was lost or done again"
        before = now
        if driver.poll() is not None:
            driver = start(tmp_path, engine, 0.5)
    print(f"{engine}: {dict(kills)} killed, {len(before)} of {len(undisturbed)} runs finished meanwhile")
    meanwhile, lasted = len(before), time.monotonic() - begin
    if driver.wait() != 0:
        assert start(tmp_path, engine, 0).wait() == 0, (tmp_path / "output").read_text()
    assert set(kills) == set(victims)
    assert before.items() <= finished(tmp_path).items(), "a finished run was lost or done again"
    assert essence(tmp_path) == undisturbed
    check_log(tmp_path / "log", set(undisturbed), sum(kills.values()))
    check_no_orphans(family)
    evidence = {
        "engine": engine,
        "seconds_of_kills": round(lasted),
        "seed": SEED,
        "kills": dict(kills),
        "runs": len(undisturbed),
        "runs_finished_between_kills": meanwhile,
        "log_lines": len((tmp_path / "log").read_text().split()),
        "checked": "no finished run lost or done again; accuracies, losses and masks of every run equal to the bit to "
        "an undisturbed sweep's; no process left behind",
        "environment": environment(torch.device("cpu")),
        "moments": [{"second": at, "killed": victim, "runs_finished": done} for at, victim, done in moments],
    }
    if folder := os.environ.get("SAPWOOD_KILL_EVIDENCE"):
        Path(folder, f"{engine}.json").write_text(json.dumps(evidence, indent=1) + "\n")


def check_log(log, runs, kills):
    """Each run ended once; a line may be missing where a kill came between a run's last file and its line."""
    ended = Counter(log.read_text().split())
    assert set(ended) <= runs
    assert max(ended.values()) == 1
    assert len(runs) - len(ended) <= 2 * kills


def check_no_orphans(family):
    """No process outlives its sweep for long."""
    deadline = time.monotonic() + 60
    while left := family.keys() & processes().keys():
        assert time.monotonic() < deadline, [family[key] for key in left]
        time.sleep(1)
