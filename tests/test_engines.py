"""Engines, and what keeps a sweep alive: processes that die, folders that two processes want, damage, full disks."""

import contextlib
import dataclasses
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from processes import PATH
from sapwood import Masks, files
from sapwood.errors import ConfigError, RunBusyError, SapwoodError
from sapwood.experiments import engines, store
from sapwood.experiments.compare import compare, run_folder
from sapwood.experiments.config import ORDER_SEED, Place, RunConfig
from sapwood.experiments.engines import EngineConfig, local
from sapwood.experiments.engines.local import shares
from sapwood.experiments.grid import Grid
from sapwood.experiments.job import Job, Outcome, attempt
from sapwood.experiments.run import run
from sapwood.training import TrainConfig

CPU = Place(device="cpu", offline=True)
SHORT = TrainConfig(epochs=2, milestones=(), lr=0.05, seed=ORDER_SEED)
RANDOM = RunConfig("digits", "mlp", method="random", density=0.1, train=SHORT)
HERE = EngineConfig(workers=1)


def grid(*methods):
    return Grid(model="mlp", methods=methods, sparsities=(0.9,), seeds=(0,)).runs(SHORT)


def dies_once(net, masks, data, generator):
    """Kills its process as the OOM killer would, the first time."""
    marker = Path(os.environ["SAPWOOD_TEST_MARKER"])
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {name: torch.rand(weight.shape, generator=generator) for name, weight in net.weights.items()}


def always_dies(net, masks, data, generator):
    os.kill(os.getpid(), signal.SIGKILL)


def check_deaths(outcomes):
    """dense, dies_once, random, always_dies: one failed, in a sentence; the one that died once has its result."""
    assert [outcome.result is None for outcome in outcomes] == [False, False, False, True]
    assert outcomes[3].error.startswith("its process died 2 times")


METHODS = (f"{__name__}:dies_once", "random", f"{__name__}:always_dies")


def deadly(job):
    """In place of a run, which takes a process seconds to begin."""
    if job.config.method == METHODS[0]:
        dies_once(SimpleNamespace(weights={}), None, None, None)
    return Outcome(job.config, None, f"done on {job.place.device}")


def test_dead_process_is_retried_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SAPWOOD_TEST_MARKER", str(tmp_path / "died"))
    monkeypatch.setattr(local, "attempt", deadly)
    jobs = [Job(config, tmp_path, CPU) for config in grid(*METHODS[:2])]
    found = list(local.outcomes(jobs, EngineConfig(workers=2, retries=1)))
    assert sorted(o.config.method for o in found) == sorted(job.config.method for job in jobs)
    assert {outcome.error for outcome in found} == {"done on cpu"}
    assert (tmp_path / "died").exists()


@pytest.mark.slow
def test_process_that_dies_again_and_again_fails_its_run_only(tmp_path, monkeypatch):
    monkeypatch.setenv("SAPWOOD_TEST_MARKER", str(tmp_path / "died"))
    check_deaths(compare(grid(*METHODS), tmp_path, CPU, engine=EngineConfig(workers=2, retries=1)))


