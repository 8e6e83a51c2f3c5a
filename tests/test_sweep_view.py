"""What a sweep shows while it goes on, and where else its metrics go."""

import dataclasses
import io
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console

from processes import PATH
from sapwood import files
from sapwood.errors import ConfigError
from sapwood.experiments import trackers
from sapwood.experiments.compare import Outcome, compare, run_folder
from sapwood.experiments.config import ORDER_SEED, Place, RunConfig
from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.live import Status, SweepProgress, TimeLeft, status
from sapwood.experiments.run import run
from sapwood.training import TrainConfig

CPU = Place(device="cpu", offline=True)
SHORT = TrainConfig(epochs=4, milestones=(), lr=0.05, seed=ORDER_SEED)
SNIP = RunConfig("digits", "mlp", method="snip", density=0.1, train=SHORT)


def row(epoch, **fields):
    return {
        "epoch": epoch,
        "test_accuracy": 50.0 + epoch,
        "images_per_second": 1234.5,
        "seconds": 10.0 * epoch,
    } | fields


# The lines.


def test_status_of_a_run_from_its_beginning_to_its_end(tmp_path):
    assert status(SNIP, tmp_path, 0) is None
    files.write_json(tmp_path / "config.json", SNIP.to_json())
    assert status(SNIP, tmp_path, 0) == Status(SNIP, None)  # it prunes
    assert status(dataclasses.replace(SNIP, method="dense"), tmp_path, 0).epoch == 0
    (tmp_path / "masks.safetensors").touch()
    assert status(SNIP, tmp_path, 0) == Status(SNIP, 0)
    files.write_rows(tmp_path / "metrics.jsonl", [row(1), row(2)])
    # Two epochs of 10 and 20 s are done, two are left.
    assert status(SNIP, tmp_path, 0) == Status(SNIP, 2, 52.0, 1234.5, 30.0)
    assert status(SNIP, tmp_path, time.time() + 5) is None  # of an earlier sweep, not of this one
    files.write_text(tmp_path / "metrics.jsonl", '{"epoch"')
    assert status(SNIP, tmp_path, 0) == Status(SNIP, 0)
    (tmp_path / "result.json").touch()
    assert status(SNIP, tmp_path, 0) is None


def test_lines_are_drawn_in_a_terminal_and_go_with_their_runs(tmp_path):
    shown = io.StringIO()
    other = dataclasses.replace(SNIP, seed=1)
    bar = SweepProgress([SNIP, other], tmp_path, "runs", Console(file=shown, force_terminal=True, width=120))
    with bar:
        folder = run_folder(tmp_path, SNIP)
        folder.mkdir(parents=True)
        files.write_json(folder / "config.json", SNIP.to_json())
        (folder / "masks.safetensors").touch()
        files.write_rows(folder / "metrics.jsonl", [row(1)])
        bar.refresh()
        drawn = shown.getvalue()
        for part in ("snip", "90 %", "seed 0", "epoch 1/4", "51.00 %", "1,234 images/s", "0:00:30 left", "0/2"):
            assert part in drawn
        assert "seed 1" not in drawn
        bar.take(Outcome(SNIP, None, "it failed"), True)
        assert "failed: it failed" in shown.getvalue()
        shown.truncate(0)
        bar.refresh()
        assert "epoch" not in shown.getvalue() and "1/2" in shown.getvalue()


def test_time_left_is_at_the_pace_of_the_runs_that_this_sweep_finished(tmp_path):
    now, shown = [0.0], io.StringIO()
    configs = [dataclasses.replace(SNIP, seed=seed) for seed in range(8)]
    bar = SweepProgress(configs, tmp_path, "runs", Console(file=shown, force_terminal=True, width=120))
    bar.get_time = lambda: now[0]
    (task,) = bar.tasks
    task._get_time, task.start_time = bar.get_time, 0.0
    left = TimeLeft()
    bar.take(Outcome(configs[0], None, "it was finished before"), False)
    now[0] = 60.0
    assert left.render(task).plain == "-:--:-- left"
    for config in configs[1:3]:  # side by side
        bar.take(Outcome(config, None, "it failed"), True)
    assert left.render(task).plain == "0:02:30 left"  # five more, two a minute
    now[0] = 90.0
    assert left.render(task).plain == "0:03:45 left"


