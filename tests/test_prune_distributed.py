"""Two gloo processes that score together against one process with all the data: the same masks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy

from nets import CLASSES, labelled, mlp
from sapwood import Masks, prune

METHODS = [
    "snip", "iter-snip", "force", "grasp", "ntk-sap", "ntk-sap-jvp", "synflow", "random", "synflow-l2", "px", "taylor",
    "obd", "obd-hutchinson", "skeletonization",
]  # fmt: skip
FIELDS = {
    "ntk-sap": {"rounds": 3, "resamples": 3},
    "ntk-sap-jvp": {"rounds": 3, "resamples": 3},
    "iter-snip": {"rounds": 3},
    "force": {"rounds": 3},
    "px": {"rounds": 3},
    "obd-hutchinson": {"diagonal": "hutchinson", "rounds": 2},
}


def masks_of(method: str, batches: list, group=None) -> Masks:
    torch.manual_seed(0)
    model = mlp(6, 12, 12, CLASSES).double()
    options = {"density": 0.3, "input_shape": (6,), "batches": batches, "group": group, **FIELDS.get(method, {})}
    return prune(model, method=method.removesuffix("-hutchinson"), **options).masks


def all_batches() -> list:
    (inputs, targets), size = labelled((6,), samples=24, dtype=torch.float64)[0], 6
    return [(inputs[i : i + size], targets[i : i + size]) for i in range(0, len(inputs), size)]


LOSSES = {
    "default": None,
    "mean over words": lambda output, target: cross_entropy(output.flatten(0, 1), target.flatten()),
    "sum": lambda output, target: cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum"),
}


def masks_by_words(loss: str, batches: list, group=None) -> Masks:
    torch.manual_seed(0)
    model = mlp(6, 12, CLASSES).double()
    return prune(model, method="snip", density=0.3, batches=batches, loss=LOSSES[loss], group=group).masks


def sentences_of_unequal_length() -> list:
    """Two batches, one for each process; in the first one most words do not count."""
    inputs = torch.randn(8, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(40).view(8, 5) % CLASSES
    targets[:4, 1:] = -100
    targets[4, 1:] = -100
    return [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for method in METHODS:
        masks_of(method, all_batches()[rank::2], dist.group.WORLD).save(Path(folder) / f"{method}-{rank}")
    for loss in LOSSES:
        masks_by_words(loss, sentences_of_unequal_length()[rank::2], dist.group.WORLD).save(
            Path(folder) / f"{loss}-{rank}"
        )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    mp.start_processes(process, args=(str(path),), nprocs=2, start_method="spawn")
    return path


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_find_the_masks_of_one(folder, method):
    alone = masks_of(method, all_batches())
    for rank in range(2):
        assert Masks.load(folder / f"{method}-{rank}") == alone


@pytest.mark.trap(63)
@pytest.mark.parametrize("loss", LOSSES)
def test_processes_weigh_by_the_words_that_count(folder, loss):
    whole = [torch.cat(parts) for parts in zip(*sentences_of_unequal_length(), strict=True)]
    alone = masks_by_words(loss, [tuple(whole)])
    for rank in range(2):
        assert Masks.load(folder / f"{loss}-{rank}") == alone


def test_each_process_alone_would_have_found_others():
    assert masks_of("snip", all_batches()[0::2]) != masks_of("snip", all_batches()[1::2])
