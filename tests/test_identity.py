"""A result is served for what it was computed from, and for nothing else: data, model, code, versions."""

import dataclasses
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sapwood
from sapwood import Masks, files
from sapwood.cli import main
from sapwood.data import load
from sapwood.data.files import ImageFiles
from sapwood.data.images import Images
from sapwood.errors import ConfigError, SapwoodWarning
from sapwood.experiments import identity, kernels, material, sources, store
from sapwood.experiments.compare import compare, run_folder
from sapwood.experiments.config import ORDER_SEED, Place, RunConfig
from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.job import Job, attempt
from sapwood.experiments.kernels import KernelConfig, Spectra
from sapwood.experiments.material import create_model, load_data
from sapwood.experiments.run import run
from sapwood.training import TrainConfig

RESULTS = Path(__file__).parent.parent / "results"
SHORT = TrainConfig(epochs=2, milestones=(), lr=0.05, seed=ORDER_SEED)
SNIP = RunConfig("folder", "mlp", "snip", 0.2, per_class=2, train=SHORT)
HERE = EngineConfig(workers=1)
METHOD = """
import torch
{imports}

class Mine:
    def __call__(self, net, masks, data, generator):
        {body}
        return {{name: {score} for name, w in net.weights.items()}}

method = Mine()
"""
MODEL = """
import torch
from torch import nn
{imports}

class Net(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.first, self.last = nn.Linear(64 * in_channels, 8), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.last({activation}(self.first(x.flatten(1))))

def net(num_classes=2, in_channels=3):
    return Net(num_classes, in_channels)
"""


