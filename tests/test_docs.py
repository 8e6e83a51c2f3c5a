"""What the documents say is true: their code runs."""

import doctest
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import sapwood
from nets import labelled, mlp
from sapwood import METHODS
from sapwood.cli import main, parsed
from sapwood.experiments.fields import parse_variant
from sapwood.methods import AFTER_TRAINING

ROOT = Path(__file__).parent.parent


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks, indented or fenced, that call the program; `...` stands for more flags."""
    text = (ROOT / page).read_text()
    fenced = "".join(re.findall(r"```(?:sh|bash|shell|console|text)?\n(.*?)```", text, flags=re.DOTALL))
    lines = re.findall(r"^ {4}(?:\$ )?(sapwood .*)", text, re.MULTILINE)
    lines += re.findall(r"^(?:\$ )?(sapwood .*)", fenced, re.MULTILINE)
    return [line.replace(" ...", "") for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_pages_are_taken(page, tmp_path, monkeypatch):
    """By the program's own parser, with all checks that come before anything is run."""
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        try:
            parsed(shlex.split(command, comments=True)[1:])
        except (SystemExit, sapwood.SapwoodError) as error:
            pytest.fail(f"{page} shows {command!r}, which the program refuses: {error}")


def test_pages_show_commands():
    assert sum(len(commands(page)) for page in PAGES) >= 15


def test_the_cheap_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (prune,) = [c for c in commands("docs/closed-form.md") if c.startswith("sapwood prune")]
    (show,) = [c for c in commands("README.md") if c.startswith("sapwood show")]
    recipe = next(c for c in commands("README.md") if re.match("sapwood recipes [a-z]", c))
    for command in (prune, show, f"{recipe.partition('#')[0]} --no-probe"):
        assert main(shlex.split(command, comments=True)[1:]) == 0
    said = capsys.readouterr()
    assert "5,418" in said.out and not said.err


def test_the_method_in_thirty_lines():
    (source,) = python_blocks("CONTRIBUTING.md")
    assert len(source.splitlines()) <= 30
    space: dict = {}
    exec(compile(source, "CONTRIBUTING.md", "exec"), space)
    model, batches = mlp(4, 6, 3).double(), labelled((4,), dtype=torch.float64)
    masks = sapwood.prune(model, method=space["Growth"](), density=0.5, batches=batches).masks
    loss = torch.nn.functional.cross_entropy(model(batches[0][0]), batches[0][1])
    scores = {
        n: -p * g
        for (n, p), g in zip(model.named_parameters(), torch.autograd.grad(loss, model.parameters()), strict=True)
    }
    flat = torch.cat([scores[n].flatten() for n in masks])
    kept = torch.cat([m.flatten() for m in masks.values()])
    assert flat[kept].min() >= flat[~kept].max()


@pytest.mark.trap(76)
@pytest.mark.parametrize("name", ["growth", "method_of_the_page:Growth"])
def test_the_method_in_thirty_lines_runs_in_the_commands(name, tmp_path, monkeypatch, capsys):
    """As a row of the table, and by its import path: what it needs is asked of it, and stands in no list."""
    (source,) = python_blocks("CONTRIBUTING.md")
    (tmp_path / "method_of_the_page.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    page = importlib.import_module("method_of_the_page")
    monkeypatch.setitem(METHODS, "growth", sapwood.Method(page.Growth(), rounds=10))
    out, masks = tmp_path / "out", tmp_path / "masks"
    typed = ["compare", "--methods", name, "--model", "mlp", "--sparsities", "0.5", "--seeds", "0", "--epochs", "1"]
    assert main([*typed, "--workers", "1", "--out", str(out)]) == 0
    assert name in (out / "results.csv").read_text()
    typed = ["prune", "mlp", "--method", name, "--density", "0.5", "--out", str(masks)]
    assert main([*typed, "--data", "digits"]) == 0
    assert sapwood.Masks.load(masks).density == pytest.approx(0.5, abs=1e-3)
    capsys.readouterr()
    assert main([*typed, "--overwrite"]) == 2  # without data there is nothing to score on
    assert f"Method {name!r} scores on images of a data set: add --data NAME" in capsys.readouterr().err
    sys.modules.pop("method_of_the_page")


def test_the_readme_trains_a_torchvision_model(monkeypatch, capsys):
    """As printed, but with one round of one draw instead of the published hundred."""
    import dataclasses

    quick = dataclasses.replace(METHODS["ntk-sap"], rounds=1, criterion=sapwood.NtkSap(resamples=1, samples=8))
    monkeypatch.setitem(METHODS, "ntk-sap", quick)
    source = python_blocks("README.md")[0]
    space = {"loader": [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))] * 2}
    exec(compile(source, "README.md", "exec"), space)
    sapwood.assert_masked(space["model"], space["result"].masks)
    assert space["result"].masks.sparsity == pytest.approx(0.95, abs=1e-4)
    assert "fc.weight" in capsys.readouterr().out


MODULES = ["", ".masks", ".methods.front", ".methods.imp", ".methods.check"]


