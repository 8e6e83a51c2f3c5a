"""Runs as functions of their config, the files they leave, and comparisons of them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sapwood import Masks, files, prune
from sapwood.cli import main
from sapwood.data import load, pruning_batches
from sapwood.errors import BudgetError, ConfigError, DataError
from sapwood.experiments import store
from sapwood.experiments.compare import Outcome, compare, run_folder
from sapwood.experiments.config import INIT_SEED, ORDER_SEED, Place, RunConfig, under
from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.environment import device_of
from sapwood.experiments.fields import parse_fields
from sapwood.experiments.grid import Grid
from sapwood.experiments.material import Split
from sapwood.experiments.run import run
from sapwood.models import create
from sapwood.training import TrainConfig

CPU = Place(device="cpu", offline=True)
SHORT = TrainConfig(epochs=2, milestones=(), lr=0.05, seed=ORDER_SEED)
SNIP = RunConfig("digits", "mlp", method="snip", density=0.1, train=SHORT)


class NotFinite(Exception):
    """What somebody's own method might raise."""


def raises(net, masks, data, generator):
    raise NotFinite("a method of somebody else's broke")


def mtimes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# Configs and their identity.


def test_pinned_ids():
    assert RunConfig("digits", "resnet8").id == "f69da284f6ef"
    assert SNIP.id == "7dea938598dd"


def test_id_depends_on_meaning_only():
    assert RunConfig("digits", "mlp", train=TrainConfig(epochs=160)).id == RunConfig("digits", "mlp").id
    others = [
        dataclasses.replace(SNIP, method="grasp"),
        dataclasses.replace(SNIP, density=0.2),
        dataclasses.replace(SNIP, fields={"rounds": 2}),
        dataclasses.replace(SNIP, control="shuffle"),
        dataclasses.replace(SNIP, seed=1),
        dataclasses.replace(SNIP, train=dataclasses.replace(SHORT, lr=0.1)),
        RunConfig("digits", "mlp"),
        RunConfig("digits", "resnet8"),
        RunConfig("cifar10", "mlp"),
    ]
    assert len({config.id for config in [SNIP, *others]}) == len(others) + 1


def test_masks_of_a_file_are_part_of_the_identity():
    first = Masks({"w": torch.tensor([True, False])})
    second = Masks({"w": torch.tensor([False, True])})
    assert under(SNIP, first).id != under(SNIP, second).id


def test_grid_has_every_combination_and_the_dense_runs():
    grid = Grid(methods=("snip@rounds=2", "random"), sparsities=(0.9, 0.5), seeds=(3, 7))
    runs = grid.runs(SHORT)
    assert len(runs) == 2 + 2 * 2 * 2 == len({config.id for config in runs})
    assert [(r.method, r.density, r.seed) for r in runs[:3]] == [("dense", 1.0, 3), ("dense", 1.0, 7), ("snip", 0.1, 3)]
    assert {r.train.seed for r in runs if r.seed == 3} == {3 + ORDER_SEED}
    assert {str(r.fields) for r in runs if r.method == "snip"} == {"{'rounds': 2}"}
    assert {str(r.fields) for r in runs if r.method == "random"} == {"{}"}


@pytest.mark.parametrize(
    ("grid", "error", "said"),
    [
        (Grid(methods=("sinp",)), ConfigError, "snip"),
        (Grid(methods=()), ConfigError, "methods must be one or more"),
        (Grid(seeds=(1, 1)), ConfigError, "without repetition"),
        (Grid(methods=("dense",)), ConfigError, "always part"),
        (Grid(sparsities=(1.0,)), BudgetError, "sparsity is 1.0"),
        (Grid(methods=("grasp@round=1",)), ConfigError, "rounds"),
        (Grid(methods=("grasp@rounds",)), ConfigError, "FIELD=VALUE"),
        (Grid(methods=("grasp@control=shufle",)), ConfigError, "Did you mean 'shuffle'"),
    ],
)
def test_grid_refuses(grid, error, said):
    with pytest.raises(error, match=said):
        grid.runs(SHORT)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("rounds=7", 7),
        ("epsilon=1", 1.0),
        ("fresh_weights=False", False),
        ("fresh_weights=true", True),
        ("schedule=cubic", "cubic"),
    ],
)
@pytest.mark.trap(25)
def test_fields_have_the_type_of_their_default(entry, value):
    ((_, parsed),) = parse_fields("ntk-sap", [entry]).items()
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("entry", ["rounds=1.5", "rounds=true", "fresh_weights=1", "epsilon=small", "rounds"])
def test_fields_of_another_type_are_refused(entry):
    with pytest.raises(ConfigError, match=r"takes a value of type|FIELD=VALUE"):
        parse_fields("ntk-sap", [entry])