@pytest.mark.slow
def test_ray_retries_a_dead_worker(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the extra 'cluster' is not installed")
    monkeypatch.setenv("SAPWOOD_TEST_MARKER", str(tmp_path / "died"))
    monkeypatch.setenv("PYTHONPATH", PATH)  # for Ray's workers
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    script = (
        "import warnings; from pathlib import Path; from sapwood.experiments.compare import compare\n"
        "from sapwood.experiments.engines import EngineConfig; import test_engines as t\n"
        f"out = Path({str(tmp_path)!r}); engine = EngineConfig('ray', 'local', cpus_per_run=1, retries=1)\n"
        "t.check_deaths(compare(t.grid(*t.METHODS), out, t.CPU, engine=engine)); print('checked')"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert ended.stdout.splitlines()[-1:] == ["checked"], ended.stderr


@pytest.mark.slow
def test_slurm_submits_a_lost_job_again(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="the extra 'cluster' is not installed")
    monkeypatch.setenv("SAPWOOD_TEST_MARKER", str(tmp_path / "died"))
    monkeypatch.setenv("PYTHONPATH", PATH)  # for submitit's processes
    engine = EngineConfig("slurm", "local", retries=1, submit=("timeout_min=5",))
    check_deaths(compare(grid(*METHODS), tmp_path, CPU, engine=engine))


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        (EngineConfig(), "cuda", ["cuda:0", "cuda:1"]),
        (EngineConfig(runs_per_gpu=2), "cuda", ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        (EngineConfig(workers=3), "cuda", ["cuda:0", "cuda:1", "cuda:0"]),
        (EngineConfig(runs_per_gpu=2), "cuda:1", ["cuda:1", "cuda:1"]),
        (EngineConfig(workers=3, runs_per_gpu=5), "cpu", ["cpu"] * 3),
    ],
)
def test_gpus_are_shared_out(monkeypatch, config, device, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert shares(torch.device(device), config) == expected


def test_one_process_keeps_to_its_threads(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "attempt", lambda job: job.threads)
    assert list(local.outcomes([Job(RANDOM, tmp_path, CPU)], EngineConfig(workers=1, cpus_per_run=3))) == [3]
    assert list(local.outcomes([Job(RANDOM, tmp_path, CPU)], HERE)) == [None]  # torch's own choice


@pytest.mark.parametrize(("workers", "expected"), [(None, 2), (3, 2), (1, None)])
def test_a_gpu_has_as_many_runs_at_a_time_as_it_is_said_to(monkeypatch, workers, expected):
    """Two GPUs and threads in place of processes: which run is where when, and none is lost."""
    lock, at, most, where = threading.Lock(), Counter(), Counter(), []

    def attempt(job):
        device = job.place.device
        with lock:
            at[device] += 1
            most[device] = max(most[device], at[device])
            where.append((job.config.seed, device))
        time.sleep(0.01)
        with lock:
            at[device] -= 1
        return Outcome(job.config, None, f"{job.threads} threads")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(local, "device_of", lambda name: torch.device(name))
    monkeypatch.setattr(local, "cores", lambda: 12)
    monkeypatch.setattr(local, "attempt", attempt)
    monkeypatch.setattr(local._Worker, "new_pool", staticmethod(lambda: ThreadPoolExecutor(1)))
    jobs = [Job(dataclasses.replace(RANDOM, seed=seed), Path("nowhere"), Place("cuda")) for seed in range(12)]
    found = list(local.outcomes(jobs, EngineConfig(workers=workers, runs_per_gpu=2)))
    assert sorted(outcome.config.seed for outcome in found) == sorted(seed for seed, _ in where) == list(range(12))
    if expected is None:  # one run at a time stays in this process, on the first GPU
        assert most == {"cuda": 1}
    else:
        assert set(most) == {"cuda:0", "cuda:1"} and max(most.values()) <= expected
        assert {outcome.error for outcome in found} == {f"{12 // (workers or 4)} threads"}


def test_ray_runs_ask_for_their_share_of_a_gpu(monkeypatch):
    pytest.importorskip("ray", reason="the extra 'cluster' is not installed")
    engine = importlib.import_module("sapwood.experiments.engines.ray")
    monkeypatch.setattr(engine.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert engine._gpus("auto", EngineConfig("ray", runs_per_gpu=4)) == 0.25
    assert engine._gpus("cuda", EngineConfig("ray")) == 1
    assert engine._gpus("cpu", EngineConfig("ray", runs_per_gpu=4)) == 0
    monkeypatch.setattr(engine.ray, "cluster_resources", lambda: {"CPU": 8.0})
    assert engine._gpus("auto", EngineConfig("ray", runs_per_gpu=4)) == 0
    with pytest.raises(ConfigError, match="has no GPU"):
        engine._gpus("cuda:0", EngineConfig("ray"))


@pytest.mark.parametrize("error", [ConnectionError, Exception])
def test_ray_that_does_not_start_is_one_sentence(monkeypatch, error):
    pytest.importorskip("ray", reason="the extra 'cluster' is not installed")
    engine = importlib.import_module("sapwood.experiments.engines.ray")

    def init(**_):
        raise error("The node timed out.\nAnd more of it.")

    monkeypatch.setattr(engine.ray, "init", init)
    monkeypatch.setattr(engine.ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"no Ray cluster at address 'auto' \(The node timed out.\); start one"):
        list(engine.outcomes([Job(RANDOM, Path("nowhere"), CPU)], EngineConfig("ray", "auto")))


def seen_gpus(job):
    """In place of a run: which GPUs Ray shows to it, and when it was there."""
    begin = time.time()
    time.sleep(1)
    return Outcome(job.config, None, f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {begin} {time.time()}")


def check_fractions():
    """In a process of its own: a local Ray cluster that believes in two GPUs, with two runs on each."""
    import ray

    from sapwood.experiments.engines import ray as engine

    ray.init(num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False)
    engine.attempt = seen_gpus
    jobs = [Job(dataclasses.replace(RANDOM, seed=seed), Path("nowhere"), Place("cuda")) for seed in range(8)]
    found = list(engine.outcomes(jobs, EngineConfig("ray", runs_per_gpu=2, cpus_per_run=1)))
    runs = [outcome.error.split() for outcome in found]
    assert {gpu for gpu, *_ in runs} == {"0", "1"}, runs
    spans = [(gpu, float(begin), float(end)) for gpu, begin, end in runs]
    for gpu, begin, _ in spans:
        together = sum(g == gpu and b <= begin < e for g, b, e in spans)
        assert together <= 2, runs
    print("checked")


@pytest.mark.slow
def test_ray_puts_as_many_runs_on_a_gpu_as_it_is_said_to(monkeypatch):
    pytest.importorskip("ray", reason="the extra 'cluster' is not installed")
    monkeypatch.setenv("PYTHONPATH", PATH)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    script = "import warnings, test_engines; test_engines.check_fractions()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert ended.stdout.splitlines()[-1:] == ["checked"], ended.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (EngineConfig("rai"), "Did you mean 'ray'.* Legal: local, ray, slurm"),
        (EngineConfig(workers=0), "at least 1 process"),
        (EngineConfig(retries=-1), "retries must be at least 0"),
        (EngineConfig(runs_per_gpu=0), "runs_per_gpu must be at least 1"),
        (EngineConfig(address="auto"), "address is for the engine ray or slurm"),
        (EngineConfig("ray", submit=("a=1",)), "submit is for the engine slurm"),
    ],
)
def test_wrong_engines_are_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        engines.find(config)


def test_engine_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(engines.NEEDS, "ray", "no_such_package")
    with pytest.raises(ConfigError, match=r"sapwood\[cluster\]"):
        engines.find(EngineConfig("ray"))


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (EngineConfig("slurm", "local", submit=("timeout",)), "KEY=VALUE"),
        (EngineConfig("slurm", "local", submit=("colour=red",)), "colour"),
        (EngineConfig("slurm", "nowhere"), "nowhere"),
    ],
)
def test_slurm_parameters_are_checked(tmp_path, engine, said):
    pytest.importorskip("submitit", reason="the extra 'cluster' is not installed")
    with pytest.raises(ConfigError, match=said):
        compare(grid("random"), tmp_path, CPU, engine=engine)


