"""Fuzzers: damaged files, odd folders, wrong command lines and arguments. Nothing foreign escapes, nothing bad passes.

A few seconds of each in the default suite, minutes behind the mark `slow`. Every case is a function of its seed.
"""

import contextlib
import io
import json
import math
import os
import random
import shutil
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sapwood
from hostile import FLOATS, INTEGERS, WORDS, mutated
from sapwood import MaskFileError, Masks, SapwoodError, data
from sapwood.cli import main
from sapwood.errors import DataError
from sapwood.mask_files import encoded

SEED = int(os.environ.get("SAPWOOD_FUZZ_SEED", "0"))
long = pytest.mark.slow


def lengths(short: int, slow: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [short, pytest.param(slow, marks=long)])


# Mask files.


def some_masks(rng: random.Random) -> Masks:
    shapes = [[rng.randint(0, 9) for _ in range(rng.randint(0, 3))] for _ in range(rng.randint(1, 4))]
    source = torch.Generator().manual_seed(rng.randrange(2**31))
    tensors = {f"layer{i}.weight": torch.rand(shape, generator=source) < 0.5 for i, shape in enumerate(shapes)}
    return Masks(
        tensors, {"method": "snip", "fields": {"rounds": 3}, "seed": rng.randrange(9), "seconds": rng.random()}
    )


@pytest.mark.trap(83)
@lengths(600, 30_000)
def test_damaged_mask_files(tmp_path, count):
    rng = random.Random(SEED + count)
    for _ in range(count):
        masks, path = some_masks(rng), tmp_path / "m"
        content = encoded(masks, masks.provenance)
        damaged = mutated(content, rng)
        path.write_bytes(damaged)
        if damaged == content:
            continue
        with pytest.raises(MaskFileError) as caught:
            Masks.load(path)
        assert str(caught.value).isprintable()


@lengths(300, 10_000)
def test_mask_files_with_other_values(tmp_path, count):
    """Headers that somebody wrote on purpose, checksum and all: refused, or masks of the shapes that they say."""
    from test_mask_files import forged, header_of

    rng = random.Random(SEED + count)
    odd = [None, True, -1, 0, 2**63, 1.5, "", "x", [], [1], {}, {"a": 1}, [[]], "[" * 3000, "NaN", math.nan, "\x1b[31m"]
    path, accepted = tmp_path / "m", 0
    for _ in range(count):
        masks = some_masks(rng)
        header, body = header_of(encoded(masks, masks.provenance))
        for _ in range(rng.randint(1, 2)):
            place = rng.choice([header["__metadata__"], *header.values()])
            place[rng.choice([*place, "more"])] = rng.choice([*odd, json.dumps(rng.choice(odd))])
        try:
            path.write_bytes(forged(header, body))
            masks = Masks.load(path)
            accepted += 1
            assert {name: list(mask.shape) for name, mask in masks.items()} == json.loads(
                header["__metadata__"]["shapes"]
            )
        except MaskFileError as error:
            assert str(error).isprintable()
    assert accepted < count / 3


# Image folders.


def odd_entry(part: Path, rng: random.Random) -> tuple[str, Path]:
    """Puts something odd into a data set; returns what is to be expected of it: "fine" or "refused"."""
    name = part / rng.choice("ab") / f"{rng.randrange(99)}x.{rng.choice(['png', 'jpg', 'PNG', 'tif', 'webp', 'bmp'])}"
    kind = rng.choice(["hidden", "text", "cut", "noise", "empty", "pipe", "link", "folder", "16 bit", "mode", "size"])
    picture = Image.fromarray(np.full((6, 6, 3), rng.randrange(256), np.uint8))
    if kind == "hidden":
        name.with_name("._x.png").write_bytes(b"\0\5\x16\7")
    elif kind == "text":
        name.with_name("notes.txt").write_text("hello")
    elif kind == "folder":
        name.mkdir(exist_ok=True)
    elif kind == "16 bit":
        Image.fromarray(np.full((6, 6), 999, np.uint16)).save(name.with_suffix(".png"))
    elif kind == "mode":
        picture.convert(rng.choice(["L", "1", "LA", "RGBA", "P"])).save(name.with_suffix(".png"))
    elif kind == "size":
        picture.resize((5, 7)).save(name.with_suffix(".png"))
        return "refused", name
    else:
        name.unlink(missing_ok=True)
        if kind == "cut":
            picture.save(name)
            name.write_bytes(name.read_bytes()[: rng.randrange(20)])
        elif kind == "pipe":
            os.mkfifo(name)
        elif kind == "link":
            name.symlink_to("nowhere")
        else:
            name.write_bytes(rng.randbytes(200) if kind == "noise" else b"")
        return "refused", name
    return "fine", name


