"""What runs record besides accuracy: FLOPs against counts by hand, memory against an allocation, and fair starts."""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn

import sapwood.experiments.stages as runs
from nets import NETS
from sapwood import Masks, files
from sapwood.experiments import cost, store
from sapwood.experiments.config import ORDER_SEED, Place
from sapwood.experiments.grid import Grid
from sapwood.experiments.run import run
from sapwood.experiments.store import RunResult
from sapwood.methods import prunable
from sapwood.training import TrainConfig

TRAIN = runs.train
CPU = Place(device="cpu", offline=True)
SHORT = TrainConfig(epochs=2, milestones=(), lr=0.05, validation=0.2, seed=ORDER_SEED)
GRID = Grid(model="mlp", methods=("snip", "ntk-sap@rounds=1", "random"), sparsities=(0.9,), seeds=(0, 1))


def masks_with(model, densities):
    """Keeps the first weights of each layer, in the proportions that are given."""
    weights = prunable(model)
    return Masks({n: torch.arange(w.numel()).reshape(w.shape) < densities[n] * w.numel() for n, w in weights.items()})


def test_flops_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))
    conv, linear = 2 * 3 * 9 * 8 * 36, 2 * 8 * 36 * 5
    half = masks_with(model, {"0.weight": 0.5, "3.weight": 0.2})
    assert cost.flops(model, half, (3, 6, 6)) == (conv / 2 + linear / 5, conv + linear)
    assert cost.flops(model, Masks({"3.weight": half["3.weight"]}), (3, 6, 6)) == (conv + linear / 5, conv + linear)


@pytest.mark.parametrize("name", ["vit", "zero-gamma residual", "conv1d", "mlp with LayerNorm"])
def test_flops_are_all_kept_by_dense_masks_and_none_of_the_weights_by_empty_ones(name):
    build, shape = NETS[name]
    model = build()
    dense = Masks.dense(prunable(model))
    kept, total = cost.flops(model, dense, shape)
    assert kept == total > 0
    nothing, _ = cost.flops(model, ~dense, shape)
    assert nothing == (0 if name != "vit" else nothing) < total


def test_flops_of_a_model_that_needs_values_are_not_told():
    class Choosy(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else x

    model = Choosy(3, 3)
    assert cost.flops(model, Masks.dense(prunable(model)), (3,)) is None


def test_peak_memory_sees_an_allocation_that_is_gone():
    device = torch.device("cpu")
    cost.reset_peak(device)
    before = cost.peak_memory(device)
    np.ones(25_000_000)  # 200 MB
    assert cost.peak_memory(device) - before > 150e6


def test_results_from_before_these_fields_are_still_read(tmp_path):
    new = run(GRID.runs(SHORT)[0], tmp_path, CPU)
    assert store.read_result(tmp_path) == new
    assert new.flops[0] == new.flops[1] == 2 * sum(total for _, total in new.layers.values())  # an MLP
    assert new.effective <= sum(total for _, total in new.layers.values())
    later = {f.name for f in dataclasses.fields(RunResult) if f.default is not dataclasses.MISSING}
    assert {"prune_memory", "train_memory", "flops", "effective", "init_hash", "order_hash"} < later
    old = {name: value for name, value in dataclasses.asdict(new).items() if name not in later}
    files.write_json(tmp_path / store.RESULT, old)
    read = store.read_result(tmp_path)
    assert (read.flops, read.effective, read.init_hash) == (None, None, "")
    assert dataclasses.replace(new, **{name: getattr(read, name) for name in later}) == read


def seen_by_training(monkeypatch, tmp_path, change=lambda split: split):
    """What every run of a comparison trains on: initial weights and all batches of labels, and what comes out."""
    seen = defaultdict(dict)

    def spy(model, split, config, **options):
        weights = [value.clone() for value in model.state_dict().values()]
        labels = [labels for _, labels in split.train_batches(torch.Generator().manual_seed(config.seed))]
        result = TRAIN(model, change(split), config, **options)
        seen[current.seed][current.label] = (weights, labels, result, [v.clone() for v in model.state_dict().values()])
        return result

    monkeypatch.setattr(runs, "train", spy)
    results = {}
    for current in GRID.runs(SHORT):
        results[current.seed, current.label] = run(current, tmp_path / current.id, CPU)
    return seen, results


def equal(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_methods_of_a_seed_share_initial_weights_and_data_order(monkeypatch, tmp_path):
    seen, results = seen_by_training(monkeypatch, tmp_path)
    for by_label in seen.values():
        assert len(by_label) == 4
        weights, labels, *_ = by_label["dense"]
        assert all(equal(weights, w) and equal(labels, ls) for w, ls, *_ in by_label.values())
    assert not equal(seen[0]["dense"][0], seen[1]["dense"][0])
    assert not equal(seen[0]["dense"][1], seen[1]["dense"][1])
    starts = {seed: {(r.init_hash, r.order_hash) for (s, _), r in results.items() if s == seed} for seed in (0, 1)}
    assert [len(found) for found in starts.values()] == [1, 1]
    assert not starts[0] & starts[1]


@pytest.mark.trap(37)
def test_the_test_set_decides_nothing(monkeypatch, tmp_path):
    """Other test labels change the test accuracies, and no mask, weight, epoch or validation accuracy."""

    def relabelled(split):
        test = dataclasses.replace(split.test, labels=(split.test.labels + 1) % 10)
        return dataclasses.replace(split, test=test)

    seen, _ = seen_by_training(monkeypatch, tmp_path / "as they are")
    others, _ = seen_by_training(monkeypatch, tmp_path / "relabelled", relabelled)
    assert seen[0]["dense"][2].test_accuracy != others[0]["dense"][2].test_accuracy
    for label, (_, _, result, weights) in seen[0].items():
        _, _, other, other_weights = others[0][label]
        assert equal(weights, other_weights)
        assert [r["validation_accuracy"] for r in result.history] == [r["validation_accuracy"] for r in other.history]
