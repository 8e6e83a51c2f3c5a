"""Two gloo processes against one: the same weights, accuracies and zeros, whichever of them wrote the checkpoint."""

import dataclasses
import datetime
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn

from sapwood import prune
from sapwood.attach import assert_masked
from sapwood.errors import ConfigError
from sapwood.experiments.config import Place, RunConfig, under
from sapwood.experiments.run import run
from sapwood.masks import Masks
from sapwood.models import create
from sapwood.training import Device, Epoch, TrainConfig, TrainResult, evaluate, fabric_for, train

WORLD = 2
CONFIG = TrainConfig(epochs=4, batch_size=32, milestones=(2,), validation=0.2)
Check = Callable[[Path], None]
Pairs = list[tuple[Tensor, Tensor]]


class Blobs:
    """Four Gaussian blobs; no split divides by two, and the last training batch has one example for two processes."""

    def __init__(self, kill_in: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.labels = torch.arange(200) % 4
        self.inputs = torch.randn(4, 8, generator=generator)[self.labels] + torch.randn(200, 8, generator=generator)
        self.kill_in = kill_in
        self.epoch = -1  # train() asks once for the number of batches

    def train_batches(self, generator: torch.Generator) -> Pairs:
        self.epoch += 1
        if self.epoch == self.kill_in:
            raise KeyboardInterrupt
        order = torch.randperm(97, generator=generator)
        return [(self.inputs[chunk], self.labels[chunk]) for chunk in order.split(32)]

    def validation_batches(self) -> Pairs:
        return [(self.inputs[97:130], self.labels[97:130])]

    def test_batches(self) -> Pairs:
        return [(self.inputs[130:199], self.labels[130:199]), (self.inputs[199:], self.labels[199:])]


def net(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 30), nn.GroupNorm(3, 30), nn.Tanh(), *extra, nn.Linear(30, 5), nn.Linear(5, 4))


def masks() -> Masks:
    generator = torch.Generator().manual_seed(5)
    return Masks(
        {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in net().named_parameters() if p.dim() > 1}
    )


def whole(model: nn.Module) -> dict[str, Tensor]:
    values = model.state_dict().items()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in values}


def without_time(result: TrainResult) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in result.history]


def compare(model: nn.Module, result: TrainResult, config: TrainConfig = CONFIG) -> None:
    """Against the run of a single process, which nothing around it turns into a part of two."""
    alone = net()
    expected = train(alone, Blobs(), config, masks=masks())
    for name, value in whole(model).items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=0, atol=1e-6)
    for name, mask in masks().items():
        assert (whole(model)[name][~mask] == 0).all()
    assert_masked(model, masks())
    for row, wanted in zip(result.history, expected.history, strict=True):
        for key in ("epoch", "lr", "train_accuracy", "validation_accuracy", "test_accuracy"):
            assert row[key] == wanted[key]
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], abs=1e-6)


def killed(path: Path, device: Device, config: TrainConfig = CONFIG, model: nn.Module | None = None) -> None:
    """A run that ends in its third epoch, in all its processes."""
    model = net() if model is None else model
    with pytest.raises(KeyboardInterrupt):
        train(model, Blobs(kill_in=3), config, masks=masks(), device=device, checkpoint=path)


def equals_one_process(_: Path, strategy: str) -> None:
    fabric, model, rows = fabric_for("cpu", WORLD, strategy), net(), list[Epoch]()
    result = train(model, Blobs(), CONFIG, masks=masks(), device=fabric, on_epoch=rows.append)
    compare(model, result)
    assert all(hasattr(weight, "full_tensor") == (strategy == "fsdp") for weight in model.parameters())
    assert result.test_accuracy > 40  # chance is 25 %
    assert len(rows) == (CONFIG.epochs if fabric.is_global_zero else 0)
    everywhere: list[object] = [None] * WORLD
    dist.all_gather_object(everywhere, without_time(result))
    assert everywhere[0] == everywhere[1]


def resumes(folder: Path, strategy: str, momentum: float) -> None:
    """From a checkpoint of one process, and one process from theirs."""
    config = dataclasses.replace(CONFIG, momentum=momentum)
    fabric, model, rank = fabric_for("cpu", WORLD, strategy), net(), dist.get_rank()
    path = folder / f"one-{strategy}-{momentum}.pt"
    if rank == 0:
        killed(path, "cpu", config)
    dist.barrier()
    compare(model, train(model, Blobs(), config, masks=masks(), device=fabric, checkpoint=path), config)
    saved = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in whole(model).items())

    path = folder / f"two-{strategy}-{momentum}.pt"
    killed(path, fabric, config)
    dist.barrier()
    if rank == 0:
        model = net()
        compare(model, train(model, Blobs(), config, masks=masks(), checkpoint=path), config)


def resumes_to_the_last_bit(folder: Path, strategy: str) -> None:
    """With dropout and BatchNorm, which differ from one process but not from one run of two to the next."""
    fabric, undisturbed, model = fabric_for("cpu", WORLD, strategy), noisy(), noisy()
    path = folder / f"noisy-{strategy}.pt"
    expected = train(undisturbed, Blobs(), CONFIG, device=fabric)
    with pytest.raises(KeyboardInterrupt):
        train(noisy(), Blobs(kill_in=3), CONFIG, device=fabric, checkpoint=path)
    result = train(model, Blobs(), CONFIG, device=fabric, checkpoint=path)
    assert without_time(result) == without_time(expected)
    mine, wanted = whole(model), whole(undisturbed)
    assert all(torch.equal(value, wanted[name]) for name, value in mine.items())
    everywhere: list[dict[str, Tensor]] = [{}] * WORLD
    dist.all_gather_object(everywhere, mine)
    assert all(torch.equal(value, everywhere[1][name]) for name, value in everywhere[0].items())


