"""Runs that prune after training: chains of levels, their invariants, and what they cost."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sapwood import Masks, files, prune
from sapwood.data import load, pruning_batches
from sapwood.errors import ConfigError, SapwoodError
from sapwood.experiments import levels, store, tables
from sapwood.experiments import stages as running
from sapwood.experiments.compare import compare, run_folder
from sapwood.experiments.config import ORDER_SEED, Place, RunConfig
from sapwood.experiments.engines import EngineConfig
from sapwood.experiments.grid import Grid
from sapwood.experiments.material import create_model
from sapwood.experiments.recipes.recipe import label
from sapwood.experiments.run import run
from sapwood.experiments.summary import frame, summarise
from sapwood.training import TrainConfig

CPU = Place(device="cpu", offline=True)
SHORT = TrainConfig(epochs=2, milestones=(1,), lr=0.05, seed=ORDER_SEED)


def tiny(num_classes, in_channels, image_size):
    hidden = nn.Linear(in_channels * image_size**2, 12)
    return nn.Sequential(nn.Flatten(), hidden, nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, num_classes))


MODEL = f"{__name__}:tiny"
IMP = RunConfig("digits", MODEL, "magnitude", 0.512, train=SHORT, retrain="rewind-weights", rate=0.2)
LR = dataclasses.replace(IMP, retrain="rewind-lr")
FINE = dataclasses.replace(IMP, retrain="fine-tune", rate=None)
DENSE = RunConfig("digits", MODEL, train=SHORT)


@pytest.fixture
def trainings(monkeypatch):
    """The model's state, masks and settings at the beginning of every training, and its state at the end."""
    seen = []

    def spy(model, data, config, *, masks=None, **options):
        start = copy.deepcopy(model.state_dict())
        result = train(model, data, config, masks=masks, **options)
        seen.append((start, masks, config, copy.deepcopy(model.state_dict())))
        return result

    train = running.train
    monkeypatch.setattr(running, "train", spy)
    return seen


def go(config, root, **options):
    return run(config, root / config.id, CPU, **options)


def initial():
    return create_model(MODEL, load("digits"), 0).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mtimes(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.name not in (store.LOCK, store.CONFIG) and path.is_file()
    }


class TestConfigs:
    def test_pinned_ids(self):
        """Those of runs that prune before training are pinned in test_experiments.py."""
        plain = RunConfig("digits", "resnet8", "magnitude", 0.1)
        assert plain.meaning().keys() == {"data", "model", "method", "density"}
        assert dataclasses.replace(plain, retrain="fine-tune").id == "cf69aa64dfd9"

    def test_a_chain_has_the_levels_of_its_rate(self):
        assert [(c.method, c.density) for c in levels.chain(IMP)] == [
            ("dense", 1.0),
            ("magnitude", 0.8),
            ("magnitude", 0.64),
        ]
        assert levels.chain(FINE) == [DENSE] and levels.chain(DENSE) == []
        deeper = dataclasses.replace(IMP, density=0.1, control="shuffle")
        assert levels.chain(deeper)[: len(levels.chain(IMP))] == levels.chain(IMP)
        assert levels.chain(deeper)[3] == IMP

    def test_names_and_fields_of_a_variant(self):
        grid = Grid(
            methods=("imp", "lr-rewinding@rewind_epoch=1", "magnitude-after@rate=0.5", "snip@retrain=rewind-lr")
        )
        found = {c.label: (c.method, c.retrain, c.rewind_epoch, c.rate) for c in grid.runs(SHORT)[3:]}
        assert found == {
            "imp": ("magnitude", "rewind-weights", 0, 0.2),
            "lr-rewinding@rewind_epoch=1": ("magnitude", "rewind-lr", 1, 0.2),
            "magnitude@retrain=fine-tune,rate=0.5": ("magnitude", "fine-tune", 0, 0.5),
            "snip@retrain=rewind-lr": ("snip", "rewind-lr", 0, None),
        }

    @pytest.mark.parametrize(
        "typed",
        ["imp", "imp@rate=0.3", "magnitude-after@allocation=uniform", "imp@rewind_epoch=1,control=shuffle",
         "magnitude@retrain=rewind-lr", "obs@rounds=2,retrain=fine-tune"],
    )  # fmt: skip
    def test_labels_are_what_one_types(self, typed):
        assert label(typed) == typed
        *_, config = Grid(methods=(typed,), sparsities=(0.5,), seeds=(0,)).runs(SHORT)
        assert config.label == typed

    def test_a_label_and_its_long_form_are_one_run(self):
        ids = {
            Grid(methods=(typed,), sparsities=(0.5,), seeds=(0,)).runs(SHORT)[-1].id
            for typed in ("imp", "magnitude@retrain=rewind-weights,rate=0.2")
        }
        assert len(ids) == 1

    @pytest.mark.parametrize(
        ("method", "said"),
        [
            ("magnitude@retrain=finetune", "Did you mean 'fine-tune'"),
            ("magnitude@rate=0.2", "need a way of retraining"),
            ("imp@rate=1.5", r"rate is 1\.5"),
            ("imp@rewind_epoch=2", r"start_epoch must be below epochs \(2\)"),
            ("magnitude-after@rewind_epoch=1", "nothing is rewound"),
            ("imp@control=reinit", "reinit is for pruning before training"),
            ("imp@rewind_epoch=x", "takes a value of type int"),
        ],
    )
    def test_refuses(self, method, said):
        with pytest.raises(ConfigError, match=said):
            Grid(methods=(method,), sparsities=(0.5,)).runs(SHORT)