# One run, one process.


def test_second_process_waits_or_comes_back_busy(tmp_path):
    with store.RunFolder(tmp_path, RANDOM):
        with pytest.raises(RunBusyError, match="Another process"):
            run(RANDOM, tmp_path, CPU, wait=False)
        outcome = attempt(Job(RANDOM, tmp_path, CPU))
        assert outcome.busy and outcome.result is None
    assert attempt(Job(RANDOM, tmp_path, CPU)).result is not None


def test_run_of_another_process_is_left_for_last_and_its_result_taken(tmp_path):
    configs = grid("random", "magnitude")
    with contextlib.ExitStack() as other:
        other.enter_context(store.RunFolder(run_folder(tmp_path, configs[0]), configs[0]))
        seen = []

        def take(outcome, fresh):
            seen.append(outcome.config.method)
            other.close()  # the other process lets go once this one has done all else

        outcomes = compare(configs, tmp_path, CPU, engine=HERE, on_run=take)
    assert seen == ["random", "magnitude", "dense"]
    assert all(outcome.result is not None for outcome in outcomes)


def test_lock_and_remnants_of_a_killed_process_are_no_obstacle(tmp_path):
    script = (
        "import os, pathlib, sys; from sapwood.experiments import store; import test_engines as t\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with store.RunFolder(folder, t.RANDOM):\n"
        "    (folder / '.config.json.1.tmp').write_text('{'); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": PATH})
    assert ended.returncode == -signal.SIGKILL
    assert run(RANDOM, tmp_path, CPU, wait=False).epochs == 2
    assert not list(tmp_path.glob(".*"))