def noisy() -> nn.Sequential:
    return net(nn.Unflatten(1, (2, 15)), nn.BatchNorm1d(2), nn.Flatten(), nn.Dropout(0.3))


class Draws(nn.Module):
    """Notes a number from the random state that dropout draws from."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += [torch.rand(()).item()] if self.training else []
        return inputs


def dropout_differs_between_processes_and_epochs(_: Path, strategy: str) -> None:
    draws = Draws()
    train(net(draws), Blobs(), CONFIG, device=fabric_for("cpu", WORLD, strategy))
    everywhere: list[list[float]] = [[]] * WORLD
    dist.all_gather_object(everywhere, draws.seen)
    assert len({draw for seen in everywhere for draw in seen}) == WORLD * CONFIG.epochs * 4


def diverges_everywhere(_: Path, strategy: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    config = dataclasses.replace(CONFIG, lr=1e30)
    assert train(model, Blobs(), config, device=fabric_for("cpu", WORLD, strategy)).diverged


def evaluates_slices(_: Path, strategy: str) -> None:
    fabric, model, data = fabric_for("cpu", WORLD, strategy), net(), Blobs()
    alone = evaluate(model, data.test_batches())
    shared = evaluate(fabric.setup_module(model), data.test_batches(), fabric)
    assert shared == (pytest.approx(alone[0]), alone[1])


def runs_together(folder: Path, strategy: str) -> None:
    """A run's folder, which the first process writes and all of them agree on."""
    fabric, place, out = fabric_for("cpu", WORLD, strategy), Place("cpu", offline=True), folder / f"run-{strategy}"
    plain = RunConfig("digits", "mlp", train=TrainConfig(epochs=3, milestones=(), lr=0.05))
    sparse = Masks.load(folder / "masks")
    config = under(plain, sparse)
    if fabric.is_global_zero:
        out.mkdir()
        (out / "checkpoint.pt").write_bytes(b"cut off")
    dist.barrier()
    rows: list[Epoch] = []
    result = run(config, out, place, masks=sparse, keep={config.train.epochs}, on_epoch=rows.append, fabric=fabric)
    assert len(rows) == (3 if fabric.is_global_zero else 0)
    assert run(config, out, place, masks=sparse, fabric=fabric) == result
    with pytest.raises(ConfigError, match="differs in"):
        run(plain, out, place, fabric=fabric)
    with pytest.raises(ConfigError, match="prune first"):
        run(dataclasses.replace(plain, method="snip"), out, place, fabric=fabric)
    if fabric.is_global_zero:
        alone = run(config, folder / f"alone-{strategy}", place, masks=sparse, keep={config.train.epochs})
        assert result.test_accuracy == pytest.approx(alone.test_accuracy, abs=0.3)  # one of 355 images
        assert (result.layers, result.init_hash, result.order_hash) == (alone.layers, alone.init_hash, alone.order_hash)
        weights, wanted = (load_file(folder / f"{n}-{strategy}/weights.safetensors") for n in ("run", "alone"))
        for name, value in wanted.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-4)
            assert name not in sparse or not weights[name][~sparse[name]].any()
        assert f"{WORLD} (" in result.environment["processes"]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # What torchrun sets. The processes meet in a file rather than at a port, which could be taken.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "TORCHELASTIC_RUN_ID": "test"}
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=limit)
    try:
        for strategy in ("ddp", "fsdp"):
            equals_one_process(Path(folder), strategy)
            resumes(Path(folder), strategy, momentum=0.9)
            resumes(Path(folder), strategy, momentum=0.0)
            resumes_to_the_last_bit(Path(folder), strategy)
            dropout_differs_between_processes_and_epochs(Path(folder), strategy)
            diverges_everywhere(Path(folder), strategy)
            evaluates_slices(Path(folder), strategy)
            runs_together(Path(folder), strategy)
        Path(folder, f"done-{rank}").touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.trap(32)
@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    model = create("mlp", in_channels=1, image_size=8)
    prune(model, method="random", density=0.2, seed=0).masks.save(tmp_path / "masks")
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    assert len(list(tmp_path.glob("done-*"))) == WORLD


def script() -> None:
    """What a user would write; run by the test below."""
    fabric, model = fabric_for("cpu", devices=WORLD), net()
    result = train(model, Blobs(), CONFIG, masks=masks(), device=fabric)
    compare(model, result)
    Path(sys.argv[1], f"done-{fabric.global_rank}-of-{fabric.world_size}").touch()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [[], ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]],
    ids=["own", "torchrun"],
)
def test_a_script_starts_its_processes(tmp_path: Path, launcher: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, __file__, str(tmp_path)], check=True, env=environment, timeout=120)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["done-0-of-2", "done-1-of-2"]


if __name__ == "__main__":
    script()