def test_nothing_is_drawn_elsewhere(tmp_path):
    shown = io.StringIO()
    with SweepProgress([SNIP], tmp_path, "runs", Console(file=shown)) as bar:
        bar.take(Outcome(SNIP, None, "it failed"), True)
    assert shown.getvalue() == ""


# Trackers.


def tracked_run(tmp_path, tracker):
    compare([SNIP], tmp_path, CPU, engine=EngineConfig(workers=1), tracker=tracker)
    return files.read_rows(run_folder(tmp_path, SNIP) / "metrics.jsonl")


def test_tensorboard_has_every_epoch_also_of_a_resumed_run(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = run_folder(tmp_path, SNIP)

    def stop(epoch):
        if epoch["epoch"] == 2:
            raise KeyboardInterrupt

    with trackers.tracked("tensorboard", SNIP, folder) as log, pytest.raises(KeyboardInterrupt):
        run(SNIP, folder, CPU, on_epoch=lambda epoch: (log(epoch), stop(epoch)))
    rows = tracked_run(tmp_path, "tensorboard")
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("test_accuracy")]
    assert seen == [(each["epoch"], pytest.approx(each["test_accuracy"])) for each in rows]
    assert len(seen) == 4


def in_a_process(tmp_path, tracker, check, **environment):
    """Trackers start threads, and warn of their own affairs."""
    code = (
        "import test_sweep_view as t; from pathlib import Path\n"
        f"out = Path({str(tmp_path)!r}); rows = t.tracked_run(out, {tracker!r})\n{check}\nprint('checked')"
    )
    environment = {**os.environ, "PYTHONPATH": PATH, "HOME": str(tmp_path), **environment}
    command = [sys.executable, "-W", "ignore", "-c", code]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert "checked" in ended.stdout.splitlines(), ended.stdout + ended.stderr  # trackio goes on to talk


@pytest.mark.slow
def test_mlflow_has_every_epoch(tmp_path):
    pytest.importorskip("mlflow", reason="not installed")
    check = (
        "import mlflow; (run,) = mlflow.search_runs(output_format='list'); assert run.info.status == 'FINISHED'\n"
        "seen = mlflow.MlflowClient().get_metric_history(run.info.run_id, 'test_accuracy')\n"
        "assert [(m.step, m.value) for m in seen] == [(r['epoch'], r['test_accuracy']) for r in rows], seen\n"
        "assert run.data.params['method'] == 'snip'"
    )
    store_at = (tmp_path / "store").as_uri()
    in_a_process(tmp_path, "mlflow", check, MLFLOW_TRACKING_URI=store_at, MLFLOW_ALLOW_FILE_STORE="true")


@pytest.mark.slow
def test_wandb_has_every_epoch(tmp_path):
    pytest.importorskip("wandb", reason="not installed")
    check = (
        "(file,) = out.rglob('offline-run-*/run-*.wandb'); content = file.read_bytes()\n"
        "assert content.count(b'test_accuracy') >= len(rows), content"
    )
    in_a_process(tmp_path, "wandb", check, WANDB_MODE="offline", WANDB_SILENT="true")


@pytest.mark.slow
def test_trackio_has_every_epoch(tmp_path):
    pytest.importorskip("trackio", reason="not installed")
    check = (
        "import sqlite3; (file,) = out.rglob('sapwood.db')\n"
        "seen = sqlite3.connect(file).execute('select step, metrics from metrics').fetchall()\n"
        "import json; assert [(step, json.loads(text)['test_accuracy']) for step, text in seen] == [\n"
        "    (r['epoch'], r['test_accuracy']) for r in rows], seen"
    )
    in_a_process(tmp_path, "trackio", check)


def test_somebodys_own_tracker_and_wrong_ones(tmp_path):
    rows = tracked_run(tmp_path, f"{__name__}:Remember")
    assert Remember.rows == rows and Remember.closed
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        trackers.find("tensorbord")
    with pytest.raises(ConfigError, match="cannot be imported"):
        trackers.find(f"{__name__}:nothing")


class Remember:
    rows, closed = [], False

    def __init__(self, config, folder):
        assert config == SNIP

    def __enter__(self):
        return lambda row: self.rows.append(dict(row))

    def __exit__(self, *error):
        type(self).closed = True