@pytest.mark.parametrize(
    ("typed", "label"),
    [
        ("ntk-sap", "ntk-sap"),
        ("ntk-sap@rounds=5,epsilon=1e-06", "ntk-sap@epsilon=1e-6,rounds=5"),
        ("ntk-sap@fresh_weights=False", "ntk-sap@fresh_weights=false"),
        ("snip@control=shuffle,schedule=linear", "snip@schedule=linear,control=shuffle"),
    ],
)
def test_labels_say_what_is_particular(typed, label):
    *_, config = Grid(methods=(typed,), sparsities=(0.5,), seeds=(0,)).runs(SHORT)
    assert config.label == label
    *_, again = Grid(methods=(label,), sparsities=(0.5,), seeds=(0,)).runs(SHORT)
    assert again.id == config.id


def test_auto_device_is_a_device():
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# One run.


def test_run_prunes_the_seeds_model_with_the_library(tmp_path):
    result = run(SNIP, tmp_path, CPU)
    torch.manual_seed(SNIP.seed + INIT_SEED)
    model = create("mlp", in_channels=1, image_size=8)
    expected = prune(
        model, method="snip", density=0.1, batches=pruning_batches(load("digits"), seed=SNIP.seed), seed=SNIP.seed
    )
    masks = Masks.load(tmp_path / "masks.safetensors")
    assert masks == expected.masks
    assert result.layers == {name: tuple(count) for name, count in masks.per_layer().items()}
    assert result.prune_seconds > 0
    rows = files.read_rows(tmp_path / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert result.test_accuracy == rows[-1]["test_accuracy"]
    assert not (tmp_path / "checkpoint.pt").exists()


def test_run_is_a_function_of_its_config(tmp_path):
    torch.manual_seed(1)
    first = run(SNIP, tmp_path / "a", CPU)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = run(SNIP, tmp_path / "b", CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.test_accuracy == second.test_accuracy
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()


def test_finished_run_is_not_repeated(tmp_path):
    first = run(SNIP, tmp_path, CPU)
    assert run(SNIP, tmp_path, CPU, on_epoch=lambda _: pytest.fail("trained again")) == first


@pytest.mark.parametrize(
    "content", ["", '{"test_accuracy": 9', "[]", "null", '{"test_accuracy": 90.0}', '{"layers": 3}']
)
def test_half_written_result_is_redone(tmp_path, content):
    first = run(SNIP, tmp_path, CPU)
    (tmp_path / "result.json").write_text(content)
    assert store.read_result(tmp_path) is None
    second = run(SNIP, tmp_path, CPU)
    assert second.test_accuracy == first.test_accuracy
    assert store.read_result(tmp_path) == second


def test_interrupted_run_goes_on_where_it_was(tmp_path):
    class Killed(BaseException):
        pass

    def kill(row):
        raise Killed

    whole = run(SNIP, tmp_path / "whole", CPU)
    with pytest.raises(Killed):
        run(SNIP, tmp_path / "cut", CPU, on_epoch=kill)
    masks = (tmp_path / "cut/masks.safetensors").stat().st_mtime_ns
    seen = []
    resumed = run(SNIP, tmp_path / "cut", CPU, on_epoch=lambda row: seen.append(row["epoch"]))
    assert seen == [2]
    assert (tmp_path / "cut/masks.safetensors").stat().st_mtime_ns == masks
    assert resumed.test_accuracy == whole.test_accuracy
    losses = [[row["train_loss"] for row in files.read_rows(tmp_path / n / "metrics.jsonl")] for n in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_damaged_masks_are_found_again(tmp_path):
    run(SNIP, tmp_path, CPU)
    file = tmp_path / "masks.safetensors"
    masks = Masks.load(file)
    file.write_bytes(file.read_bytes()[:50])
    (tmp_path / "result.json").unlink()
    run(SNIP, tmp_path, CPU)
    assert Masks.load(file) == masks


def test_folder_of_another_run_is_left_alone(tmp_path):
    run(SNIP, tmp_path, CPU)
    before = mtimes(tmp_path)
    with pytest.raises(ConfigError, match="differs in density"):
        run(dataclasses.replace(SNIP, density=0.5), tmp_path, CPU)
    assert mtimes(tmp_path) == before


@pytest.mark.trap(37)
def test_validation_images_come_from_the_training_set():
    dataset = load("digits")
    config = dataclasses.replace(SHORT, validation=0.2)
    split = Split.of(dataset, config, torch.device("cpu"))
    assert len(split.train) + len(split.validation) == len(dataset.train)
    assert torch.equal(split.test.images, dataset.test.images)
    count = sum(len(labels) for _, labels in split.validation_batches())
    assert count == len(split.validation) == pytest.approx(0.2 * len(dataset.train), abs=1)


def test_a_share_of_the_training_images_is_drawn_by_the_seed_and_before_validation():
    dataset, part = load("digits"), dataclasses.replace(SHORT, share=0.5, seed=1)
    half = Split.of(dataset, part, torch.device("cpu"))
    assert len(half.train) == pytest.approx(len(dataset.train) / 2, abs=1) and half.validation is None
    assert torch.equal(half.test.images, dataset.test.images)
    same, other = (
        Split.of(dataset, dataclasses.replace(part, seed=seed), torch.device("cpu")).train.images for seed in (1, 2)
    )
    assert torch.equal(half.train.images, same) and not torch.equal(half.train.images, other)
    both = Split.of(dataset, dataclasses.replace(part, validation=0.2), torch.device("cpu"))
    assert len(both.validation) == pytest.approx(0.2 * len(half.train), abs=1)
    assert len(both.train) + len(both.validation) == len(half.train)


def test_method_on_real_inputs_gets_them(tmp_path):
    config = RunConfig(
        "digits", "mlp", "ntk-sap", 0.1, {"rounds": 1, "resamples": 1, "random_inputs": False}, train=SHORT
    )
    assert run(config, tmp_path, CPU).prune_seconds > 0


def test_shuffle_control_permutes_the_methods_masks_inside_each_layer(tmp_path):
    folders = {control: tmp_path / (control or "plain") for control in ("", "shuffle")}
    for control, folder in folders.items():
        run(dataclasses.replace(SNIP, control=control), folder, CPU)
    plain, shuffled = (Masks.load(folder / "masks.safetensors") for folder in folders.values())
    assert shuffled.per_layer() == plain.per_layer()
    assert all(not torch.equal(shuffled[name], plain[name]) for name in plain)
    other = tmp_path / "seed"
    run(dataclasses.replace(SNIP, control="shuffle", seed=1), other, CPU)
    assert Masks.load(other / "masks.safetensors") != shuffled


def test_shuffle_taps_control_keeps_the_counts_of_kernel_taps(tmp_path):
    config = RunConfig("digits", "resnet8", "snip", 0.1, per_class=2, train=SHORT)
    for control in ("", "shuffle-taps"):
        run(dataclasses.replace(config, control=control), tmp_path / (control or "plain"), CPU)
    plain, shuffled = (Masks.load(tmp_path / name / "masks.safetensors") for name in ("plain", "shuffle-taps"))
    assert shuffled != plain
    for name, mask in plain.items():
        if mask.dim() == 4:
            assert torch.equal(shuffled[name].sum((0, 1)), mask.sum((0, 1)))


def test_reinit_control_trains_other_weights_under_the_same_masks(tmp_path):
    plain, other = (
        run(dataclasses.replace(SNIP, control=control), tmp_path / (control or "plain"), CPU)
        for control in ("", "reinit")
    )
    masks = [Masks.load(tmp_path / name / "masks.safetensors") for name in ("plain", "reinit")]
    assert masks[0] == masks[1]
    assert plain.init_hash != other.init_hash and plain.order_hash == other.order_hash
    again = run(dataclasses.replace(SNIP, control="reinit"), tmp_path / "again", CPU)
    assert (again.init_hash, again.test_accuracy) == (other.init_hash, other.test_accuracy)


def test_invert_control_keeps_the_lowest_scores(tmp_path):
    config = RunConfig("digits", "mlp", "magnitude", 0.1, train=SHORT)
    for control in ("", "invert"):
        run(dataclasses.replace(config, control=control), tmp_path / (control or "plain"), CPU)
    plain, inverted = (Masks.load(tmp_path / name / "masks.safetensors") for name in ("plain", "invert"))
    assert inverted.kept == plain.kept and (plain & inverted).kept == 0
    twice = dataclasses.replace(config, control="invert", fields={"invert": True})
    run(twice, tmp_path / "twice", CPU)
    assert Masks.load(tmp_path / "twice/masks.safetensors") == plain


# Comparisons.


def small_grid(**fields):
    return Grid(model="mlp", sparsities=(0.9,), seeds=(0, 1), **fields)


def test_same_seed_means_same_start_for_all_methods(tmp_path):
    seen = []
    compare(
        small_grid(methods=("magnitude", "random")).runs(SHORT),
        tmp_path,
        CPU,
        engine=EngineConfig(workers=1),
        on_run=lambda o, _: seen.append(o),
    )
    by_seed = {}
    for outcome in seen:
        by_seed.setdefault(outcome.config.seed, set()).add(outcome.config.train.seed)
    assert by_seed == {0: {ORDER_SEED}, 1: {ORDER_SEED + 1}}
    masks = [
        Masks.load(run_folder(tmp_path, o.config) / "masks.safetensors") for o in seen if o.config.method == "random"
    ]
    assert masks[0] != masks[1]


def test_a_failing_method_does_not_stop_the_others(tmp_path):
    grid = small_grid(methods=(f"{__name__}:raises", "random"))
    outcomes = compare(grid.runs(SHORT), tmp_path, CPU, engine=EngineConfig(workers=1))
    failed = [outcome for outcome in outcomes if outcome.result is None]
    assert [outcome.config.method for outcome in failed] == [f"{__name__}:raises"] * 2
    assert failed[0].error.startswith("NotFinite: a method of somebody else's broke (see ")
    assert "in raises" in (run_folder(tmp_path, failed[0].config) / "error.txt").read_text()
    assert sum(outcome.result is not None for outcome in outcomes) == 4


def test_a_method_that_refuses_the_model_gives_its_sentence(tmp_path):
    grid = Grid(model="mlp", methods=("random",), sparsities=(0.999999,), seeds=(0,))
    outcomes = compare(grid.runs(SHORT), tmp_path, CPU, engine=EngineConfig(workers=1))
    assert outcomes[1] == Outcome(outcomes[1].config, None, outcomes[1].error)
    assert "keeps none of 50,200" in outcomes[1].error


def test_what_concerns_all_runs_is_said_once_and_before_them(tmp_path):
    with pytest.raises(ConfigError, match="Unknown model"):
        compare(Grid(model="mpl").runs(SHORT), tmp_path / "out", CPU)
    with pytest.raises(DataError):
        compare(Grid(data="cifar10").runs(SHORT), tmp_path / "out", Place(data_root=tmp_path, offline=True))
    with pytest.raises(ConfigError, match="at least 1 process"):
        compare(Grid().runs(SHORT), tmp_path / "out", CPU, engine=EngineConfig(workers=0))
    assert not (tmp_path / "out").exists()


def test_compare_from_the_command_line_in_two_processes_and_again(tmp_path, capsys):
    out = tmp_path / "out"
    typed = ["compare", "--model", "mlp", "--methods", "random", "magnitude", "--sparsities", "0.5", "0.9"]
    typed += ["--seeds", "0", "1", "--epochs", "1", "--out", str(out)]
    assert main([*typed, "--workers", "2"]) == 0
    first = capsys.readouterr()
    assert first.out.splitlines()[-1] == str(out / "report.html")
    assert first.err == ""
    runs = mtimes(out / "runs")
    assert sum(path.name == "result.json" for path in runs) == 2 + 2 * 2 * 2
    csv = (out / "results.csv").read_bytes()

    assert main(typed) == 0  # a no-op, which one process does as well as two
    assert mtimes(out / "runs") == runs
    assert capsys.readouterr().out == first.out
    assert (out / "results.csv").read_bytes() == csv

    damaged = next(path for path in runs if path.name == "result.json")
    damaged.write_text(damaged.read_text()[:40])
    assert main([*typed, "--workers", "1"]) == 0
    changed = {path for path, when in mtimes(out / "runs").items() if runs.get(path) != when}
    assert {path.parent for path in changed} == {damaged.parent}
    again = json.loads(damaged.read_text())
    assert str(again["test_accuracy"]) in (out / "results.csv").read_text()


def test_compare_with_a_failure_exits_with_1_and_still_reports(tmp_path, capsys):
    typed = ["compare", "--model", "mlp", "--methods", "random", "--sparsities", "0.5", "0.999999", "--seeds", "0"]
    assert main([*typed, "--epochs", "1", "--workers", "1", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("sapwood: error: random") and len(said.err.splitlines()) == 1
    assert "failed" in said.out
    assert said.out.splitlines()[-1] == str(tmp_path / "report.html")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--methods", "ntksap"], "Did you mean 'ntk-sap'?"),
        (["--data", "digit"], "Did you mean 'digits'?"),
        (["--model", "resnet-8"], "Did you mean 'resnet"),
        (["--sparsities", "1.2"], "sparsity is 1.2"),
        (["--seeds"], "seeds must be one or more"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--workers", "0"], "at least 1 process"),
    ],
)
def test_compare_refuses_in_one_sentence(tmp_path, capsys, typed, said):
    assert main(["compare", *typed, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sapwood: error: ") and said in line
    assert not (tmp_path / "out").exists()
