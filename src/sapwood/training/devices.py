"""Where a run computes: one device, or several processes that share every batch, through Lightning Fabric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from torch import Tensor, nn

from sapwood.errors import ConfigError, unknown_name
from sapwood.training.config import PRECISIONS

if TYPE_CHECKING:  # imported late, as it is slow to import
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.strategy import Strategy

Device: TypeAlias = Union[str, torch.device, "Fabric"]
"""A device of this process, or the launched Fabric of several."""

STRATEGIES = ("auto", "ddp", "fsdp")
_FABRIC_PRECISIONS: dict[str, Any] = {"float32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_IGNORED = -100  # the label that cross-entropy leaves out, and that no prediction equals


def fabric_for(
    device: torch.device | str = "auto", devices: int = 1, strategy: str = "auto", precision: str = "float32"
) -> Fabric:
    """The Fabric that `train` and `evaluate` take instead of a device, with its processes running.

    Several processes are started here, by running the script anew up to this call, or they were started by
    `torchrun --nproc-per-node <devices>`; call it once, early in a script. They talk through gloo on CPUs and NCCL on
    GPUs. For several machines or another sharding, build and launch a `lightning_fabric.Fabric` of your own.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".
        devices: How many of them, with one process each; on a CPU, how many processes.
        strategy: "ddp" (each process holds the model), "fsdp" (FSDP2: each holds a shard of weights, gradients and
            momentum, which are put together for a step), or "auto": one process, or ddp for several.
        precision: Of `TrainConfig`.

    Raises:
        ConfigError: a wrong name, devices that this machine lacks, or a precision that they cannot compute in.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    _check(devices, strategy, precision)
    root = _existing(device, devices)
    _require_precision(root, strategy, precision)
    single = devices == 1 and strategy == "auto"
    # One process needs no others: a scheduler's or torchrun's variables around it mean separate runs.
    plugins: list[Any] = [_precision_plugin(root, precision), *([LightningEnvironment()] if single else [])]
    try:
        fabric = Fabric(
            accelerator=root.type,
            devices=[root.index] if devices == 1 and root.type == "cuda" else devices,
            strategy=_strategy(strategy, single, devices),
            plugins=plugins,
        )
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(f"{devices} devices {str(device)!r} with strategy {strategy!r} fail: {error}") from error
    if not single:
        fabric.launch()
    return fabric


def as_fabric(device: Device, precision: str) -> Fabric:
    """`device` itself if it is a Fabric of this precision, else the Fabric of that one device.

    Raises:
        ConfigError: the device does not exist or lacks the precision, or the Fabric has another precision.
    """
    if isinstance(device, (str, torch.device)):
        return fabric_for(device, precision=precision)
    held, asked = device.strategy.precision.precision, _FABRIC_PRECISIONS[precision]
    if held != asked:
        raise ConfigError(
            f"precision is {precision!r} in the settings, but the Fabric computes in {held!r}; build it with {asked!r}."
        )
    return device


def own_part(batch: tuple[Tensor, Tensor], device: Device) -> tuple[Tensor, Tensor]:
    """Moves to the device what this process computes of a batch (inputs, labels): all, or its slice.

    A batch smaller than the number of processes leaves some of them its first input with a label that counts nowhere,
    because all must make the same calls.
    """
    inputs, labels = batch
    if not isinstance(device, (str, torch.device)):
        rank, world, device = device.global_rank, device.world_size, device.device
        own = slice(len(labels) * rank // world, len(labels) * (rank + 1) // world)
        if own.start == own.stop:
            inputs, labels = inputs[:1], torch.full_like(labels[:1], _IGNORED)
        else:
            inputs, labels = inputs[own], labels[own]
    return inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def total(value: Tensor, device: Device) -> Tensor:
    """The sum over the processes, on each of them."""
    if isinstance(device, (str, torch.device)):
        return value
    summed = device.all_reduce(value, reduce_op="sum")
    assert isinstance(summed, Tensor)
    return summed


def is_sharded(fabric: Fabric) -> bool:
    """Whether it shards weights by FSDP2."""
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    return isinstance(fabric.strategy, ModelParallelStrategy)


def share_buffers(model: nn.Module, fabric: Fabric) -> None:
    """Gives every process the first one's buffers (BatchNorm's averages), as DDP does by itself and FSDP2 does not."""
    if is_sharded(fabric):
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def reshard(model: nn.Module, fabric: Fabric) -> None:
    """Takes FSDP2's weights apart again, which an evaluation may leave put together, under other parameters."""
    if is_sharded(fabric):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _check(devices: int, strategy: str, precision: str) -> None:
    if strategy not in STRATEGIES:
        raise unknown_name("strategy", strategy, STRATEGIES)
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if devices < 1:
        raise ConfigError(f"devices must be at least 1, got {devices}.")


def _existing(device: torch.device | str, devices: int) -> torch.device:
    """The device with its index, after a first allocation on it; for several, their kind."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if devices > 1 and ":" in str(device):
        raise ConfigError(f"device must have no index where devices is {devices}, got {str(device)!r}.")
    try:
        # Every process of several would take memory on the first GPU; Fabric looks for them.
        return torch.device(device) if devices > 1 else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA raises an AssertionError
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"There is no device {str(device)!r} here ({reason}); legal: auto, cpu, cuda, cuda:0."
        ) from error


def _require_precision(device: torch.device, strategy: str, precision: str) -> None:
    available = torch.amp.is_autocast_available(device.type)
    if device.type == "cuda" and precision == "bf16":
        available = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision != "float32" and not available:
        raise ConfigError(f"precision {precision!r} is not supported on device {device}; use 'float32'.")
    if precision == "fp16" and strategy == "fsdp":
        raise ConfigError("precision 'fp16' is not supported with strategy 'fsdp'; use 'bf16' or 'float32'.")


def _precision_plugin(device: torch.device, precision: str) -> Any:
    from lightning_fabric.plugins import MixedPrecision, Precision

    # By name, Fabric would turn fp16 into bf16 on a CPU.
    return Precision() if precision == "float32" else MixedPrecision(_FABRIC_PRECISIONS[precision], device.type)


def _strategy(name: str, single: bool, devices: int) -> Strategy | str:
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    if name == "fsdp":
        return ModelParallelStrategy(_shard, data_parallel_size=devices, tensor_parallel_size=1)
    return "auto" if single else "ddp"


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    # As one group, which fits any model: tied weights must share a group, and blocks have no common name.
    fully_shard(model, mesh=mesh["data_parallel"])
    return model
