"""The program: its flags, its sentences, its exit codes, and that a failed command leaves everything as it was."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from sapwood import Masks
from sapwood.cli import main
from sapwood.errors import ConfigError
from sapwood.experiments.config import INIT_SEED
from sapwood.models import create
from sapwood.training import TrainConfig

SMALL = ["mlp", "--in-channels", "1", "--input-shape", "1", "8", "8"]
QUICK = ["--epochs", "1", "--milestones", "--lr", "0.05"]


def errors(capsys):
    """The one line on standard error that a user's mistake leads to."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("sapwood: error: ")
    assert lines[0].endswith((".", ")", "'"))
    return lines[0]


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return re.sub(r"[\s│]+", " ", capsys.readouterr().out)


@pytest.fixture
def mask_file(tmp_path):
    assert main(["prune", *SMALL, "--method", "magnitude", "--density", "0.1", "--out", str(tmp_path / "m")]) == 0
    return tmp_path / "m"


# Help and flags.


def test_help_names_the_four_commands(capsys):
    text = help_of(capsys)
    assert [word for word in ("prune", "train", "compare", "show") if f"• {word}" not in text] == []


def test_help_states_defaults_and_units(capsys):
    prune, train, compare = (help_of(capsys, name) for name in ("prune", "train", "compare"))
    assert "above 0, at most 1" in prune
    assert "(default: ntk-sap)" in prune
    assert "(default: 160)" in train
    assert "0.9 0.95 0.98" in compare
    assert "--seed " not in compare  # of the training: --seeds decides


def test_every_setting_of_training_is_a_flag(capsys):
    text = help_of(capsys, "train")
    for field in dataclasses.fields(TrainConfig):
        if field.name == "start_epoch":  # follows from how a network is retrained
            continue
        assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.trap(25)
