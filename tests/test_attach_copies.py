"""Copies, files and conversions of a model that has masks attached: the promise goes with the model."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from optimizers import Whitened
from processes import PATH
from sapwood import Masks, attach
from sapwood.errors import MaskError


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def random_masks(model: nn.Module) -> Masks:
    return Masks({n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters() if p.dim() > 1})


def alive(model: nn.Module, masks: Masks) -> int:
    parameters = dict(model.named_parameters())
    return sum(int((parameters[name][~mask] != 0).sum()) for name, mask in masks.items())


def write(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.add_(1.0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks) -> None:
    """Three steps; zeros after each, and a gradient that is masked."""
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        inputs = torch.randn(8, 8).to(next(model.parameters()).dtype)
        F.cross_entropy(model(inputs), torch.randint(0, 3, (8,))).backward()
        assert all((model.get_parameter(n).grad[~m] == 0).all() for n, m in masks.items())
        optimizer.step()
        assert alive(model, masks) == 0
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.fixture
def attached():
    model = net()
    masks = random_masks(model)
    return model, masks, attach(masks, model, AdamW(model.parameters(), lr=0.01))


@pytest.mark.trap(55)
@pytest.mark.parametrize("build", [lambda p: AdamW(p, lr=0.1), lambda p: SGD(p, lr=0.1, momentum=0.9), Whitened])
def test_a_copied_pair_keeps_its_zeros(build) -> None:
    model = net()
    masks = random_masks(model)
    optimizer = build(model.parameters())
    attachment = attach(masks, model, optimizer)
    train(model, optimizer, masks)
    client, its_optimizer = copy.deepcopy((model, optimizer))
    attachment.remove()  # of the original only
    before = copy.deepcopy(model.state_dict())
    train(client, its_optimizer, masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.trap(55)
def test_a_copied_model_keeps_its_zeros(attached) -> None:
    model, masks, _ = attached
    write(model)
    client = copy.deepcopy(model)
    assert alive(client, masks) == 0 and alive(model, masks) > 0  # a copy is clean from the start
    model(torch.randn(2, 8))
    write(client)
    client(torch.randn(2, 8))
    assert alive(client, masks) == 0 and alive(model, masks) == 0
    train(client, Whitened(client.parameters()), masks)
    part = copy.deepcopy(model[0])  # or a part of it
    write(part)
    part(torch.randn(2, 8))
    assert (part.weight[~masks["0.weight"]] == 0).all()


@pytest.mark.trap(55)
def test_a_copied_trainer_has_a_handle_of_its_own(attached) -> None:
    model, masks, attachment = attached
    other, its_attachment = copy.deepcopy((model, attachment))
    its_attachment.remove()
    write(other)
    write(model)
    for each in (other, model):
        each(torch.randn(2, 8))
    assert alive(other, masks) > 0 and alive(model, masks) == 0


@pytest.mark.trap(55)
def test_a_copy_is_freed_by_attaching_to_it(attached) -> None:
    client = copy.deepcopy(attached[0])
    attach(attached[1], client, None).remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._state_dict_pre_hooks for m in client.modules())
    assert not any(p._backward_hooks for p in client.parameters())


@pytest.mark.trap(55)
def test_pickled_models_keep_their_zeros_here_and_in_another_process(attached, tmp_path) -> None:
    model, masks, _ = attached
    torch.save(model, tmp_path / "model.pt")
    masks.save(tmp_path / "masks.safetensors")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    train(loaded, SGD(loaded.parameters(), lr=0.1), masks)
    code = f"""