@pytest.mark.trap(85)
@lengths(40, 1000)
def test_odd_image_folders(tmp_path, count):
    rng = random.Random(SEED + count)
    for case in range(count):
        root = tmp_path / str(case)
        for place in (root / part / name for part in ("train", "test") for name in "ab"):
            place.mkdir(parents=True)
            pixels = np.frombuffer(rng.randbytes(108), np.uint8).reshape(6, 6, 3)
            Image.fromarray(pixels).save(place / "0.png")
        expected = [odd_entry(root / rng.choice(["train", "test"]), rng)[0] for _ in range(rng.randint(1, 3))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sapwood.SapwoodWarning)
            if "refused" in expected:
                with pytest.raises(DataError) as caught:
                    data.load("folder", root)
                assert "\n" not in str(caught.value)
            else:
                assert data.load("folder", root).input_shape == (3, 6, 6)
        shutil.rmtree(root)


@lengths(150, 5000)
def test_damaged_pictures(tmp_path, count):
    """A picture that is decoded has the size it had, or is refused by name."""
    rng = random.Random(SEED + count)
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
    for _ in range(count):
        kind = rng.choice(["PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP"])
        held = io.BytesIO()
        Image.fromarray(np.frombuffer(rng.randbytes(300), np.uint8).reshape(10, 10, 3)).save(held, kind)
        for part in ("train", "test"):
            (tmp_path / part / "a" / "x.png").write_bytes(mutated(held.getvalue(), rng))
        with warnings.catch_warnings(), contextlib.suppress(DataError):
            warnings.simplefilter("ignore")
            assert data.load("folder", tmp_path, resolution=10).train.images.shape == (1, 3, 10, 10)


# Command lines.