@pytest.mark.parametrize("flag", ["nesterov", "channels-last"])
@pytest.mark.parametrize("value", [True, False])
def test_boolean_settings_of_training(tmp_path, flag, value):
    typed = [f"--{flag}" if value else f"--no-{flag}"]
    assert main(["train", "mlp", *QUICK, *typed, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["train"][flag.replace("-", "_")] is value


@pytest.mark.trap(25)
def test_dry_run_and_its_negation(tmp_path, capsys):
    out = tmp_path / "m"
    command = ["prune", *SMALL, "--method", "random", "--density", "0.5", "--out", str(out)]
    assert main([*command, "--dry-run"]) == 0
    assert "kept" not in capsys.readouterr().out
    assert not out.exists()
    assert main([*command, "--no-dry-run"]) == 0
    assert out.exists()


@pytest.mark.trap(25)
def test_overwrite_and_its_negation(mask_file, capsys):
    before = mask_file.read_bytes()
    command = ["prune", *SMALL, "--method", "random", "--density", "0.5", "--out", str(mask_file)]
    capsys.readouterr()
    assert main([*command, "--no-overwrite"]) == 2
    assert "--overwrite" in errors(capsys)
    assert mask_file.read_bytes() == before
    assert main([*command, "--overwrite"]) == 0
    assert Masks.load(mask_file).density == pytest.approx(0.5, abs=1e-4)


@pytest.mark.trap(25)
def test_csv_and_its_negation(mask_file, capsys):
    capsys.readouterr()
    assert main(["show", str(mask_file), "--csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layer,shape,kept,weights,density"
    assert [line.split(",")[3] for line in lines[1:]] == ["19200", "30000", "1000"]
    assert main(["show", str(mask_file), "--no-csv"]) == 0
    text = capsys.readouterr().out
    assert "magnitude" in text and "50,200" in text and "5,020" in text


@pytest.mark.trap(25)
def test_offline_and_its_negation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: (_ for _ in ()).throw(OSError("the test has no network")))
    where = ["prune", "resnet8", "--data", "cifar10", "--data-root", str(tmp_path / "data"), "--density", "0.5"]
    assert main([*where, "--out", str(tmp_path / "m"), "--offline"]) == 2
    offline = errors(capsys)
    assert main([*where, "--out", str(tmp_path / "m"), "--no-offline"]) == 2
    assert offline != errors(capsys)
    assert not (tmp_path / "m").exists()


# prune


def test_prune_writes_masks_of_the_seeds_model(mask_file):
    masks = Masks.load(mask_file)
    assert (masks.kept, masks.total) == (5_020, 50_200)
    torch.manual_seed(INIT_SEED)
    weights = dict(create("mlp", in_channels=1, image_size=8).named_parameters())
    kept = torch.cat([weights[name].abs()[mask] for name, mask in masks.items()])
    gone = torch.cat([weights[name].abs()[~mask] for name, mask in masks.items()])
    assert kept.min() >= gone.max()


def test_prune_takes_fields_and_targets(tmp_path, capsys):
    out = str(tmp_path / "new" / "m")
    typed = ["--sparsity", "0.9", "--exclude", "layers.5.*", "--set", "rounds=3", "resamples=1", "epsilon=1e-3"]
    assert main(["prune", *SMALL, *typed, "--allocation", "erk", "--seed", "4", "--out", out]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == out
    masks = Masks.load(out)
    assert "layers.5.weight" not in masks
    chosen = masks.provenance["fields"]
    assert (chosen["rounds"], chosen["resamples"], chosen["epsilon"], chosen["allocation"]) == (3, 1, 1e-3, "erk")
    assert masks.provenance["seed"] == 4


def test_prune_with_data_scores_on_its_labels(tmp_path):
    command = ["prune", "mlp", "--data", "digits", "--method", "snip", "--compression", "10"]
    assert main([*command, "--out", str(tmp_path / "m")]) == 0
    assert Masks.load(tmp_path / "m").density == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--sparsity", "1.2"], "sparsity is 1.2"),
        ([], "exactly one of density"),
        (["--density", "0.1", "--sparsity", "0.9"], "exactly one of density"),
        (["--density", "0.1", "--method", "sinp"], "Did you mean 'snip'?"),
        (["--density", "0.1", "--method", "snip"], "add --data NAME"),
        (["--density", "0.1", "--data", "digit"], "Did you mean 'digits'?"),
        (["--density", "0.1", "--data", "digits", "--num-classes", "7"], "--num-classes is 7"),
        (["--density", "0.1", "--set", "round=3"], "Did you mean 'rounds'?"),
        (["--density", "0.1", "--set", "rounds=three"], "type int"),
        (["--density", "0.1", "--set", "rounds"], "FIELD=VALUE"),
        (["--density", "0.1", "--set", "rounds=0"], "rounds is 0"),
        (["--density", "0.1", "--set", "epsilon=-1"], "epsilon is -1"),
        (["--density", "0.1", "--allocation", "globl"], "Did you mean 'global'?"),
        (["--density", "0.1", "--device", "abacus"], "no device 'abacus'"),
        (["--density", "0.1", "--in-channels", "3"], "--in-channels is 3"),
        (["--density", "0.1", "--exclude", "nothing.*"], "nothing.*"),
    ],
)
def test_prune_refuses_in_one_sentence(tmp_path, capsys, typed, said):
    model = ["mlp"] if "--data" in typed else SMALL
    assert main(["prune", *model, *typed, "--out", str(tmp_path / "new" / "m")]) == 2
    assert said in errors(capsys)
    assert not (tmp_path / "new" / "m").exists()


def test_unknown_model_lists_the_legal_ones(tmp_path, capsys):
    assert main(["prune", "resnet21", "--density", "0.1", "--out", str(tmp_path / "m")]) == 2
    said = errors(capsys)
    assert "Did you mean 'resnet" in said
    assert "vgg16-bn" in said


def test_out_is_asked_for(capsys):
    assert main(["prune", *SMALL, "--density", "0.1"]) == 2
    assert "--out FILE" in errors(capsys)


def test_a_folder_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["prune", *SMALL, "--method", "random", "--density", "0.5", "--out", str(tmp_path / "file/m")]) == 2
    errors(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_collapse_is_one_warning_line(tmp_path, capsys):
    command = ["prune", *SMALL, "--method", "magnitude", "--density", "0.0005"]
    assert main([*command, "--out", str(tmp_path / "m")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sapwood: warning: ") and "keep no weight" in line


# show and train


def test_damaged_and_missing_mask_files(mask_file, tmp_path, capsys):
    cut = tmp_path / "cut"
    cut.write_bytes(mask_file.read_bytes()[:-100])
    capsys.readouterr()
    for path, said in ((tmp_path / "none", "no mask file"), (cut, "truncated")):
        assert main(["show", str(path)]) == 2
        assert said in errors(capsys)
        assert main(["train", "mlp", "--masks", str(path), "--out", str(tmp_path / "run")]) == 2
        assert said in errors(capsys)
    assert not (tmp_path / "run").exists()


def test_masks_of_another_model(mask_file, tmp_path, capsys):
    capsys.readouterr()
    assert main(["train", "resnet8", "--masks", str(mask_file), "--out", str(tmp_path / "run")]) == 2
    assert "belong to another model" in errors(capsys)
    assert not (tmp_path / "run").exists()


def test_train_under_masks_keeps_zeros_and_writes_the_result(mask_file, tmp_path, capsys):
    from safetensors.torch import load_file

    out = tmp_path / "run"
    command = ["train", "mlp", "--masks", str(mask_file), *QUICK, "--validation", "0.2", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads((out / "result.json").read_text())
    assert printed[-1] == str(out)
    assert f"{result['test_accuracy']:.2f} %" in printed[-3]
    assert f"{result['validation_accuracy']:.2f} %" in printed[-2]
    weights, masks = load_file(out / "weights.safetensors"), Masks.load(mask_file)
    assert all(not weights[name][~mask].any() for name, mask in masks.items())
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "environment.json",
        "identity.json",
        "metrics.jsonl",
        "result.json",
        "run.lock",
        "weights.safetensors",
    ]


def test_train_does_not_repeat_itself_and_refuses_another_run(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "mlp", *QUICK, "--out", str(out)]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "config.json"}
    assert main(["train", "mlp", *QUICK, "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    capsys.readouterr()
    assert main(["train", "mlp", *QUICK, "--batch-size", "32", "--out", str(out)]) == 2
    assert "differs in train" in errors(capsys)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("around", "typed", "expected"),
    [
        ({}, [], None),
        ({}, ["--devices", "2"], ("cpu", 2, "auto", "float32")),
        ({}, ["--devices", "1", "--strategy", "fsdp"], ("cpu", 1, "fsdp", "float32")),
        ({"TORCHELASTIC_RUN_ID": "7", "LOCAL_WORLD_SIZE": "4"}, [], ("cpu", 4, "auto", "float32")),
        ({"TORCHELASTIC_RUN_ID": "7", "LOCAL_WORLD_SIZE": "4"}, ["--devices", "1"], None),
        ({"LOCAL_WORLD_SIZE": "4"}, [], None),  # of something else
    ],
)
def test_devices_are_those_asked_for_or_started_by_torchrun(tmp_path, monkeypatch, around, typed, expected):
    asked = []
    monkeypatch.setattr("sapwood.cli.flags.fabric_for", lambda *settings: asked.append(settings))
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "mlp", *QUICK, "--device", "cpu", *typed, "--out", str(tmp_path / "run")]) == 0
    assert asked == ([] if expected is None else [expected])


def test_other_processes_leave_the_words_to_the_first(tmp_path, capsys, monkeypatch):
    class Second:
        is_global_zero, world_size, device = False, 2, torch.device("cpu")

        def barrier(self):
            """There is nobody to wait for."""

    monkeypatch.setattr("sapwood.cli.flags.fabric_for", lambda *settings: Second())
    monkeypatch.setattr("sapwood.cli.train.run", lambda *_, **__: None)
    typed = ["train", "mlp", *QUICK, "--devices", "2", "--out", str(tmp_path / "run")]
    assert main(typed) == 0

    def refuse(*_, **__):
        raise ConfigError("which the first process says.")

    monkeypatch.setattr("sapwood.cli.train.run", refuse)
    assert main(typed) == 3
    said = capsys.readouterr()
    assert said.out == said.err == ""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]])