class TestInvariants:
    def test_weights_at_each_level_equal_the_masked_rewind_weights(self, tmp_path, trainings):
        result = go(IMP, tmp_path)
        assert len(trainings) == 4 and trainings[0][1] is None
        for start, _, config, _ in trainings:
            assert equal(start, initial()) and config == SHORT
        masks = [seen[1] for seen in trainings[1:]]
        assert [m.kept for m in masks] == [round(d * 888) for d in (0.8, 0.64, 0.512)]
        assert all(later <= earlier for earlier, later in itertools.pairwise(masks))
        assert (result.epochs, result.prior_epochs) == (2, 6)

    def test_masks_are_the_smallest_trained_weights_of_the_level_before(self, tmp_path, trainings):
        go(IMP, tmp_path)
        for (_, _, _, trained), (_, masks, _, _) in itertools.pairwise(trainings):
            kept = torch.cat([trained[name][mask].abs() for name, mask in masks.items()])
            gone = torch.cat([trained[name][~mask].abs() for name, mask in masks.items()])
            assert gone.max() <= kept.min()

    def test_rewinding_to_an_epoch_takes_the_weights_and_the_learning_rate_from_there(self, tmp_path, trainings):
        whole = go(DENSE, tmp_path, keep=(1, 2))
        result = go(dataclasses.replace(IMP, density=0.8, rewind_epoch=1), tmp_path)
        (_, _, _, _), (start, masks, config, _) = trainings
        assert equal(start, load_file(tmp_path / DENSE.id / "weights-epoch-1.safetensors"))
        assert config == dataclasses.replace(SHORT, start_epoch=1) and masks.density == pytest.approx(0.8, abs=1e-3)
        (row,) = files.read_rows(tmp_path / dataclasses.replace(IMP, density=0.8, rewind_epoch=1).id / "metrics.jsonl")
        assert row["epoch"] == 2 and row["lr"] == pytest.approx(0.005)
        assert (result.epochs, result.prior_epochs, whole.prior_epochs) == (1, 2, 0)

    def test_learning_rate_rewinding_trains_the_trained_weights_on(self, tmp_path, trainings):
        go(LR, tmp_path)
        for (_, _, _, trained), (start, _, config, _) in itertools.pairwise(trainings):
            assert equal(start, trained) and config == SHORT

    def test_fine_tuning_keeps_the_last_learning_rate(self, tmp_path, trainings):
        go(FINE, tmp_path)
        (_, _, _, trained), (start, _, _, _) = trainings
        assert equal(start, trained)
        rows = files.read_rows(tmp_path / FINE.id / "metrics.jsonl")
        assert [row["lr"] for row in rows] == pytest.approx([0.005, 0.005])

    def test_keeping_everything_and_going_back_to_the_start_is_the_dense_training(self, tmp_path, trainings):
        go(dataclasses.replace(IMP, density=1.0), tmp_path)
        assert len(trainings) == 2 and equal(trainings[0][3], trainings[1][3])

    def test_a_shuffle_is_of_the_last_masks_only(self, tmp_path):
        config = dataclasses.replace(IMP, density=0.64, control="shuffle")
        go(dataclasses.replace(config, control=""), tmp_path)
        before = len(list(tmp_path.iterdir()))
        go(config, tmp_path)
        assert len(list(tmp_path.iterdir())) == before + 1
        masks = [
            Masks.load(tmp_path / c.id / "masks.safetensors") for c in (config, dataclasses.replace(config, control=""))
        ]
        assert masks[0].per_layer() == masks[1].per_layer() and masks[0] != masks[1]


