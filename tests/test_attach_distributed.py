"""Two gloo processes, DDP and FSDP2, against one process: the same weights, the same zeros."""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from sapwood.attach import assert_masked, attach
from sapwood.errors import MaskError
from sapwood.masks import Masks
from sapwood.pruning import Result

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


def sharded_later(rank: int) -> None:
    """Sharded after attach, with an optimizer that was built after that: the same zeros, the same weights."""
    model, masks = net(), masks_of(net())
    attachment = attach(masks, model, optimizer_of(model))
    shard(model)
    train(model, optimizer_of(model), rank, WORLD)
    attachment.finalize()
    compare(model, masks)


def read(_: int) -> None:
    """Forward passes, clipping and state dicts of shards that were written to see zeros."""
    for is_first in (True, False):
        model, masks = net(), masks_of(net())
        if is_first:
            attach(masks, model, None)
        shard(model)
        if not is_first:
            attach(masks, model, None)
        for _ in range(2):  # a sharding that came after attach gathers weights first, once
            for parameter in model.parameters():
                parameter.data.to_local().add_(1.0)
            model(torch.randn(4, 6)).square().sum().backward()
        assert_masked(model, masks)
        gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
        assert all((gradients[name][~mask] == 0).all() for name, mask in masks.items())
        for parameter in model.parameters():
            parameter.data.to_local().add_(1.0)
        state = model.state_dict()
        assert all((whole(state[name])[~mask] == 0).all() for name, mask in masks.items())


def tensor_parallel(_: int) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    masks = masks_of(model)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = AdamW(model.parameters(), lr=0.1)
    attach(masks, model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 6)).square().sum().backward()
        gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        for name, mask in masks.items():
            assert (gradients[name][~mask] == 0).all()
            assert (whole(model.get_parameter(name))[~mask] == 0).all()


def a_result_with_weights(_: int) -> None:
    model = net()
    result = Result(masks_of(model), (), 0.0, 0, params={n: p.detach() for n, p in net().named_parameters()})
    shard(model)
    with pytest.raises(MaskError, match=r"new weights, and '0\.weight' is sharded: call result\.load_into"):
        attach(result, model, optimizer_of(model))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=limit)
    try:
        for check in (ddp, fsdp2, stale, sharded_later, read, tensor_parallel, a_result_with_weights):
            check(rank)
        Path(folder, f"done-{rank}").touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.trap(32)
@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    assert len(list(tmp_path.glob("done-*"))) == WORLD
