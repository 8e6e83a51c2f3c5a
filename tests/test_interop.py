import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from nets import labelled, mlp
from sapwood import MaskError, from_torch_prune, prune, to_torch_prune


@pytest.mark.trap(28)
def test_there_and_back_again():
    model = mlp(6, 8, 3)
    masks = prune(model, method="snip", density=0.4, batches=labelled((6,))).masks
    twin = to_torch_prune(masks, copy.deepcopy(model))
    assert {"0.weight_orig", "0.weight_mask"} <= set(twin.state_dict())
    assert from_torch_prune(twin) == masks
    assert from_torch_prune(twin.state_dict()) == masks
    torch_prune.remove(twin[0], "weight")
    torch.testing.assert_close(twin[0].weight, model[0].weight * masks["0.weight"], rtol=0, atol=0)


def test_masks_that_torch_made():
    model = mlp(6, 8, 3)
    torch_prune.global_unstructured(
        [(model[0], "weight"), (model[2], "weight")], torch_prune.L1Unstructured, amount=0.5
    )
    masks = from_torch_prune(model)
    assert masks.kept == 36 and masks["0.weight"].shape == (8, 6)


def test_masks_in_a_parametrization():
    class Sparse(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight):
            return weight * self.mask

    model = mlp(6, 8, 3)
    mask = torch.rand(8, 6) < 0.5
    parametrize.register_parametrization(model[0], "weight", Sparse(mask.float()))
    masks = from_torch_prune(model)
    assert list(masks) == ["0.weight"] and torch.equal(masks["0.weight"], mask)


def test_nothing_to_read_and_nothing_to_fit():
    with pytest.raises(MaskError, match="No masks found"):
        from_torch_prune(mlp(6, 8, 3))
    with pytest.raises(MaskError, match="another model"):
        to_torch_prune(prune(mlp(6, 8, 3), method="random", density=0.5).masks, mlp(6, 9, 3))