SEEDS = ["0", "7"]
TRAINING = {
    "--epochs": (["1", "3"], [*INTEGERS, "0"]),
    "--batch-size": (["1", "64"], [*INTEGERS, "0"]),
    "--lr": (["0.1", "1", "1e-3"], [*FLOATS, "0"]),
    "--gamma": (["0.5"], [*FLOATS, "0"]),
    "--momentum": (["0", "0.9"], [*FLOATS, "1", "2"]),
    "--weight-decay": (["0", "1e-4"], FLOATS),
    "--share": (["1", "0.5"], [*FLOATS, "0", "1.1"]),
    "--validation": (["0", "0.2"], [*FLOATS, "1"]),
    "--schedule": (["cosine", "one-cycle"], WORDS),
    "--precision": (["float32", "bf16"], WORDS),
    "--warmup-epochs": (["0"], [w for w in INTEGERS if w != "--"]),
}
PLACE = {"--device": (["auto", "cpu"], [*WORDS, "meta", "cuda:99", "cpu:x"])}
GRID = {
    "--data": (["digits"], WORDS),
    "--model": (
        ["mlp", "resnet8", "wrn-10-1"],
        [*(w for w in WORDS if w != "os:system"), "wrn-16-99999999999", "wrn-11-1x", "nowhere:factory"],
    ),
    "--methods": (
        ["random", "magnitude", "snip@rounds=2"],
        [*WORDS, "dense", "snip@rounds=0", "snip@x=1", "snip@=", "snip@schedule=x", "snip@allocation=x"],
    ),
    "--sparsities": (["0.5", "0.9"], [*FLOATS, "1", "90"]),
    "--seeds": (SEEDS, [*INTEGERS, "2147483648"]),
    "--per-class": (["1", "5"], [*INTEGERS, "0"]),
    "--min-per-layer": (["0", "1"], INTEGERS),
    "--resolution": (["8", "16"], [*INTEGERS, "0", "99999999999999999999"]),
}
COMMANDS = {
    "prune": (
        ["mlp", "--density", "0.5", "--in-channels", "1"],
        {
            "--seed": (SEEDS, [*INTEGERS, "99999999999999999999"]),
            "--method": (["random", "synflow", "ntk-sap"], [*WORDS, "imp", "nowhere:method"]),
            "--num-classes": (["2", "10"], [*INTEGERS, "0"]),
            "--input-shape": (["1"], [*INTEGERS, "0", "-5"]),
            "--per-class": (["1"], [*INTEGERS, "0"]),
            "--min-per-layer": (["0"], INTEGERS),
            "--set": (["invert=true"], ["x", "=", *(f"rounds={n}" for n in ("1e999", "0", "9" * 5000, "[" * 9999))]),
            "--allocation": (["global", "erk"], WORDS[:1]),
            **PLACE,
        },
    ),
    "train": (
        ["mlp"],
        {
            **TRAINING,
            **PLACE,
            "--data": (["digits"], WORDS),
            "--seed": (SEEDS, INTEGERS),
            "--resolution": (["8"], [*INTEGERS, "0"]),
            "--devices": (["1"], [*INTEGERS, "0", "99999"]),
            "--strategy": (["auto"], WORDS),
        },
    ),
    "compare": (["--seeds", "0"], {**GRID, **TRAINING, **PLACE, "--workers": (["1"], [*INTEGERS, "0"])}),
    "sweep": (
        [],
        {
            **GRID,
            **TRAINING,
            "--engine": (["local"], WORDS),
            "--retries": (["0", "2"], INTEGERS),
            "--cpus-per-run": (["1"], [*INTEGERS, "0", "99999"]),
            "--runs-per-gpu": (["1"], [*INTEGERS, "0"]),
            "--tracker": (["None"], [w for w in WORDS if w != "os:system"]),
        },
    ),
    "ntk": (
        ["mlp", "--sparsity", "0.5"],
        {
            **PLACE,
            "--method": (["random", "snip"], [*WORDS, "snip@rounds=0"]),
            "--data": (["digits"], WORDS),
            "--seed": (SEEDS, INTEGERS),
            "--steps": (["3"], [*INTEGERS, "0"]),
            "--memory": (["0.5", "2"], [*FLOATS, "0"]),
            "--batch-size": (["10"], [*INTEGERS, "0"]),
            "--per-class": (["1", "10"], [*INTEGERS, "0", "18446744073709551616"]),
            "--batchnorm": (["train", "eval"], WORDS),
        },
    ),
    "run": (["digits"], {**PLACE, "--set": (["train.epochs=1"], ["train.lr=1e999", "grid.seeds=-1", "x"])}),
}  # fmt: skip
OUT = {"prune": "m", "train": "run", "compare": "out", "sweep": "out", "ntk": "out", "run": "out"}


class Reached(Exception):
    """A command line was accepted, and what it says would begin now."""


@pytest.fixture
def nothing_runs():
    names = ["cli.prune.search", "cli.train.run", "cli.compare.compare"]
    names += ["cli.ntk.kernel_run.find_masks", "cli.ntk.kernel_run.spectra"]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(f"sapwood.{name}", side_effect=Reached))
        yield


