"""Shared set-up: torchvision on a CPU-only torch, one thread pool, no test that depends on another's RNG."""

import contextlib

import pytest
import torch
from hypothesis import settings


def _declare_torchvision_schemas() -> None:
    """A CPU wheel of torch lacks these two operator schemas, without which torchvision cannot be imported."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        with contextlib.suppress(RuntimeError):  # torchvision's own operators are there: nothing to declare
            library.define(schema)
    _declare_torchvision_schemas.library = library  # the schemas live as long as this object


try:
    import torchvision  # noqa: F401
except RuntimeError:
    _declare_torchvision_schemas()


settings.register_profile("steady", derandomize=True)  # a failure is there for everybody, or for nobody
settings.load_profile("steady")

torch.set_num_threads(1)  # tiny nets: a second thread only waits, and for ages when the cores are shared


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
