"""A run's folder under attack: taken away, forged, interrupted, on a full disk; and what is said of it meanwhile."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

from processes import PATH
from sapwood import Masks, files
from sapwood.cli import main
from sapwood.errors import DataError, SapwoodError
from sapwood.experiments import figures, store
from sapwood.experiments.config import ORDER_SEED, Place, RunConfig
from sapwood.experiments.job import Job, attempt
from sapwood.experiments.run import run
from sapwood.files import checksum
from sapwood.training import TrainConfig, history_in

CPU = Place("cpu", offline=True)
SHORT = TrainConfig(epochs=3, milestones=(), lr=0.05, seed=ORDER_SEED)
SNIP = RunConfig("digits", "mlp", "snip", 0.1, per_class=1, train=SHORT)


class Stop(BaseException):
    pass


def stop_after(epoch):
    def stop(row):
        if row["epoch"] == epoch:
            raise Stop

    return stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(SNIP, folder, CPU)


@pytest.fixture
def half_way(tmp_path):
    folder = tmp_path / "half"
    with pytest.raises(Stop):
        run(SNIP, folder, CPU, on_epoch=stop_after(1))
    return folder


# Metrics.


@pytest.mark.trap(81)
def test_metrics_of_a_resumed_run_have_the_earlier_epochs_all_the_time(half_way, whole):
    seen = []

    def look(row):
        seen.append([kept["epoch"] for kept in files.read_rows(half_way / "metrics.jsonl")])

    run(SNIP, half_way, CPU, on_epoch=look)
    assert seen == [[1, 2], [1, 2, 3]]
    losses = [[row["train_loss"] for row in files.read_rows(f / "metrics.jsonl")] for f in (half_way, whole[0])]
    assert losses[0] == losses[1]


@pytest.mark.trap(81)
def test_metrics_that_were_lost_or_are_ahead_follow_the_checkpoint(half_way):
    """As a kill between the checkpoint and the metrics leaves them, or somebody's hand."""
    seen = []
    (half_way / "metrics.jsonl").unlink()
    with pytest.raises(Stop):
        run(SNIP, half_way, CPU, on_epoch=stop_after(2))
    rows = files.read_rows(half_way / "metrics.jsonl")
    files.write_rows(half_way / "metrics.jsonl", [*rows, *rows])
    run(SNIP, half_way, CPU, on_epoch=lambda _: seen.append(files.read_rows(half_way / "metrics.jsonl")))
    assert [[row["epoch"] for row in rows] for rows in seen] == [[1, 2, 3]]


# A folder that goes away.