def test_train_in_two_processes(mask_file, tmp_path, launcher):
    typed = ["train", "mlp", *QUICK, "--device", "cpu", "--masks", str(mask_file), "--out"]
    typed += [str(tmp_path / "two"), *([] if launcher else ["--devices", "2"])]
    command = [sys.executable, "-m", *launcher, "sapwood", *typed]
    for _ in range(2):  # the second time it is there
        ended = subprocess.run(command, capture_output=True, text=True, timeout=250)
        assert ended.returncode == 0, ended.stderr
        assert re.fullmatch(r"test accuracy after epoch 1: [\d.]+ %\n.*/two\n", ended.stdout), ended.stdout
    assert main(["train", "mlp", *QUICK, "--masks", str(mask_file), "--out", str(tmp_path / "one")]) == 0
    two, one = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one"))
    assert two["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=0.3)  # one of 355 images
    assert two["environment"]["processes"].startswith("2 (")
    ended = subprocess.run([*command, "--batch-size", "32"], capture_output=True, text=True, timeout=250)
    assert ended.returncode != 0 and ended.stderr.count("differs in train") == 1


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--lr", "-1"], "lr must be above 0"),
        (["--schedule", "cosin"], "Did you mean 'cosine'?"),
        (["--data", "folder"], "needs root"),
        (["--precision", "fp61"], "Did you mean 'fp16'?"),
        (["--devices", "0"], "devices must be at least 1"),
        (["--strategy", "fdsp"], "Did you mean 'fsdp'?"),
        (["--data", "tiny-imagenet", "--offline", "--data-root", "nowhere"], "nowhere"),
    ],
)
def test_train_refuses_in_one_sentence(tmp_path, capsys, typed, said):
    assert main(["train", "mlp", *typed, "--out", str(tmp_path / "run")]) == 2
    assert said in errors(capsys)
    assert not (tmp_path / "run").exists()