# Damage. Every file of a run, after its end and in the midst of it; how it is noticed is tested in test_integrity.py.

FILES = ("config.json", "environment.json", "masks.safetensors", "metrics.jsonl", "result.json", "checkpoint.pt")
DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "flip": lambda content: flipped(content, 2 * len(content) // 3),
}


def flipped(content, place):
    """One byte with its lowest bit turned."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / RANDOM.id
    return folder, run(RANDOM, folder, CPU)


class Stop(BaseException):
    pass


def stop(row):
    raise Stop


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("moment", ["midway", "finished"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_noticed_and_redone(tmp_path, undisturbed, name, moment, damage):
    whole, expected = undisturbed
    folder = run_folder(tmp_path, RANDOM)
    if moment == "midway":
        with pytest.raises(Stop):
            run(RANDOM, folder, CPU, on_epoch=stop)
    else:
        shutil.copytree(whole, folder)
    file = folder / name
    if not file.exists():
        assert (moment, name) in {("midway", "result.json"), ("finished", "checkpoint.pt")}
        file.write_bytes(b"0" * 100)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    (outcome,) = compare([RANDOM], tmp_path, CPU, engine=HERE)
    assert outcome.result is not None, outcome.error
    assert outcome.result.test_accuracy == expected.test_accuracy
    assert Masks.load(folder / "masks.safetensors") == Masks.load(whole / "masks.safetensors")
    assert len(files.read_rows(folder / "metrics.jsonl")) == 2
    assert json.loads((folder / "config.json").read_text()) == json.loads((whole / "config.json").read_text())


def test_config_of_an_older_version_is_not_another_run(tmp_path):
    files.write_json(tmp_path / "config.json", {k: v for k, v in RANDOM.to_json().items() if k != "control"})
    assert run(RANDOM, tmp_path, CPU).epochs == 2
    with pytest.raises(ConfigError, match="differs in control"):
        run(dataclasses.replace(RANDOM, control="shuffle"), tmp_path, CPU)


def test_environment_lies_beside_the_config(undisturbed):
    folder, result = undisturbed
    assert files.read_json(folder / "environment.json") == result.environment


# A full disk.


def check_full(call):
    with pytest.raises(SapwoodError, match=r"The disk is full .* the same command goes on") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("module", "victim"), [(files, "write_rows"), (store, "write_result")])
def test_full_disk_stops_the_sweep_with_one_sentence(tmp_path, monkeypatch, module, victim):
    configs, real, calls = grid("random", "magnitude"), getattr(module, victim), []

    def write(*args):
        calls.append(args)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, victim, write)
        if victim == "write_result":
            calls.extend([None] * 3)  # the second result finds no room
        check_full(lambda: compare(configs, tmp_path, CPU, engine=HERE))
    kept = [config.method for config in configs if store.finished(run_folder(tmp_path, config), config)]
    assert kept == ["dense"]
    fresh = []
    outcomes = compare(configs, tmp_path, CPU, engine=HERE, on_run=lambda o, new: fresh.append(new))
    assert fresh == [False, True, True]
    assert all(outcome.result is not None for outcome in outcomes)


@pytest.fixture
def tiny_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_really_full_disk(tiny_disk):
    configs = grid("random", "magnitude")
    check_full(lambda: compare(configs, tiny_disk, CPU, engine=HERE))  # the checkpoint of 51,000 weights
    assert not list(tiny_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(tiny_disk)], check=True)
    assert all(o.result is not None for o in compare(configs, tiny_disk, CPU, engine=HERE))