def images(root, seed=0, count=4):
    """Two classes of 8x8 images."""
    chance = np.random.default_rng(seed)
    for part in ("train", "test"):
        for label in ("a", "b"):
            folder = root / part / label
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(chance.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def data(tmp_path):
    return images(tmp_path / "data")


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Writes modules, which are imported anew: `code(name=source)`."""
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    written = []

    def write(**modules):
        for name, source in modules.items():
            path = folder / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
            written.append(name.replace("__", "."))
        for name in [n for n in sys.modules if any(n.partition(".")[0] == w.partition(".")[0] for w in written)]:
            del sys.modules[name]
        importlib.invalidate_caches()

    yield write
    for name in written:
        sys.modules.pop(name, None)


def place(root=None):
    return Place("cpu", root, offline=True)


def content(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.lock"}


class Stop(BaseException):
    pass


def stop(row):
    raise Stop


def half(config, folder, where):
    with pytest.raises(Stop):
        run(config, folder, where, on_epoch=stop)


# The data.


def other_pixel(root):
    file = root / "train/a/0.png"
    pixels = np.array(Image.open(file))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(file)


CHANGES = {
    "a pixel": other_pixel,
    "a test image": lambda root: shutil.copy(root / "test/a/0.png", root / "test/a/1.png"),
    "an image more": lambda root: shutil.copy(root / "train/a/0.png", root / "train/a/9.png"),
    "an image less": lambda root: (root / "train/b/3.png").unlink(),
    "a label": lambda root: (root / "train/b/3.png").rename(root / "train/a/z.png"),
    "another order": lambda root: (root / "train/b/3.png").rename(root / "train/b/00.png"),
    "a class": lambda root: [shutil.copytree(root / part / "a", root / part / "c") for part in ("train", "test")],
}


@pytest.mark.trap(78)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("moment", ["half-way", "finished"])
def test_changed_images_are_refused_in_a_sentence_and_nothing_is_touched(tmp_path, data, change, moment):
    out = tmp_path / "out"
    kept = shutil.copytree(data, tmp_path / "kept")
    if moment == "finished":
        before = run(SNIP, out, place(data))
    else:
        half(SNIP, out, place(data))
    written = content(out)
    change(data)
    with pytest.raises(ConfigError, match=r"images or labels of the data set.* changed\. Choose another .*delete"):
        run(SNIP, out, place(data))
    written[out / "config.json"] = (out / "config.json").read_bytes()  # says the same, and is written at every entry
    assert content(out) == written
    again = run(SNIP, out, place(kept))  # the same images elsewhere
    assert moment == "half-way" or again == before


@pytest.mark.trap(78)
def test_compare_refuses_before_anything_is_run_and_says_it_once(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr("sapwood.experiments.report.write_report", lambda outcomes, out, *_, **__: out / "report.html")
    typed = ["compare", "--data", "folder", "--model", "mlp", "--methods", "snip", "--sparsities", "0.5", "--seeds"]
    typed += ["0", "1", "--per-class", "2", "--epochs", "1", "--milestones", "--workers", "1"]
    typed += ["--out", str(tmp_path / "out"), "--data-root"]
    assert main([*typed, str(data)]) == 0
    capsys.readouterr()
    before = content(tmp_path / "out")
    assert main([*typed, str(data)]) == 0 and capsys.readouterr().err == ""
    other = images(tmp_path / "other", seed=1)
    assert main([*typed, str(other)]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert "images or labels" in line and "--out" in line and str(tmp_path / "out/runs") in line and not said.out
    assert content(tmp_path / "out") == before
    assert main([*typed[:-3], "--out", str(tmp_path / "new"), "--data-root", str(other)]) == 0


@pytest.mark.trap(78)
def test_train_refuses_other_images(tmp_path, data, capsys):
    typed = ["train", "mlp", "--data", "folder", "--epochs", "1", "--milestones", "--out", str(tmp_path / "out")]
    assert main([*typed, "--data-root", str(data)]) == 0
    other_pixel(data)
    assert main([*typed, "--data-root", str(data)]) == 2
    assert "images or labels" in capsys.readouterr().err


@pytest.mark.trap(78)
def test_masks_and_kernels_of_other_images_are_not_used(tmp_path, capsys):
    data = images(tmp_path / "data", count=10)
    typed = ["ntk", "mlp", "--data", "folder", "--method", "snip", "--sparsity", "0.5", "--per-class", "1"]
    typed += ["--out", str(tmp_path / "out"), "--data-root", str(data)]
    assert main(typed) == 0
    other_pixel(data)
    capsys.readouterr()
    assert main(typed) == 2
    assert "images or labels" in capsys.readouterr().err


@pytest.mark.trap(78)
def test_data_that_change_while_a_comparison_goes_on_are_noticed(tmp_path, data):
    inputs = identity.inputs(SNIP, load_data("folder", None, place(data)))
    other_pixel(data)
    outcome = attempt(Job(SNIP, tmp_path / "out", place(data), inputs=inputs))
    assert outcome.result is None and "While the comparison was going on, the images or labels" in outcome.error
    assert not (tmp_path / "out").exists()


def test_levels_before_a_run_are_of_the_same_data(tmp_path, data):
    imp = RunConfig("folder", "mlp", "magnitude", 0.8, train=SHORT, retrain="rewind-weights", rate=0.2)
    dense = RunConfig("folder", "mlp", train=SHORT)
    run(dense, tmp_path / "runs" / dense.id, place(data), keep=(2,))
    other_pixel(data)
    with pytest.raises(ConfigError, match=rf"{dense.id} holds a run of something else: .*images or labels"):
        run(imp, tmp_path / "runs" / imp.id, place(data))
    with pytest.raises(ConfigError, match="images or labels"):
        compare([imp], tmp_path, place(data), engine=HERE)


def test_images_that_stay_on_disk_are_read_once_and_again_when_one_changes(tmp_path, data, monkeypatch):
    monkeypatch.setenv("SAPWOOD_DATA", str(tmp_path / "cache"))
    read, whole = [], load("folder", data)
    real = files.digest
    monkeypatch.setattr(files, "digest", lambda path: read.append(path) or real(path))

    def digest():
        parts = []
        for part in ("train", "test"):
            paths = tuple(sorted((data / part).rglob("*.png")))
            parts.append(Images(ImageFiles(paths, (8, 8), True), torch.zeros(len(paths), dtype=torch.long)))
        return identity.data_digest(dataclasses.replace(whole, train=parts[0], test=parts[1]))

    first = digest()
    assert len(read) == 16 and digest() == first and len(read) == 16
    file = data / "train/a/0.png"
    times = file.stat()
    changed = bytearray(file.read_bytes())
    changed[-20] ^= 1
    file.write_bytes(changed)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and time of change
    assert digest() != first and len(read) == 24


# The code.


def edited(code, monkeypatch, what):
    """Writes a method, runs it, changes something; gives the path and what the refusal must name."""
    plain = {"imports": "", "body": "", "score": "w.abs()"}
    if what == "the method":
        code(mine=METHOD.format(**plain))
        yield "mine:method"
        code(mine=METHOD.format(**{**plain, "score": "-w.abs()"}))
        yield "the source of mine"
    elif what == "a helper":
        code(mine=METHOD.format(**{**plain, "imports": "import helper", "score": "helper.score(w)"}), helper=HELPER[0])
        yield "mine:method"
        code(helper=HELPER[1])
        yield "the source of helper"
    elif what == "a helper's constant":
        code(
            mine=METHOD.format(**{**plain, "imports": "from helper import SIGN", "score": "SIGN * w"}),
            helper="SIGN = 1",
        )
        yield "mine:method"
        code(helper="SIGN = -1")
        yield "the source of helper"
    elif what == "a helper of a helper, imported late":
        late = {**plain, "body": "import helper", "score": "helper.score(w)"}
        code(
            mine=METHOD.format(**late),
            helper="def score(w):\n    from deep import SIGN\n    return SIGN * w",
            deep="SIGN = 1",
        )
        yield "mine:method"
        code(deep="SIGN = -1")
        yield "the source of deep"
    elif what == "a module beside it in a package":
        beside = {**plain, "imports": "from .tools import score", "score": "score(w)"}
        code(pack__mine=METHOD.format(**beside), pack__tools=HELPER[0])
        yield "pack.mine:method"
        code(pack__tools=HELPER[1])
        yield "the source of pack.tools"
    elif what == "a setting from the environment":
        monkeypatch.setenv("SIGN", "1")
        source = METHOD.format(**{**plain, "imports": "import os", "score": "self.sign * w"})
        code(mine=source + "method.sign = float(os.environ['SIGN'])\n")
        yield "mine:method"
        monkeypatch.setenv("SIGN", "-1")
        code(mine=source + "method.sign = float(os.environ['SIGN'])\n")
        yield "the settings of the method"


HELPER = ("def score(w):\n    return w.abs()\n", "def score(w):\n    return -w.abs()\n")
EDITS = (
    "the method",
    "a helper",
    "a helper's constant",
    "a helper of a helper, imported late",
    "a module beside it in a package",
    "a setting from the environment",
)


@pytest.mark.trap(79)
@pytest.mark.parametrize("what", EDITS)
def test_an_edited_method_is_another_method(tmp_path, code, monkeypatch, what):
    steps = edited(code, monkeypatch, what)
    config = RunConfig("digits", "mlp", next(steps), 0.2, per_class=1, train=SHORT)
    run(config, tmp_path / "finished", place())
    half(config, tmp_path / "half", place())
    assert run(config, tmp_path / "finished", place()).epochs == 2
    named = next(steps)
    for folder in ("finished", "half"):
        with pytest.raises(ConfigError, match=f"since then {named}.* changed"):
            run(config, tmp_path / folder, place())
    run(RunConfig("digits", "mlp", "snip", 0.2, train=SHORT), tmp_path / "other", place())  # which has no such code


@pytest.mark.trap(79)
@pytest.mark.parametrize("what", ["forward", "helper", "layers", "weights"])
def test_an_edited_model_is_another_model(tmp_path, code, what):
    code(mynet=MODEL.format(imports="import act", activation="act.f"), act="import torch\nf = torch.relu\n")
    config = RunConfig("digits", "mynet:net", "snip", 0.2, per_class=1, train=SHORT)
    before = run(config, tmp_path / "out", place())
    if what == "forward":
        code(mynet=MODEL.format(imports="import act", activation="torch.tanh"))
    elif what == "helper":
        code(act="import torch\nf = torch.tanh\n")
    elif what == "layers":
        code(mynet=MODEL.format(imports="import act", activation="act.f").replace("8)", "9)").replace("r(8", "r(9"))
    else:
        code(mynet=MODEL.format(imports="import act", activation="act.f") + "\ntorch.manual_seed(0)\n")
    with pytest.raises(ConfigError, match=r"the source of (mynet|act).* changed"):
        run(config, tmp_path / "out", place())
    code(mynet=MODEL.format(imports="import act", activation="act.f"), act="import torch\nf = torch.relu\n")
    assert run(config, tmp_path / "out", place()) == before


@pytest.mark.trap(79)
def test_a_kernel_of_an_edited_forward_is_computed_again(tmp_path, code, capsys, monkeypatch):
    monkeypatch.setattr("sapwood.experiments.figures.save", lambda *_: None)
    code(mynet=MODEL.format(imports="", activation="torch.relu"))
    typed = ["ntk", "mynet:net", "--method", "random", "--sparsity", "0.5", "--per-class", "1", "--out"]
    assert main([*typed, str(tmp_path / "out")]) == 0
    code(mynet=MODEL.format(imports="", activation="torch.tanh"))
    assert main([*typed, str(tmp_path / "out")]) == 2  # its masks
    assert "the source of mynet" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out/masks")
    assert main([*typed, str(tmp_path / "out")]) == 0
    assert main([*typed, str(tmp_path / "fresh")]) == 0
    first, second = (Spectra.load(tmp_path / name / "ntk.json").networks for name in ("out", "fresh"))
    assert [n.eigenvalues for n in first] == [n.eigenvalues for n in second]


def test_kernels_are_named_by_all_that_they_depend_on(monkeypatch):
    def name(model=None, x=None, masks=None, config=None, origin=None):
        return kernels._name(model or plain, x if x is not None else ones, masks, config or KernelConfig(), origin)

    plain, ones = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
    other = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    other.load_state_dict(plain.state_dict())
    masks = Masks({"0.weight": torch.ones(2, 2, dtype=torch.bool)})
    names = [
        name(),
        name(other),
        name(x=2 * ones),
        name(masks=masks),
        name(config=KernelConfig("eval")),
        name(origin=1),
    ]
    monkeypatch.setattr(sapwood, "__version__", "9.9")
    assert len({*names, name()}) == len(names) + 1


def test_libraries_and_the_standard_library_are_not_somebodys_code():
    found = sources.seen("test_identity:METHOD").digests
    assert "test_identity" in found
    assert not {name.partition(".")[0] for name in found} & {"torch", "numpy", "PIL", "json", "sapwood", "pytest"}


def test_what_a_process_has_imported_counts_and_not_what_was_edited_since(code, tmp_path):
    code(mine=METHOD.format(imports="", body="", score="w"))
    importlib.import_module("mine")
    before = sources.seen("mine:method").digests
    (tmp_path / "code/mine.py").write_text("# edited\n")
    assert sources.seen("mine:method").digests == before


@dataclasses.dataclass
class Held:
    inner: object
    factor: float = 1.0


def closes_over(value):
    return lambda: value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Held(1), Held(2)),
        (Held(Held(1)), Held(Held(2))),
        (Held(torch.ones(2)), Held(torch.zeros(2))),
        (Held(np.ones(2)), Held(np.zeros(2))),
        (Held({"a": 1}), Held({"a": 2})),
        (Held({1, 2}), Held({1, 3})),
        (closes_over(1), closes_over(2)),
        (Held(closes_over(1)), Held(closes_over(2))),
        (Held(print), Held(len)),
        (Held(int), Held(float)),
    ],
)
def test_state_tells_objects_apart(one, other):
    digest = [files.checksum(sources.state(thing)) for thing in (one, one, other)]
    assert digest[0] == digest[1] != digest[2]


def test_state_of_what_refers_to_itself_and_of_what_has_addresses():
    loop = Held(None)
    loop.inner = loop
    assert files.checksum(sources.state(loop))
    assert files.checksum(sources.state(Held(object()))) == files.checksum(sources.state(Held(object())))


def test_a_module_that_a_mask_file_names_is_not_imported(tmp_path, code, capsys):
    code(evil="raise SystemExit('imported')")
    masks = Masks({"layers.1.weight": torch.ones(300, 64, dtype=torch.bool)}, {"method": "evil:method"})
    masks.save(tmp_path / "masks")
    typed = ["train", "mlp", "--epochs", "1", "--milestones", "--masks", str(tmp_path / "masks"), "--out"]
    assert main([*typed, str(tmp_path / "out")]) == 0 and "evil" not in sys.modules


def test_a_run_that_left_nothing_may_be_of_anything(tmp_path, code, data):
    code(mine=METHOD.format(imports="", body="raise ValueError('not yet')", score="w"))
    config = dataclasses.replace(SNIP, method="mine:method")
    (outcome,) = compare([config], tmp_path / "out", place(data), engine=HERE)
    assert "not yet" in outcome.error
    code(mine=METHOD.format(imports="", body="", score="w"))
    other_pixel(data)
    (outcome,) = compare([config], tmp_path / "out", place(data), engine=HERE)
    assert outcome.result is not None, outcome.error


def test_a_record_of_another_kind_is_a_damaged_one(tmp_path):
    for value in ({}, {"data": ""}, {**dict.fromkeys([*identity.TEXTS, *identity.TABLES], "")}):
        files.write_json(tmp_path / store.IDENTITY, value)
        assert identity.read(tmp_path) is None


# The model.


def test_structure_sees_what_weights_do_not_say():
    variants = [
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.ReLU()),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU()),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU("tanh")),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.LeakyReLU(0.1)),
        nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, 3)),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).double(),
    ]
    assert len({identity.structure(model) for model in variants}) == len(variants)
    again = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    assert identity.structure(again) == identity.structure(variants[0])


def test_initial_weights_follow_from_the_seed_whichever_generator_draws_them(code):
    code(
        mynet="import random\nimport numpy as np\nimport torch\nfrom torch import nn\n"
        "def net(num_classes):\n"
        "    layer = nn.Linear(192, num_classes)\n"
        "    layer.weight.data[0] = torch.from_numpy(np.random.rand(192))\n"
        "    layer.weight.data[1] = random.random()\n"
        "    return nn.Sequential(nn.Flatten(), layer)\n"
    )
    shape = {"num_classes": 2, "in_channels": 3, "image_size": 8}
    first, second, other = (material.initialised("mynet:net", seed, **shape)[1].weight for seed in (0, 0, 1))
    assert torch.equal(first, second) and not (first == other).any()


def test_the_library_of_a_model_counts_with_its_version():
    timm = pytest.importorskip("timm", reason="the extra 'vision' is not installed")
    assert identity.versions("timm:resnet18")["timm"] == timm.__version__
    assert set(identity.versions("mlp")) == {"sapwood", "torch"}


# Versions, and runs that go on.


@pytest.mark.trap(80)
@pytest.mark.parametrize("which", ["sapwood", "torch"])
def test_a_run_that_another_version_began_does_not_go_on_silently(tmp_path, monkeypatch, which):
    config = dataclasses.replace(SNIP, data="digits")
    half(config, tmp_path / "half", place())
    finished = run(config, tmp_path / "finished", place())
    monkeypatch.setattr(sapwood if which == "sapwood" else torch, "__version__", "9.9.9+cpu")
    with pytest.raises(ConfigError, match=rf"since then {which} \(.*, now 9\.9\.9\) changed\. .*delete"):
        run(config, tmp_path / "half", place())
    assert run(config, tmp_path / "finished", place()) == finished  # which says what made it
    shutil.rmtree(tmp_path / "half")
    assert run(config, tmp_path / "half", place()).epochs == 2


@pytest.mark.trap(80)
def test_compare_says_which_runs_another_version_began(tmp_path, monkeypatch):
    config = dataclasses.replace(SNIP, data="digits")
    half(config, run_folder(tmp_path, config), place())
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(ConfigError, match=rf"{config.id} holds a run of something else: since then torch"):
        compare([config], tmp_path, place(), engine=HERE)


def test_a_run_that_goes_on_on_another_machine_says_both(tmp_path, monkeypatch):
    config = dataclasses.replace(SNIP, data="digits")
    half(config, tmp_path, place())
    monkeypatch.setattr("sapwood.experiments.environment._processor", lambda: "another processor")
    result = run(config, tmp_path, place())
    assert ", then another processor" in result.environment["processor"]
    assert ", then" not in result.environment["torch"]
    assert store.finished(tmp_path, config) == result


@pytest.mark.trap(80)
def test_a_half_way_run_without_a_record_is_not_taken_up(tmp_path):
    config = dataclasses.replace(SNIP, data="digits")
    half(config, tmp_path, place())
    (tmp_path / store.IDENTITY).unlink()
    with pytest.raises(ConfigError, match=r"an older version began.*delete it to begin again"):
        run(config, tmp_path, place())


def test_a_damaged_record_means_that_the_run_begins_again(tmp_path):
    config = dataclasses.replace(SNIP, data="digits")
    whole = run(config, tmp_path / "whole", place())
    half(config, tmp_path / "half", place())
    (tmp_path / "half" / store.IDENTITY).write_text("{")
    seen = []
    again = run(config, tmp_path / "half", place(), on_epoch=lambda row: seen.append(row["epoch"]))
    assert seen == [1, 2] and again.test_accuracy == whole.test_accuracy
    (tmp_path / "whole" / store.IDENTITY).write_text("{")
    assert store.finished(tmp_path / "whole", config) is None


# Old folders, and data that are away.


def test_finished_runs_of_an_older_version_are_taken_and_it_is_said(tmp_path, monkeypatch):
    config = dataclasses.replace(SNIP, data="digits")
    folder = run_folder(tmp_path, config)
    result = run(config, folder, place())
    (folder / store.IDENTITY).unlink()
    old = dataclasses.replace(result, files={k: v for k, v in result.files.items() if k != store.IDENTITY})
    store.write_result(folder, old)
    with pytest.warns(SapwoodWarning, match="1 finished runs in .* are of an older version"):
        (outcome,) = compare([config], tmp_path, place(), engine=HERE)
    assert outcome.result == old


@pytest.mark.parametrize("name", [p.name for p in sorted(RESULTS.iterdir()) if (p / "runs").is_dir()])
def test_committed_runs_are_still_read(name):
    for folder in sorted((RESULTS / name / "runs").iterdir()):
        saved = files.read_json(folder / store.CONFIG)
        train = {**saved["train"], "milestones": tuple(saved["train"]["milestones"])}
        config = RunConfig(**{**saved, "train": TrainConfig(**train)})
        assert config.id == folder.name and store.finished(folder, config) is not None


def test_finished_runs_are_shown_where_their_data_are_not(tmp_path, data):
    configs = [SNIP]
    (first,) = compare(configs, tmp_path / "out", place(data), engine=HERE)
    material._load.cache_clear()
    shutil.rmtree(data)
    with pytest.warns(SapwoodWarning, match="It is not known whether the data are those of the finished runs"):
        (again,) = compare(configs, tmp_path / "out", place(data), engine=HERE)
    assert again.result == first.result


def test_identity_is_no_part_of_the_id_and_lies_beside_the_run(tmp_path):
    config = dataclasses.replace(SNIP, data="digits")
    run(config, tmp_path, place())
    found = identity.read(tmp_path)
    dataset = load_data("digits", None, place())
    assert found == identity.of(config, dataset, create_model("mlp", dataset, 0))
    assert json.loads(json.dumps(found)) == found and not set(found) & set(config.to_json()) - {
        "data",
        "method",
        "model",
    }
