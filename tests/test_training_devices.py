"""Which Fabric stands for which device, and what is refused."""

import pytest
import torch
from torch import nn

from sapwood.errors import ConfigError
from sapwood.training import TrainConfig, fabric_for, train
from sapwood.training.devices import own_part, total

BATCH = torch.arange(10.0).reshape(5, 2), torch.arange(5)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_one_device(device: str | torch.device) -> None:
    fabric = fabric_for(device)
    assert fabric.device.type == torch.device(device).type
    assert (fabric.world_size, fabric.global_rank) == (1, 0)
    assert not torch.distributed.is_initialized()


def test_auto_is_a_gpu_if_there_is_one() -> None:
    assert fabric_for().device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "around",
    [
        {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "sweep", "SLURM_JOB_ID": "7"},
        {"TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"},
    ],
    ids=["slurm", "torchrun"],
)
def test_a_run_of_one_process_ignores_the_processes_around_it(
    monkeypatch: pytest.MonkeyPatch, around: dict[str, str]
) -> None:
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    fabric = fabric_for("cpu")
    assert (fabric.world_size, fabric.global_rank) == (1, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "dpp"}, r"Unknown strategy 'dpp'\. Did you mean 'ddp'\? Legal: auto, ddp, fsdp"),
        ({"precision": "16-mixed"}, r"Unknown precision '16-mixed'\..* Legal: bf16, float32, fp16"),
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"device": "gpu"}, "There is no device 'gpu' here"),
        ({"device": "cuda:99"}, "There is no device 'cuda:99' here"),
        ({"device": "cuda:0", "devices": 2}, "no index where devices is 2, got 'cuda:0'"),
        ({"device": "cuda", "devices": 99}, "99 devices 'cuda' with strategy 'auto' fail"),
        ({"device": "cpu", "strategy": "fsdp", "precision": "fp16"}, "'fp16' is not supported with strategy 'fsdp'"),
        ({"device": "meta", "precision": "bf16"}, "'bf16' is not supported on device meta; use 'float32'"),
        ({"device": "meta"}, "1 devices 'meta' with strategy 'auto' fail: .*invalid accelerator name"),
    ],
)
def test_illegal_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fabric_for(**settings)


def test_a_fabric_of_another_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="'bf16' in the settings, but the Fabric computes in '32-true'; build it"):
        train(nn.Linear(2, 5), None, TrainConfig(precision="bf16"), device=fabric_for("cpu"))


class Third:
    """The third of four processes, which Fabric would have to start."""

    device, world_size, global_rank = torch.device("cpu"), 4, 2


def test_slices_cover_a_batch_once() -> None:
    parts = []
    for rank in range(4):
        process = Third()
        process.global_rank = rank
        parts.append(own_part(BATCH, process))
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), BATCH[0])
    assert torch.equal(torch.cat([labels for _, labels in parts]), BATCH[1])
    assert {len(labels) for _, labels in parts} == {1, 2}


def test_a_process_without_examples_computes_one_that_counts_nowhere() -> None:
    inputs, labels = own_part((BATCH[0][:1], BATCH[1][:1]), Third())
    logits = torch.randn(1, 5, requires_grad=True)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    assert len(inputs) == 1
    assert loss == 0
    assert (logits.grad == 0).all()
    assert (logits.argmax(1) == labels).sum() == 0


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_plain_device_keeps_the_whole_batch(device: str | torch.device) -> None:
    assert all(torch.equal(part, all_of_it) for part, all_of_it in zip(own_part(BATCH, device), BATCH, strict=True))
    assert total(torch.tensor(3.0), device) == 3