@pytest.mark.parametrize("back", [None, "empty", "another process's"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_folder_that_is_removed_while_its_run_trains(tmp_path, whole, back, epoch):
    out = tmp_path / "out"

    def remove(row):
        if row["epoch"] == epoch:
            shutil.rmtree(out)
            if back == "empty":
                out.mkdir()
            elif back is not None:
                shutil.copytree(whole[0], out)

    with pytest.raises(SapwoodError, match=r"out was removed or replaced while its run was going on.*runs it again"):
        run(SNIP, out, CPU, on_epoch=remove)
    assert out.exists() == (back is not None)
    assert not (out / "result.json").exists() or back == "another process's"
    assert run(SNIP, out, CPU).test_accuracy == whole[1].test_accuracy


def test_a_removed_folder_is_an_outcome_in_one_sentence(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("sapwood.experiments.job.tracked", lambda *_: Removing(out))
    outcome = attempt(Job(SNIP, out, CPU))
    assert "was removed or replaced" in outcome.error and "Traceback" not in outcome.error and not out.exists()


class Removing:
    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        return lambda row: shutil.rmtree(self.folder)

    def __exit__(self, *_):
        pass


# What kills and full disks leave.


@pytest.mark.trap(82)
def test_what_a_killed_write_of_masks_left_is_removed_by_the_next_run(tmp_path):
    out = tmp_path / "out"
    script = (
        "import os, sys; from pathlib import Path; from sapwood import files; import test_runs as t\n"
        "def die(path):\n"
        "    if 'masks' in path.name: os.kill(os.getpid(), 9)\n"
        "files._sync = die; t.run(t.SNIP, Path(sys.argv[1]), t.CPU)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(out)], env={**os.environ, "PYTHONPATH": PATH})
    assert ended.returncode == -signal.SIGKILL
    assert len(list(out.glob(".*"))) == 1 and not (out / "masks.safetensors").exists()
    run(SNIP, out, CPU)
    assert not list(out.glob(".*"))


COMPARE = ["compare", "--model", "mlp", "--methods", "random", "--sparsities", "0.5", "0.9", "--seeds", "0"]
COMPARE += ["--epochs", "1", "--milestones", "--workers", "1", "--out"]


@pytest.mark.trap(82)
@pytest.mark.parametrize("name", ["accuracy.svg", "accuracy.png"])
def test_a_full_disk_leaves_no_half_of_a_figure(tmp_path, monkeypatch, name):
    def full(path):
        if path.name.startswith(f".{name}."):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(OSError, match=name):
        figures.save(Figure((1, 1)), tmp_path / "accuracy")
    assert {path.name for path in tmp_path.iterdir()} <= {"accuracy.svg"} - {name}


@pytest.mark.slow
@pytest.mark.trap(82)
@pytest.mark.parametrize("name", ["accuracy.svg", "accuracy.png", "results.csv", "report.md", "report.html"])
def test_a_full_disk_leaves_no_half_of_a_reports_file(tmp_path, monkeypatch, capsys, name):
    real = files._sync

    def full(path):
        if path.name.startswith(f".{name}."):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync", full)
        assert main([*COMPARE, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left" in line and name in line  # which file, too
    assert not list(tmp_path.rglob(name)) and not list(tmp_path.rglob(".*"))
    assert main([*COMPARE, str(tmp_path)]) == 0 and all(p.stat().st_size for p in tmp_path.rglob("*.[sph]*"))


# Forged files.


def forged(content, part, value):
    """A checkpoint with another part, or none, and the checksum that belongs to it."""
    found = {**content, part: value}
    if value is None and part != "masks":
        del found[part]
    found.pop(files.KEY)
    return {**found, files.KEY: checksum(found)}


FORGERIES = [(part, None) for part in ("config", "model", "optimizer", "schedule", "precision", "generator", "history")]
FORGERIES += [(part, "x") for part in ("config", "model", "optimizer", "schedule", "precision", "generator", "history")]
FORGERIES += [("history", [{}]), ("history", [{"epoch": "x"}]), ("history", [1]), ("history", {}), ("masks", 3)]
FORGERIES += [("optimizer", {}), ("model", {"a": 1}), ("more", 1), ("format", "sapwood training checkpoint 0")]


@pytest.mark.parametrize(("part", "value"), FORGERIES)
def test_a_forged_checkpoint_is_no_checkpoint_and_the_run_begins_again(half_way, whole, part, value):
    path = half_way / "checkpoint.pt"
    torch.save(forged(torch.load(path, weights_only=True), part, value), path)
    with pytest.raises(DataError, match=r"delete it"):
        history_in(path)
    seen = []
    result = run(SNIP, half_way, CPU, on_epoch=lambda row: seen.append(row["epoch"]))
    assert seen == [1, 2, 3] and result.test_accuracy == whole[1].test_accuracy


DEEP = [
    ("optimizer", {"state": {"x": 1}, "param_groups": []}),
    ("generator", torch.zeros(3)),
    ("schedule", {"last_epoch": "x"}),
    ("model", {}),
]


@pytest.mark.parametrize(("part", "value"), DEEP)
def test_a_checkpoint_that_only_torch_could_tell_is_refused_in_a_sentence(half_way, part, value):
    path = half_way / "checkpoint.pt"
    torch.save(forged(torch.load(path, weights_only=True), part, value), path)
    with pytest.raises(SapwoodError, match="delete"):
        run(SNIP, half_way, CPU)


@pytest.mark.parametrize("name", ["config.json", "environment.json", "identity.json", "result.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"{}", b"\xff", b'{"layers": []}'])
def test_no_json_file_of_a_finished_run_raises_anything(tmp_path, whole, name, content):
    copy = tmp_path / SNIP.id
    shutil.copytree(whole[0], copy)
    (copy / name).write_bytes(content)
    assert store.finished(copy, SNIP) is None
    assert run(SNIP, copy, CPU).test_accuracy == whole[1].test_accuracy
    assert Masks.load(copy / "masks.safetensors") == Masks.load(whole[0] / "masks.safetensors")