def outcome(typed: list[str]) -> str:
    """What becomes of a command line, with what it says on standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(typed)
        except Reached:
            return "accepted"
        except SystemExit as ended:  # of tyro's, with words of its own
            return f"refused {ended.code}"
    lines = err.getvalue().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sapwood: error: ") and lines[0].isprintable(), lines
    return f"refused {code}"


@pytest.mark.trap(84)
@lengths(60, 2500)
def test_command_lines(tmp_path, nothing_runs, count):
    """Flags with legal values are accepted; one that is not legal is refused, before anything begins."""
    rng = random.Random(SEED + count)
    for _ in range(count):
        command = rng.choice(list(COMMANDS))
        typed, flags = COMMANDS[command]
        chosen = rng.sample(list(flags), k=rng.randint(1, min(3, len(flags))))
        wrong = rng.choice([None, *chosen])
        values = [(flag, rng.choice(flags[flag][flag == wrong])) for flag in chosen]
        line = [command, *typed, *(f"{flag}={value}" for flag, value in values), f"--out={tmp_path / OUT[command]}"]
        found = outcome(line)
        shown = [word[:60] for word in line]
        assert found == ("accepted" if wrong is None else "refused 2"), f"{shown}, wrong: {wrong}"
        assert not any(path.name != "m" for path in tmp_path.iterdir()), line


@pytest.mark.trap(84)
@pytest.mark.parametrize("command", OUT)
@pytest.mark.parametrize("out", ["file", "file/child", "/dev/null", "/dev/null/x", "x" * 300, "pipe", "link"])
def test_outputs_that_cannot_be_written(tmp_path, nothing_runs, command, out):
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    typed = [command, *COMMANDS[command][0], "--out", out if out.startswith("/") else str(tmp_path / out)]
    if command == "prune" and out in ("file", "link"):
        typed.append("--no-overwrite")
    assert outcome(typed) == "refused 2"
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 3


# The interface in Python.

ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    math.nan,
    math.inf,
    10**30,
    "",
    "x",
    "nowhere:x",
    ":",
    b"x",
    [],
    (),
    {},
    {"x": 1},
    object(),
    len,
]
ODD += [torch.zeros(2), lambda: 3, Path("x"), [None], ["*"], ("a", 1)]


def call(function, arguments: dict) -> None:
    """Calls something: it works, or refuses in one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**arguments)
    except SapwoodError as error:
        assert "\n" not in str(error), error
    except Exception as error:
        pytest.fail(f"{function.__name__}({arguments}): {type(error).__name__}: {error}")


@lengths(300, 10_000)
def test_arguments_of_prune(count):
    """Every argument in turn is something else; the model stays what it was, and so does the random state."""
    rng = random.Random(SEED + count)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    before, luck = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    names = [
        "density",
        "sparsity",
        "compression",
        "min_per_layer",
        "zero_init",
        "seed",
        "diagnosed",
        "within",
        "on_round",
    ]
    names += ["rounds", "schedule", "allocation", "regrow", "invert", "epsilon", "samples", "resamples", "lr", "steps"]
    names += ["batch_statistics", "method", "loss", "forward"]
    for _ in range(count):
        given = {"model": model, "method": rng.choice(["random", "erk", "magnitude", "ntk-sap", "synflow"])}
        given |= {"density": 0.5, "input_shape": (4,)}
        call(sapwood.prune, {**given, **{name: rng.choice(ODD) for name in rng.sample(names, rng.randint(1, 2))}})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(luck, torch.get_rng_state())


@lengths(200, 3000)
def test_arguments_of_load_and_create(count):
    rng = random.Random(SEED + count)
    for _ in range(count):
        name = rng.choice(["name", "root", "offline", "resolution", "memory_limit"])
        call(data.load, {"name": "digits", name: rng.choice(ODD)})
        name = rng.choice(["name", "num_classes", "in_channels", "image_size", "widths", "depth"])
        call(sapwood_model, {"name": "mlp", name: rng.choice(ODD)})


def sapwood_model(**settings: object) -> None:
    from sapwood import models

    models.create(**settings)