class TestAnyMethod:
    def test_is_prune_on_the_trained_network(self, tmp_path, trainings):
        config = dataclasses.replace(FINE, method="snip", density=0.2)
        go(config, tmp_path)
        model = create_model(MODEL, load("digits"), 0)
        model.load_state_dict(trainings[0][3])
        expected = prune(model, method="snip", density=0.2, batches=pruning_batches(load("digits"), seed=0), seed=0)
        assert Masks.load(tmp_path / config.id / "masks.safetensors") == expected.masks

    @pytest.mark.parametrize("retrain", ["", "fine-tune", "rewind-weights"])
    def test_new_weights_are_trained_on_unless_rewound(self, tmp_path, trainings, retrain):
        config = dataclasses.replace(FINE, method="obs", density=0.3, retrain=retrain)

        class Killed(BaseException):
            pass

        def kill(row):
            raise Killed

        with pytest.raises(Killed):
            go(config, tmp_path, on_epoch=kill)
        go(config, tmp_path)  # from the files
        start, masks, _, _ = trainings[-1]
        params = load_file(tmp_path / config.id / "new-weights.safetensors")
        if retrain == "rewind-weights":
            assert equal(start, initial())
        else:
            assert all(torch.equal(start[name], value) for name, value in params.items())
        assert all(not params[name][~mask].any() for name, mask in masks.items())

    def test_lost_new_weights_are_found_again(self, tmp_path, trainings):
        config = RunConfig("digits", MODEL, "obs", 0.3, train=SHORT)
        first = go(config, tmp_path)
        (tmp_path / config.id / "new-weights.safetensors").unlink()
        (tmp_path / config.id / "result.json").unlink()
        assert go(config, tmp_path).test_accuracy == first.test_accuracy
        assert equal(trainings[0][0], trainings[1][0])


