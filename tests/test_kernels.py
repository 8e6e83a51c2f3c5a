"""`sapwood ntk`, its page, and the tangent kernels in the report of a comparison."""

import csv
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sapwood import Masks, ntk
from sapwood.cli import main
from sapwood.data import load, pruning_batches
from sapwood.experiments import kernel_figures, kernel_report, kernel_run, kernels
from sapwood.experiments.config import CONTROL_SEED, Place
from sapwood.experiments.kernels import KernelConfig, Network, Spectra
from sapwood.experiments.material import create_model
from sapwood.files import read_json
from test_report import Page, outcome, rewritten

RUN = ["ntk", "mlp", "--sparsity", "0.9", "--per-class", "1", "--batch-size", "5"]
METHODS = ["--method", "magnitude", "random@control=shuffle"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ntk")
    assert main([*RUN, *METHODS, "--dynamics", "--steps", "4", "--out", str(folder)]) == 0
    return folder


def test_numbers_are_those_of_the_library(out):
    """Computed here again, from the mask that the command left."""
    found = {network.label: network for network in Spectra.load(out / "ntk.json").networks}
    assert list(found) == ["dense", "magnitude", "random@control=shuffle"]
    data = load("digits")
    model = create_model("mlp", data, 0)
    (images, _), *_ = pruning_batches(data, per_class=1, seed=0)
    files = [Masks.load(file) for file in out.glob("masks/*/masks.safetensors")]
    (masks,) = [m for m in files if m.provenance["method"] == "magnitude"]
    dense, pruned = (ntk.kernel(model, images, m, batchnorm="train", batch_size=5) for m in (None, masks))
    for label, gram in (("dense", dense), ("magnitude", pruned)):
        values = ntk.spectrum(gram)
        assert found[label].eigenvalues == pytest.approx(values.values.tolist(), rel=1e-3, abs=1e-4 * values.largest)
        assert found[label].trace == pytest.approx(values.trace, rel=1e-4)
        assert found[label].largest_stable_lr == pytest.approx(values.largest_stable_lr, rel=1e-4)
        assert found[label].effective_rank == pytest.approx(values.effective_rank, rel=1e-3)
    assert found["magnitude"].alignment == pytest.approx(ntk.alignment(dense, pruned), abs=1e-4)
    assert found["magnitude"].distance == pytest.approx(ntk.distance(dense, pruned), rel=1e-3)
    assert found["magnitude"].sparsity == pytest.approx(0.9, abs=1e-4) and found["dense"].alignment is None


def test_page_csv_and_figures(out):
    text = (out / "ntk.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and page.tags.count("svg") == 3
    assert all(link.startswith("#") for link in page.links) and "<script" not in text
    said = " ".join("".join(page.text).split())
    assert "mlp on digits" in said and "sapwood ntk mlp --sparsity 0.9" in said
    assert "images a batch: 5" in said and "random@control=shuffle" in said
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    assert used <= set(re.findall(r"(--[a-z0-9-]+):", text))
    for name in ("spectra", "dynamics-loss", "dynamics-kernel"):
        assert (out / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(out / f"figures/{name}.svg")
    with open(out / "ntk.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = Spectra.load(out / "ntk.json").networks
    assert [float(row["largest"]) for row in rows] == pytest.approx([n.eigenvalues[0] for n in found], rel=1e-5)
    trained = read_json(out / "dynamics.json")
    assert list(trained) == [n.label for n in found]
    assert len({d["rate"] for d in trained.values()}) == 1
    assert all(len(d["loss"]) == len(d["predicted"]) == 5 for d in trained.values())
    assert all(d["loss"][0] == pytest.approx(d["predicted"][0], rel=1e-4) for d in trained.values())


def test_a_second_call_computes_nothing_again(out, monkeypatch):
    def again(*_, **__):
        raise AssertionError("computed again")

    before = (out / "ntk.csv").read_text()
    monkeypatch.setattr(ntk, "kernel", again)
    monkeypatch.setattr(kernel_run, "pruned", lambda *_: Masks.load(next(out.glob("masks/*/masks.safetensors"))))
    assert main([*RUN, "--method", "magnitude", "--out", str(out)]) == 0
    assert (out / "ntk.csv").read_text().splitlines()[1] == before.splitlines()[1]


def test_mask_files_and_mistakes(out, tmp_path, capsys):
    file = next(out.glob("masks/*/masks.safetensors"))
    assert main([*RUN, "--masks", str(file), str(file), "--out", str(tmp_path / "out")]) == 0
    labels = [network.label for network in Spectra.load(tmp_path / "out/ntk.json").networks]
    assert labels == ["dense", "masks", f"{file.parent.name}/masks"]
    capsys.readouterr()
    for extra, said in (
        (["--batch-size", "3"], "does not divide"),
        (["--batchnorm", "training"], "calibrated"),
        (["--steps", "0", "--dynamics"], "--steps"),
        (["--memory", "0.00001"], "products"),
        (["--method", "snipp"], "snip"),
    ):
        command = [*RUN, *([] if "--method" in extra else ["--masks", str(file)]), *extra]
        assert main([*command, "--out", str(tmp_path / "bad")]) == 2
        assert said in capsys.readouterr().err
    other = tmp_path / "other.safetensors"
    Masks({"conv1.weight": torch.ones(2, 2, dtype=torch.bool)}).save(other)
    assert main([*RUN, "--masks", str(other), "--out", str(tmp_path / "bad")]) == 2
    assert "another model" in capsys.readouterr().err


def test_a_damaged_kernel_is_computed_again(tmp_path):
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    (first,) = kernels.compute(model, x, {"dense": None}, KernelConfig(), tmp_path)
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:50])
    (second,) = kernels.compute(model, x, {"dense": None}, KernelConfig(), tmp_path)
    assert second.eigenvalues == first.eigenvalues
    with np.load(file) as found:
        assert found["kernel"].shape == (8, 8)
    (other,) = kernels.compute(model, x + 1, {"dense": None}, KernelConfig(), tmp_path)
    assert other.eigenvalues != first.eigenvalues and len(list(tmp_path.glob("*.npz"))) == 2


def test_of_a_large_kernel_the_leading_eigenvalues_are_kept(tmp_path, monkeypatch):
    spectrum = ntk.spectrum
    monkeypatch.setattr(ntk, "spectrum", lambda gram: spectrum(gram, leading=5, full_below=10))
    model, x = torch.nn.Linear(6, 4), torch.randn(5, 6)
    (found,) = kernels.compute(model, x, {"dense": None}, KernelConfig(), tmp_path)
    assert (found.size, len(found.eigenvalues)) == (20, 5)
    assert found.smallest is None is found.condition_number is found.effective_rank
    kernel_report.write_page(Spectra({"model": "a", "data": "b", "images": 5}, (found,)), tmp_path, "typed", {})
    line = kernel_figures.spectra([found]).axes[0].lines[0]
    assert line.get_xdata().tolist() == [15, 16, 17, 18, 19]
    assert (tmp_path / "ntk.csv").read_text().endswith(",\n")


def spectra_of(*labels):
    values = tuple(float(v) for v in range(30, 0, -1))
    one = Network("dense", 0.0, 30, values, 465.0, 30.0, 25.0, 2 / 30, None, None, 1.0)
    others = [
        replace(one, label=label, sparsity=0.98, alignment=0.75, distance=0.5, condition_number=None)
        for label in labels
    ]
    return Spectra({"model": "mlp", "data": "digits", "images": 3}, (one, *others))


def test_the_report_shows_the_kernels_that_it_is_given(tmp_path):
    outcomes = [outcome("dense", 0.0, 0, 98.0), outcome("snip", 0.98, 0, 80.0), outcome("a<b>", 0.98, 0, 10.0)]
    without = rewritten(outcomes, tmp_path / "without")
    assert "Tangent kernels" not in without
    text = rewritten(outcomes, tmp_path / "with", spectra=spectra_of("snip", "a<b>"))
    page = Page(text)
    assert page.open == [] and page.tags.count("svg") == 5 and len(page.ids) == len(set(page.ids))
    said = " ".join("".join(page.text).split())
    assert "Tangent kernels" in said and "0.750" in said and "a<b>" in said
    markdown = (tmp_path / "with/report.md").read_text(encoding="utf-8")
    assert "| snip | 98.00 % | 465 | 30 | 1 |  | 25 | 0.750 | 6.67e-02 |" in markdown
    assert (tmp_path / "with/figures/spectra.svg").is_file()
    (tmp_path / "with/ntk.json").write_text("{")
    assert Spectra.load(tmp_path / "with/ntk.json") is None


def test_compare_computes_kernels_on_request(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sapwood.cli.compare.KernelConfig", lambda: KernelConfig(per_class=1))
    command = ["compare", "--model", "resnet8", "--methods", "magnitude", "--sparsities", "0.5", "0.9", "--seeds", "1"]
    command += ["--epochs", "1", "--milestones", "--workers", "1", "--out", str(tmp_path)]
    assert main([*command, "--ntk", "0.9"]) == 0
    found = Spectra.load(tmp_path / "ntk.json")
    assert [n.label for n in found.networks] == ["dense", "magnitude"] and found.settings["seed"] == 1
    assert "Tangent kernels" in (tmp_path / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main([*command, "--ntk", "0.95"]) == 2
    assert "0.9" in capsys.readouterr().err


def test_settings_say_what_the_numbers_depend_on():
    found = kernel_run.setup(spectra_of("snip"), Place("cpu"))
    assert found["CPU seconds of a kernel"] == "dense 1, snip 1" and "torch" in found


@pytest.mark.parametrize("method", ["imp", "lr-rewinding", "magnitude-after", "snip@retrain=fine-tune"])
def test_a_method_that_prunes_after_training_is_refused_by_its_name(tmp_path, capsys, method):
    assert main([*RUN, "--method", "magnitude", method, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{method!r} trains the network before it prunes it" in line and "--masks" in line
    assert not (tmp_path / "out").exists()


def test_reinit_shows_the_kernel_of_the_weights_that_it_trains(tmp_path):
    """Computed here again: the method's masks over the weights of the control's seed."""
    assert main([*RUN, "--method", "snip", "snip@control=reinit", "--out", str(tmp_path)]) == 0
    found = {network.label: network for network in Spectra.load(tmp_path / "ntk.json").networks}
    assert found["snip"].eigenvalues != found["snip@control=reinit"].eigenvalues
    data = load("digits")
    (images, _), *_ = pruning_batches(data, per_class=1, seed=0)
    masks = [Masks.load(file) for file in tmp_path.glob("masks/*/masks.safetensors")]
    assert masks[0] == masks[1]
    gram = ntk.kernel(create_model("mlp", data, CONTROL_SEED), images, masks[0], batchnorm="train", batch_size=5)
    assert found["snip@control=reinit"].trace == pytest.approx(ntk.spectrum(gram).trace, rel=1e-4)


def test_a_method_that_changes_weights_shows_the_kernel_of_those(tmp_path):
    command = ["ntk", "mlp", "--per-class", "1", "--method", "obs", "--sparsity", "0.02"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("masks/*/new-weights.safetensors")
    data = load("digits")
    model = create_model("mlp", data, 0)
    model.load_state_dict({**model.state_dict(), **load_file(file)})
    (images, _), *_ = pruning_batches(data, per_class=1, seed=0)
    gram = ntk.kernel(model, images, Masks.load(file.with_name("masks.safetensors")), batchnorm="train")
    found = {network.label: network for network in Spectra.load(tmp_path / "ntk.json").networks}
    assert found["obs"].trace == pytest.approx(ntk.spectrum(gram).trace, rel=1e-4)
    assert found["obs"].trace != pytest.approx(found["dense"].trace, rel=1e-4)


def test_a_second_comparison_in_a_folder_does_not_show_the_kernels_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("sapwood.cli.compare.KernelConfig", lambda: KernelConfig(per_class=1))
    command = ["compare", "--model", "mlp", "--methods", "magnitude", "--epochs", "1", "--milestones", "--workers", "1"]
    command += ["--out", str(tmp_path)]
    assert main([*command, "--sparsities", "0.9", "--seeds", "0", "--ntk", "0.9"]) == 0
    assert "Tangent kernels" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert main([*command, "--sparsities", "0.5", "--seeds", "1"]) == 0
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "Tangent kernels" not in text and "90" not in text.partition("How it was made")[0].partition("<svg")[0]


def test_kernels_of_a_comparison_leave_out_what_does_not_begin_from_initial_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sapwood.cli.compare.KernelConfig", lambda: KernelConfig(per_class=1))
    command = ["compare", "--model", "mlp", "--methods", "imp@rate=0.5", "magnitude-after", "snip@control=reinit"]
    command += ["--sparsities", "0.5", "--seeds", "0", "--epochs", "1", "--milestones", "--workers", "1"]
    assert main([*command, "--ntk", "0.5", "--out", str(tmp_path)]) == 0
    labels = [network.label for network in Spectra.load(tmp_path / "ntk.json").networks]
    assert labels == ["dense", "imp@rate=0.5", "snip@control=reinit"]
    assert "No kernel of magnitude-after: it does not begin from initial weights." in capsys.readouterr().err
