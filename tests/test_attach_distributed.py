"""Two gloo processes, DDP and FSDP2, against one process: the same weights, the same zeros."""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from sapwood.attach import assert_masked, attach
from sapwood.errors import MaskError
from sapwood.masks import Masks

WORLD = 2
STEPS = 6


def net() -> nn.Sequential:
    # 5 rows do not divide by two processes, and one row leaves the second process with an empty shard.
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1), nn.Linear(1, 4))


def masks_of(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(1)
    return Masks(
        {n: torch.rand(p.shape, generator=generator) < 0.6 for n, p in model.named_parameters() if p.dim() > 1}
    )


def optimizer_of(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)


def train(model: nn.Module, optimizer: Optimizer, rank: int = 0, world: int = 1) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        inputs = torch.randn(8, 6, generator=generator)
        labels = torch.randint(0, 4, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[rank::world]), labels[rank::world]).backward()
        optimizer.step()


def single_process() -> dict[str, Tensor]:
    """The reference needs nothing of sapwood: multiply after every step by hand."""
    model = net()
    masks, optimizer = masks_of(model), optimizer_of(model)

    def multiply(*_: object) -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)

    multiply()
    optimizer.register_step_post_hook(multiply)
    train(model, optimizer)
    return dict(model.named_parameters())


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def compare(model: nn.Module, masks: Masks) -> None:
    expected = single_process()
    parameters = {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=0, atol=1e-6)
    for name, mask in masks.items():
        assert (parameters[name][~mask] == 0).all()
    assert_masked(model, masks)


def ddp(rank: int) -> None:
    model = DistributedDataParallel(net())
    masks, optimizer = masks_of(net()), optimizer_of(model)
    attach(masks, model, optimizer)
    train(model, optimizer, rank, WORLD)
    compare(model, masks)


def shard(model: nn.Sequential) -> None:
    fully_shard(model[0])
    fully_shard(model)


def fsdp2(rank: int) -> None:
    model, masks = net(), masks_of(net())
    shard(model)
    optimizer = optimizer_of(model)
    attachment = attach(masks, model, optimizer)
    train(model, optimizer, rank, WORLD)
    attachment.finalize()
    compare(model, masks)


def stale(_: int) -> None:
    """An optimizer built before the sharding, and a sharding after the attaching: neither passes in silence."""
    model, masks = net(), masks_of(net())
    optimizer = optimizer_of(model)
    attachment = attach(masks, model, optimizer)
    shard(model)
    with pytest.raises(MaskError, match="in no optimizer"):
        attach(masks, model, optimizer)
    with pytest.raises(MaskError, match="no longer the tensor"):
        attachment.apply()
    dense = net()
    shard(dense)
    with pytest.raises(MaskError, match="not zero"):  # on each rank, from its own shard
        assert_masked(dense, masks)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=limit)
    try:
        for check in (ddp, fsdp2, stale):
            check(rank)
        Path(folder, f"done-{rank}").touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.trap(32)
@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    assert len(list(tmp_path.glob("done-*"))) == WORLD
