"""`kill -9` at random moments of a sweep: nothing is lost, nothing is done twice, and the results are the same.

Among the kills the images and the file of a method are changed for a while: no run is made of them, whether the sweep
goes on meanwhile or is started anew.

The sweeps are of tiny runs, slowed down. $SAPWOOD_KILL_SECONDS says for how long there are kills (default 45; the
full trial is 600), $SAPWOOD_KILL_SEED when they come, $SAPWOOD_KILL_SEEDS how many seeds the sweep has (four runs each;
default: one in 6 s, enough to outlast the kills). $SAPWOOD_KILL_EVIDENCE is a folder for what was seen, as JSON.
"""

import contextlib
import dataclasses
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

import numpy as np
import pytest
import torch
from PIL import Image

from processes import PATH
from sapwood import Masks, files
from sapwood.errors import ConfigError
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
MINE, REFUSED = "mine:method", 5
CODE = """
def method(net, masks, data, generator):
    return {name: w.abs() for name, w in net.weights.items()}
"""
SEEDS = tuple(range(int(os.environ.get("SAPWOOD_KILL_SEEDS") or max(5, round(SECONDS / 6)))))


# In the processes of the sweep.


def configs():
    train = TrainConfig(epochs=3, milestones=(), lr=0.05, seed=ORDER_SEED)
    methods = ("magnitude", "snip", "synflow")
    runs = Grid("folder", "mlp", methods, sparsities=(0.9,), seeds=SEEDS, per_class=4).runs(train)
    return [dataclasses.replace(run, method=MINE) if run.method == "magnitude" else run for run in runs]


@contextlib.contextmanager
def completions(config, folder):
    """A tracker that makes epochs long, and adds a line to a log once the run is over."""
    yield lambda row: time.sleep(float(os.environ[PAUSE]))
    with open(os.environ[LOG], "a") as log:
        log.write(f"{config.id}\n")


def sweep(out, engine):
    config = EngineConfig(engine, workers=2, cpus_per_run=1, retries=100)
    place = Place("cpu", Path(out) / "data", offline=True)
    try:
        outcomes = compare(configs(), Path(out), place, engine=config, tracker="test_kill:completions")
    except ConfigError as error:
        print(error, flush=True)
        sys.exit(REFUSED)
    sys.exit(any(outcome.result is None for outcome in outcomes))


# In the process that kills.


def prepare(out):
    """The images of two classes, and the file of a method."""
    chance = np.random.default_rng(0)
    for part, label, i in itertools.product(("train", "test"), ("a", "b"), range(20)):
        folder = out / "data" / part / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    (out / "code").mkdir()
    (out / "code/mine.py").write_text(CODE)


@contextlib.contextmanager
def changed(out, what):
    """One image is another one, or the method scores the other way round."""
    path = out / ("data/train/a/00.png" if what == "data" else "code/mine.py")
    before = path.read_bytes()
    after = (out / "data/train/b/00.png").read_bytes() if what == "data" else CODE.replace("w.abs", "-w.abs").encode()
    files.write_in_one_step(path, after)
    try:
        yield
    finally:
        files.write_in_one_step(path, before)


def tamper(out, driver, engine, what, chance):
    """Changes something under a sweep that goes on, and under one that begins, which must refuse in its sentence."""
    with changed(out, what):
        time.sleep(chance.uniform(0, 3))
        driver.kill()
        driver.wait()
        at = (out / "output").stat().st_size
        assert start(out, engine, 0.5).wait(300) == REFUSED, (out / "output").read_text()
        said = (out / "output").read_bytes()[at:].decode()
        assert {"data": "the images or labels", "code": "the source of mine"}[what] in said, said


def has_begun(out):
    """Whether there is a run of the method, without which its file may be any."""
    mine = [run_folder(out, config) for config in configs() if config.method == MINE]
    return any((folder / store.IDENTITY).exists() for folder in mine)


def start(out, engine, pause):
    path = os.pathsep.join([PATH, str(out / "code")])
    environment = {**os.environ, LOG: str(out / "log"), PAUSE: str(pause), "PYTHONPATH": path}
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


def candidates_below(driver, victim):
    """Waits until there is a process of this kind; none where the driver ended."""
    found = []
    while not found and driver.poll() is None:
        found = sorted(key for key, line in descendants(driver).items() if VICTIMS[victim](line))
        time.sleep(0 if found else 0.1)
    return found


def kill(driver, victim, chance):
    """Kills the driver, or a random process below it; returns whether there was one."""
    if victim == "driver":
        driver.kill()
        driver.wait()
        return True
    candidates = candidates_below(driver, victim)
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
    prepare(out)
    assert start(out, "local", 0).wait() == 0, (out / "output").read_text()
    return essence(out)


FAULTS = ("data", "code")


@pytest.mark.trap(90, 91)
@pytest.mark.parametrize(
    ("engine", "victims"),
    [("local", ("run", "data", "driver", "code")), ("ray", ("worker", "data", "driver", "code", "head"))],
)
def test_kill(tmp_path, undisturbed, engine, victims):
    pytest.importorskip("ray", reason="the extra 'cluster' is not installed") if engine == "ray" else None
    chance, kills, before, family, moments = random.Random(SEED), Counter(), {}, {}, []
    prepare(tmp_path)
    driver = start(tmp_path, engine, 0.5)
    begin = time.monotonic()
    end = begin + SECONDS
    queue = itertools.cycle(victims)
    victim = next(queue)
    while (time.monotonic() < end or len(kills) < len(victims)) and len(before) < len(undisturbed):
        linger(tmp_path, len(before), chance)
        family |= descendants(driver)
        hit = True
        if victim == "code" and not has_begun(tmp_path):
            victim = next(queue)
        if victim in FAULTS:
            tamper(tmp_path, driver, engine, victim, chance)
        else:
            hit = kill(driver, victim, chance)
        if hit:  # else the same kind is next, so that all of them are
            kills[victim] += 1
            moments.append((round(time.monotonic() - begin, 1), victim, len(before)))
            victim = next(queue)
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
        "checked": "no finished run lost or done again; other images and another method refused; "
        "accuracies, losses and masks of every run equal to the bit to "
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