class TestResuming:
    def test_rerun_is_a_no_op(self, tmp_path, trainings):
        first = go(IMP, tmp_path)
        before = mtimes(tmp_path)
        assert go(IMP, tmp_path) == first and len(trainings) == 4
        assert mtimes(tmp_path) == before

    def test_levels_are_shared_by_sparsities(self, tmp_path, trainings):
        go(IMP, tmp_path)
        result = go(dataclasses.replace(IMP, density=0.4096), tmp_path)
        assert len(trainings) == 5 and result.prior_epochs == 8
        go(LR, tmp_path)  # has the dense network in common
        assert len(trainings) == 8

    @pytest.mark.parametrize("after", [0, 1, 4])
    def test_interrupted_after_any_epoch_it_resumes_equal(self, tmp_path, after):
        class Killed(BaseException):
            pass

        config = dataclasses.replace(LR, rewind_epoch=0)
        whole = whole_result(config)
        count = itertools.count()

        def train(*args, on_epoch, **options):
            def report(row):
                on_epoch(row)
                if next(count) == after:
                    raise Killed

            return original(*args, on_epoch=report, **options)

        original = running.train
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(running, "train", train)
            go(config, tmp_path)
        resumed = go(config, tmp_path)
        assert resumed.test_accuracy == whole.test_accuracy and resumed.layers == whole.layers
        assert (resumed.epochs, resumed.prior_epochs) == (2, 6)

    def test_a_dense_run_without_its_weights_is_trained_again_once(self, tmp_path, trainings):
        first = go(DENSE, tmp_path)
        assert not (tmp_path / DENSE.id / "weights.safetensors").exists()
        config = dataclasses.replace(IMP, density=0.8, rewind_epoch=1)
        go(config, tmp_path)
        assert len(trainings) == 3 and equal(trainings[0][3], trainings[1][3])
        assert store.read_result(tmp_path / DENSE.id).test_accuracy == first.test_accuracy
        assert go(DENSE, tmp_path, keep=(1, 2)) and len(trainings) == 3

    def test_a_checkpoint_beyond_the_wanted_epoch_begins_again(self, tmp_path, trainings):
        class Killed(BaseException):
            pass

        def kill(row):
            raise Killed

        with pytest.raises(Killed):
            go(DENSE, tmp_path, on_epoch=kill)
        go(DENSE, tmp_path, keep=(1,))
        assert (tmp_path / DENSE.id / "weights-epoch-1.safetensors").exists()
        assert [row["epoch"] for row in files.read_rows(tmp_path / DENSE.id / "metrics.jsonl")] == [1, 2]

    def test_folders_from_before_there_was_retraining_are_read(self, tmp_path):
        go(DENSE, tmp_path)
        file = tmp_path / DENSE.id / "config.json"
        old = {k: v for k, v in json.loads(file.read_text()).items() if k not in NEWER}
        del old["train"]["start_epoch"]
        moved = (tmp_path / DENSE.id).rename(tmp_path / "by another name")
        (moved / "config.json").write_text(json.dumps(old))
        run(DENSE, moved, CPU, on_epoch=lambda _: pytest.fail("trained again"))

    def test_a_dense_training_that_diverges_is_the_reason(self, tmp_path):
        config = dataclasses.replace(FINE, train=dataclasses.replace(SHORT, lr=1e30))
        with pytest.raises(SapwoodError, match=r"The training before this pruning .* diverged"):
            go(config, tmp_path)


NEWER = ("retrain", "rewind_epoch", "rate", "sha256")


def whole_result(config, cache={}):  # noqa: B006  # once for all parameters of a test
    if config.id not in cache:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            cache[config.id] = go(config, Path(folder))
    return cache[config.id]


def test_compare_shares_the_dense_network_and_counts_all_epochs(tmp_path):
    grid = Grid(
        model=MODEL, methods=("imp@rewind_epoch=1", "magnitude-after", "magnitude"), sparsities=(0.2, 0.36), seeds=(0,)
    )
    outcomes = compare(grid.runs(SHORT), tmp_path, CPU, engine=EngineConfig(workers=1))
    assert all(outcome.result for outcome in outcomes)
    table = frame(outcomes).set_index(["method", "sparsity"])
    total = (table["epochs"] + table["prior_epochs"]).to_dict()
    assert total == {
        ("dense", 0.0): 2,
        ("imp@rewind_epoch=1", 0.2): 2 + 1,
        ("imp@rewind_epoch=1", 0.36): 2 + 1 + 1,
        ("magnitude-after", 0.2): 2 + 2,
        ("magnitude-after", 0.36): 2 + 2,
        ("magnitude", 0.2): 2,
        ("magnitude", 0.36): 2,
    }
    costs = tables.costs(outcomes, summarise(outcomes))
    assert {m: c.epochs for m, c in costs.items()} == {
        "dense": 2, "imp@rewind_epoch=1": 3.5, "magnitude-after": 4, "magnitude": 2,
    }  # fmt: skip
    assert not tables.unequal(outcomes)
    assert len(list((tmp_path / "runs").iterdir())) == 7
    dense = run_folder(tmp_path, outcomes[0].config)
    assert (dense / "weights.safetensors").exists() and (dense / "weights-epoch-1.safetensors").exists()
