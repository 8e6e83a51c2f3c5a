"""The benchmark commands run, and what Sapwood is timed against computes what Sapwood computes."""

import contextlib
import functools
import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nets import NETS, Residual, TinyViT
from sapwood import Data, FunctionalModel, Masks, NtkSap

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def in_this_process(monkeypatch):
    """Measurements without a process each, which would cost seconds."""
    import drive
    import worker

    def run(command, **_):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                worker.main(command[-1])
        except Exception as error:
            return SimpleNamespace(returncode=1, stderr=f"{type(error).__name__}: {error}", stdout="")
        return SimpleNamespace(returncode=0, stderr="", stdout=printed.getvalue())

    monkeypatch.setattr(drive.subprocess, "run", run)
    monkeypatch.setattr(worker, "gemm_rate", functools.partial(worker.gemm_rate, size=64, seconds=0.01))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


@pytest.mark.parametrize("build", [plain, lambda: Residual(zero_gamma=False), TinyViT])
def test_sapwood_equals_the_published_procedure_with_masked_layers(build):
    """The authors' recipe, written out with masks in the layers and a deep copy, on identical draws."""
    import published

    model = build().double()
    net = FunctionalModel.of(model)
    rng = torch.Generator().manual_seed(3)
    masks = Masks({n: torch.rand(w.shape, generator=rng, dtype=torch.float64) < 0.6 for n, w in net.weights.items()})
    criterion = NtkSap(resamples=2, samples=6, batch_size=4)
    scores = criterion(net, masks, Data((), (3, 8, 8)), torch.Generator().manual_seed(7))
    real = {name: mask.double() for name, mask in masks.items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = published.scores(model, real, [4, 2, 4, 2], (3, 8, 8), torch.Generator().manual_seed(7))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name in net.prunable:
        kept = masks[name]
        assert expected[name][kept].abs().max() > 0
        torch.testing.assert_close(scores[name][kept], expected[name].abs()[kept], rtol=1e-8, atol=1e-12)


def test_the_published_search_keeps_its_budget():
    import published

    build, shape = NETS["conv2d without norm"]
    model = build()
    names = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    budget = {"rounds": 3, "resamples": 1, "samples": 8, "batch_size": 8, "input_shape": shape}
    masks = published.search(model, names, 0.3, **budget)
    kept, total = sum(m.sum().item() for m in masks.values()), sum(m.numel() for m in masks.values())
    assert abs(kept - 0.3 * total) <= 1


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.filterwarnings("ignore:.*keep no weight")
def test_mask_search_measures_counts_and_tabulates(tmp_path):
    import mask_search

    out = tmp_path / "found.json"
    methods = ["published", "ntk-sap@merged_statistics=true", "snip"]
    options = ["--models", "tiny", "--threads", "1", "--repeats", "1", "--extent", "part", "--out", str(out)]
    mask_search.main([*options, "--methods", *methods, "no-such-method"])
    rows = json.loads(out.read_text())["rows"]
    timed = {row["method"]: row for row in rows if "cpu_s" in row}
    counted = {row["method"]: row["flops"] for row in rows if "flops" in row}
    assert set(timed) == set(counted) == set(methods)
    assert all(r["cpu_s"] > 0 and r["peak_bytes"] >= r["before_bytes"] > 0 for r in timed.values())
    assert (timed["published"]["inputs"], timed["published"]["all_inputs"]) == (4, 12)
    assert counted["ntk-sap@merged_statistics=true"] / counted["published"] == pytest.approx(6 / 7, abs=0.03)
    table = out.with_suffix(".md").read_text()
    assert "extrapolated from 1 of 4 mini-batches (4 of 12 inputs)" in table
    assert "no-such-method" in table.split("| no-such-method |")[1].split("\n")[0]  # the error, in its row
    mask_search.main([*options, "--methods", "snip", "--no-flops", "--append"])
    assert json.loads(out.read_text())["rows"][: len(rows)] == rows


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.filterwarnings("ignore:.*keep no weight")
def test_looks_are_a_share_of_the_searches_that_they_precede(tmp_path):
    import looks

    out = tmp_path / "looks.json"
    looks.main(["--models", "tiny", "--methods", "magnitude", "snip", "--repeats", "2", "--out", str(out)])
    lines = [line.split("|")[1:-1] for line in out.with_suffix(".md").read_text().splitlines() if "| tiny |" in line]
    assert [line[1].strip() for line in lines] == ["magnitude", "snip"]
    assert all(float(line[4].split()[0]) > 0 for line in lines)


@pytest.mark.usefixtures("in_this_process")
def test_scaling_fits_exponents(tmp_path):
    import scaling

    out = tmp_path / "growth.json"
    scaling.main(["--axes", "classes", "--sizes", "2", "--methods", "random", "--repeats", "1", "--out", str(out)])
    lines = out.with_suffix(".md").read_text().splitlines()
    exponents = [float(cell) for cell in lines[-1].split("|")[-3:-1]]
    assert "classes 10: CPU-s (MB)" in lines[-3] and math.isfinite(exponents[0])


def test_training_steps_are_timed_turn_by_turn(tmp_path, capsys):
    import training_step

    out = tmp_path / "steps.json"
    options = ["--models", "resnet8", "--optimizers", "sgd", "--batch-sizes", "2", "--repeats", "2", "--out", str(out)]
    training_step.main(options)
    (row,) = json.loads(out.read_text())["rows"]
    assert len(row["plain_s"]) == len(row["masked_s"]) == 2 and min(row["plain_s"] + row["masked_s"]) > 0
    line = out.with_suffix(".md").read_text().splitlines()[-1]
    assert line.startswith("| resnet8, sgd | 2 |") and line.endswith("| 2 |")
    assert training_step.added({"plain_s": [1.0, 2.0, 1.0], "masked_s": [1.1, 2.5, 1.2]}) == pytest.approx(0.2)


def test_a_measurement_has_a_process_of_its_own(monkeypatch):
    import drive

    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent / "src"))
    row = drive.measure("tiny", "magnitude", 1)
    assert row["cpu_s"] > 0 and row["mini_batches"] == row["all_mini_batches"] == 1 and row["unit"] == "rounds"


def test_an_exponent_is_the_slope_in_logarithms():
    import table

    rows = [
        {"axis": "width", "size": n, "method": "m", "cpu_s": n**2 / 9, "peak_bytes": 8 * n, "before_bytes": 3 * n}
        for n in (8, 16, 32)
    ]
    assert table.growth(rows, {"processor": "p", "cores": "1"}).splitlines()[-1].endswith("| 2.00 | 1.00 |")


def test_every_case_can_be_planned():
    import worker
    from cases import CASES

    assert sys.modules["cases"].__file__ == str(FOLDER / "cases.py")
    for name, case in CASES.items():
        with torch.device("meta"):
            plan, published = (worker.planned(case, method, "auto") for method in ("random", "published"))
        assert plan.all_mini_batches == 1, name
        assert (published.inputs < published.all_inputs) == case.long