# As a process.


def program(*typed, **options):
    return subprocess.run([sys.executable, "-m", "sapwood", *typed], capture_output=True, text=True, **options)


def test_python_m_sapwood_exits_with_2_and_one_line(tmp_path):
    ended = program("show", str(tmp_path / "none"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"sapwood: error: There is no mask file '.*'\.\n", ended.stderr)


def test_help_does_not_import_what_only_reports_need():
    script = (
        "import sys, sapwood.cli\n"
        "try: sapwood.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'matplotlib', 'pandas', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_interrupt_exits_with_130_and_one_line(tmp_path):
    out = tmp_path / "run"
    typed = ["train", "mlp", "--epochs", "400", "--milestones", "--lr", "0.01", "--out", str(out)]
    # A background job of a shell ignores Ctrl-C, and so would its children: the test may be part of one.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "sapwood", *typed]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        try:
            while not (out / "checkpoint.pt").exists():
                assert process.poll() is None
                time.sleep(0.05)
            os.kill(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert re.fullmatch(r"sapwood: error: interrupted.*\n", said)
    assert not (out / "result.json").exists()


def test_a_warning_reaches_the_terminal_only_where_it_is_about_what_the_user_did(capsys, tmp_path, monkeypatch):
    # torch warns of its own forward mode; the user's model warns of itself
    (tmp_path / "mine.py").write_text(
        "import warnings, torch\n"
        "def factory(**_):\n"
        "    warnings.warn('the weights of mine are old', FutureWarning)\n"
        "    warnings.warn_explicit('torch is old', FutureWarning, torch.__file__, 1)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        flags = ["--method", "ntk-sap-jvp", "--density", "0.5", "--out", str(tmp_path / "m")]
        assert main(["prune", "mine:factory", *SMALL[1:], *flags]) == 0
    assert capsys.readouterr().err == "sapwood: warning: the weights of mine are old\n"