import torch, sapwood
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
masks = sapwood.Masks.load({str(tmp_path / "masks.safetensors")!r})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
sapwood.assert_masked(model, masks)
"""
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": PATH}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.trap(56)
def test_no_saved_state_shows_a_revived_weight(attached) -> None:
    model, masks, _ = attached
    names = list(net().state_dict())
    for take in (lambda m: m.state_dict(), lambda m: nn.ModuleDict({"m": m}).state_dict(prefix="x.")):
        write(model)
        state = {name.removeprefix("x.m."): value for name, value in take(model).items()}
        assert list(state) == names
        assert all((state[name][~mask] == 0).all() for name, mask in masks.items())
    write(model)
    assert all((model[0].state_dict()["weight"][~masks["0.weight"]] == 0).all() for _ in range(2))


@pytest.mark.trap(56)
@pytest.mark.parametrize("assign", [False, True])
def test_dense_weights_that_are_loaded(attached, assign: bool) -> None:
    model, masks, _ = attached
    dense = net().state_dict()
    model.load_state_dict(dense, assign=assign)
    expected = nn.functional.linear(torch.ones(1, 8), dense["0.weight"] * masks["0.weight"], dense["0.bias"])
    torch.testing.assert_close(model[0](torch.ones(1, 8)), expected)
    train(model, AdamW(model.parameters(), lr=0.01), masks)
    assert all((model.state_dict()[name][~mask] == 0).all() for name, mask in masks.items())


@pytest.mark.trap(56)
def test_averages_of_a_model_that_was_attached_keep_their_zeros(attached) -> None:
    model, masks, _ = attached
    for average in (AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), AveragedModel(model)):
        for _ in range(3):
            write(model)
            average.update_parameters(model)  # reads weights that no forward pass has seen
            average(torch.randn(2, 8))
            assert alive(average.module, masks) == 0
            assert all((average.state_dict()[f"module.{n}"][~m] == 0).all() for n, m in masks.items())


@pytest.mark.trap(57)
@pytest.mark.parametrize("swaps", [False, True])
def test_a_model_that_is_converted_after_attach(attached, swaps: bool) -> None:
    model, masks, attachment = attached
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    write(model)
    train(model, SGD(model.parameters(), lr=0.1, momentum=0.9), masks)
    attachment.finalize()
    assert alive(model, masks) == 0


@pytest.mark.trap(57)
def test_a_model_that_moves_to_another_device(attached) -> None:
    model, masks, attachment = attached
    model.to("meta")
    model(torch.randn(2, 8, device="meta")).sum().backward()
    SGD(model.parameters(), lr=0.1).step()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    train(model, SGD(model.parameters(), lr=0.1), masks)
    attachment.finalize()


@pytest.mark.gpu
@pytest.mark.trap(57)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_that_moves_to_a_gpu() -> None:
    model = net()
    masks = random_masks(model)
    optimizer = AdamW(model.parameters(), lr=0.01, fused=True)
    attachment = attach(masks, model, optimizer)
    model.cuda()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 8, device="cuda")).sum().backward()
        assert all((model.get_parameter(n).grad[~m.cuda()] == 0).all() for n, m in masks.items())
        optimizer.step()
        assert alive(model, masks.to("cuda")) == 0
    attachment.finalize()


@pytest.mark.trap(57)
@pytest.mark.parametrize(
    "replace",
    [
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: parametrizations.orthogonal(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: layer.register_parameter("weight", nn.Parameter(torch.randn(4, 8))),
        lambda layer: layer.register_parameter("weight", None),
    ],
)
def test_a_parameter_that_is_taken_away_is_missed(attached, replace) -> None:
    model, _, attachment = attached
    replace(model[0])
    for read in (lambda: model(torch.randn(2, 8)), model.state_dict):
        with pytest.raises(
            MaskError, match=r"'0\.weight' of shape \(16, 8\) was attached .*: undo that, or remove\(\)"
        ):
            read()
    attachment.remove()
    model.state_dict()


@pytest.mark.trap(57)
def test_weights_that_are_tied_after_attach_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    attach(random_masks(model), model, None)
    model[1].weight = model[0].weight
    with pytest.raises(MaskError, match=r"'1\.weight' is the same tensor as '0\.weight' by now"):
        model(torch.randn(2, 8))


@pytest.mark.trap(57)
def test_weights_that_cannot_be_trained_are_refused() -> None:
    with torch.inference_mode():
        made = nn.Linear(4, 4)
    integers = nn.Linear(4, 4).requires_grad_(False)
    integers.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    for model, reason in ((made, "was made in inference mode"), (integers, "is of dtype torch.int8")):
        with pytest.raises(MaskError, match=f"'weight' {reason} and cannot be trained"):
            attach(Masks({"weight": torch.rand(4, 4) < 0.5}), model, None)
        assert not model._forward_pre_hooks


def test_an_attachment_keeps_nothing_alive(attached) -> None:
    model, masks, _ = attached
    client = copy.deepcopy(model)
    optimizer = SGD(client.parameters(), lr=0.1, momentum=0.9)
    train(client, optimizer, masks)
    alive_still = [weakref.ref(each) for each in (client, client[0].weight, optimizer)]
    del client, optimizer
    gc.collect()
    assert not any(reference() for reference in alive_still)


def test_plain_files_and_no_warning(attached) -> None:
    model, *_ = attached
    file = io.BytesIO()
    torch.save(model.state_dict(keep_vars=True), file)
    file.seek(0)
    assert list(torch.load(file, weights_only=True)) == list(net().state_dict())