@pytest.mark.parametrize("module", [f"sapwood{name}" for name in MODULES])
def test_doctests(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted and not results.failed


KERNELS = ["ntk.gram", "ntk.products", "ntk.spectra", "ntk.compare", "ntk.analytic", "ntk.dynamics"]


@pytest.mark.parametrize("module", [*KERNELS, "diagnosis.report", "diagnosis.paths"])
def test_doctests_of_kernels_and_diagnosis(module):
    results = doctest.testmod(importlib.import_module(f"sapwood.{module}"))
    assert results.attempted and not results.failed


def test_the_page_on_kernels(capsys):
    (source,) = python_blocks("docs/ntk.md")
    space: dict = {}
    exec(compile(source, "docs/ntk.md", "exec"), space)
    assert space["sparse"].shape == (60, 60)
    assert len(capsys.readouterr().out.split()) == 2


@pytest.mark.filterwarnings(
    "ignore:.*for their position only"
)  # SNIP on this small network, half of whose units are dead
def test_the_page_on_pruning_after_training():
    """Its code as printed, on a small network; the methods that it names are there."""
    text = (ROOT / "docs/after-training.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|", text, flags=re.MULTILINE)
    assert set(rows) == {*AFTER_TRAINING, "obs", "ntt"}
    model, (batch,) = mlp(4, 32, 3), labelled((4,))
    space = {
        "model": model,
        "images": batch[0],
        "labels": batch[1],
        "loader": [batch],
        "masks": sapwood.Masks.dense(sapwood.prunable(model)),
    }
    for block in python_blocks("docs/after-training.md"):
        exec(compile(block, "after-training.md", "exec"), space)
    sapwood.assert_masked(space["model"], space["result"].masks)


def test_the_page_on_methods():
    """Every method is on it, every entry is one that `--methods` takes, the tests that it names are there."""
    text = (ROOT / "docs/methods.md").read_text()
    rows = re.findall(r"^\| .* \|$", text, flags=re.MULTILINE)[2:]
    entries = [entry for row in rows for cell in row.split(" | ")[1:3] for entry in re.findall(r"`([^`]+)`", cell)]
    entries = [entry for entry in entries if not re.match(r"(loss|l2)=", entry)]
    named = {entry.partition("@")[0] for entry in entries}
    assert {*METHODS, *AFTER_TRAINING} - named == {
        *("random", "ntk-sap-analytic", "ntk-sap-jvp"),  # no authors, or our own
        *("janowsky", "magnitude-after", "lr-rewinding"),  # magnitude and IMP by other names
    }
    for entry in entries:
        parse_variant(entry)
    tests = (ROOT / "tests/test_parity.py").read_text()
    held = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    assert held and all(f"def {name}(" in tests for name in held)


@pytest.mark.filterwarnings("ignore::sapwood.SapwoodWarning")
def test_the_recipes_of_the_page_on_methods():
    (source,) = python_blocks("docs/methods.md")
    (images, labels), *_ = labelled((4,), samples=12)
    space = {"model": mlp(4, 32, 3), "images": images, "labels": labels}
    exec(compile(source, "docs/methods.md", "exec"), space)
    assert space["force"].masks.kept == 22 and space["grasp"].masks.kept == 22  # of 224
    (_, first), (_, second) = [(images[half], labels[half]) for half in space["halves"]]
    assert first.max() <= second.min()


def test_the_page_on_the_closed_form(capsys):
    """Its code runs, and the rule that it adds is taken."""
    from sapwood.moments import RULES

    use, extend = python_blocks("docs/closed-form.md")
    exec(compile(use, "docs/closed-form.md", "exec"), {})
    assert "The closed form fits this network" in capsys.readouterr().out
    try:
        exec(compile(extend, "docs/closed-form.md", "exec"), {})
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Hardswish(), torch.nn.Linear(6, 3))
        assert sapwood.prune(model, method="ntk-sap-analytic", density=0.5, input_shape=(8,)).masks.kept == 33
    finally:
        RULES.pop(torch.nn.functional.hardswish, None)


@pytest.mark.parametrize(
    ("page", "recipes"), [("README.md", ["cifar10-laptop"]), ("docs/evidence.md", ["closed-form", "closed-form-vgg16"])]
)
def test_accuracies_are_those_of_the_committed_runs(page, recipes):
    """Every row of an accuracy on a page is a row of a report that the program wrote."""
    shown = [line for line in (ROOT / page).read_text().splitlines() if re.match(r"\|.*\d\.\d ± \d", line)]
    for recipe in recipes:
        report = set((ROOT / f"results/{recipe}/report.md").read_text().splitlines())
        assert len(report & set(shown)) >= 5
        shown = [line for line in shown if line not in report]
    assert not shown


def test_speeds_in_the_readme_are_the_measured_ones():
    """Every number of its table stands in the table that the benchmark wrote."""
    networks = {
        "ResNet-20": "resnet20",
        "VGG-16": "vgg16-bn",
        "ResNet-18": "resnet18",
        "ResNet-50": "resnet50",
        "ViT-S": "vit-s",
    }
    methods = ("published", "ntk-sap", "ntk-sap@resamples=1,samples=16", "ntk-sap-analytic")
    measured = (ROOT / "benchmarks/results/mask_search.md").read_text()
    for network, case in networks.items():
        (row,) = re.findall(rf"^\| {network} \| \d+x\d+ \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
        section = measured.split(f"## {case}\n")[1].split("##")[0]
        for method, shown in zip(methods, row.split("|"), strict=True):
            (seconds,) = re.findall(rf"^\| {re.escape(method)} \| ([\d.,]+) \(", section, re.MULTILINE)
            assert shown.strip() == seconds


@pytest.mark.parametrize("recipe", ["cifar10-laptop", "closed-form", "closed-form-vgg16"])
def test_committed_runs_are_whole_and_give_the_committed_table(recipe):
    import csv

    from sapwood.experiments import store
    from sapwood.experiments.recipes import load

    found, out = load(recipe), ROOT / "results" / recipe
    runs = {config.id: store.finished(out / "runs" / config.id, config) for config in found.grid.runs(found.train)}
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        table = {row["run"]: float(row["test_accuracy"]) for row in csv.DictReader(file)}
    assert table == {name: result.test_accuracy for name, result in runs.items()}
