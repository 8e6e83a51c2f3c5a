"""Pruned weights stay exactly zero, whatever trains the model, and nothing else about the model changes."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sapwood.attach import assert_masked, attach
from sapwood.errors import MaskError
from sapwood.masks import Masks

Build = Callable[[list[Tensor]], Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd decay": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "sgd momentum decay": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: AdamW(p, lr=0.01, fused=True),
}


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def random_masks(model: nn.Module, density: float = 0.5) -> Masks:
    return Masks({n: torch.rand_like(p) < density for n, p in model.named_parameters() if p.dim() > 1})


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))


def train(model: nn.Module, optimizer: Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        inputs, labels = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def alive(model: nn.Module, masks: Masks) -> int:
    """Independent of the code under test: pruned weights that are not zero."""
    parameters = dict(model.named_parameters())
    return sum(int((parameters[name][~masks[name]] != 0).sum()) for name in masks)


@pytest.mark.trap(26)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero_and_the_others_move(name: str) -> None:
    model = net()
    masks = random_masks(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    attach(masks, model, optimizer)
    train(model, optimizer)
    assert alive(model, masks) == 0
    for key in masks:
        kept = masks[key]
        assert (model.state_dict()[key] != before[key])[kept].float().mean() > 0.5


@pytest.mark.trap(26)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_left_by_dense_training_revives_nothing(name: str) -> None:
    model = net()
    masks = random_masks(model)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizer)
    with attach(masks, model, optimizer):
        train(model, optimizer)
    assert alive(model, masks) == 0


def test_without_attach_the_weights_come_back() -> None:
    """The control of the two tests above."""
    model = net()
    masks = random_masks(model)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(masks, model, optimizer).finalize()
    assert alive(model, masks) == 0
    train(model, optimizer)
    assert alive(model, masks) > 0
    with pytest.raises(MaskError, match=r"Layer '0\.weight': \d+ of \d+ pruned weights are not zero"):
        assert_masked(model, masks)


def test_equals_training_with_masked_forward_weights() -> None:
    """Explicitly: forward with w * m, gradient through the product, SGD with momentum and decay written out."""
    model = net()
    masks = random_masks(model)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    momenta = {n: torch.zeros_like(p) for n, p in weights.items()}
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    attach(masks, model, optimizer)
    for _ in range(6):
        inputs, labels = batch()
        effective = {n: w * masks[n] if n in masks else w for n, w in weights.items()}
        loss = F.cross_entropy(functional_call(model, {**effective, **buffers}, (inputs,)), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for (n, w), gradient in zip(weights.items(), gradients, strict=True):
                momenta[n].mul_(0.9).add_(gradient + 0.01 * w)
                w.sub_(0.1 * momenta[n])
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    for n, p in model.named_parameters():
        expected = weights[n] * masks[n] if n in masks else weights[n]
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_of_a_pruned_weight_touches_nothing(value: float) -> None:
    model = nn.Linear(4, 3)
    masks = random_masks(model, 0.5)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(masks, model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.weight.grad.masked_fill_(~masks["weight"], value)
    optimizer.step()
    assert alive(model, masks) == 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.state[model.weight]["momentum_buffer"].isfinite().all()


def test_clipping_sees_masked_gradients() -> None:
    model = net()
    masks = random_masks(model, 0.1)
    attachment = attach(masks, model, SGD(model.parameters(), lr=0.1))
    plain = net()
    plain.load_state_dict(model.state_dict())
    inputs, labels = batch()
    for each in (plain, model):
        F.cross_entropy(each(inputs), labels).backward()
    squares = [(p.grad * masks.get(n, 1)).square().sum() for n, p in plain.named_parameters()]
    dense = [p.grad.square().sum() for p in plain.parameters()]
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(norm, torch.stack(squares).sum().sqrt())
    assert norm < torch.stack(dense).sum().sqrt()
    for parameter in model.parameters():  # as differential privacy does it: written by hand, then clipped
        parameter.grad = torch.ones_like(parameter)
    attachment.mask_gradients()
    ones = sum(int(m.sum()) for m in masks.values())
    ones += sum(p.numel() for n, p in model.named_parameters() if n not in masks)
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e9) == pytest.approx(ones**0.5)


@pytest.mark.trap(26)
def test_weight_averaging_keeps_zeros() -> None:
    model = net()
    masks = random_masks(model)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(masks, model, optimizer)
    ema, swa = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), AveragedModel(model)
    for _ in range(3):
        train(model, optimizer, 1)
        ema.update_parameters(model)
        swa.update_parameters(model)
    for averaged in (ema, swa):
        assert alive(averaged.module, masks) == 0
        assert_masked(averaged, masks)  # seen through AveragedModel's `module.` prefix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    masks = random_masks(model)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(masks, model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 3, (8,)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert alive(model, masks) == 0
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    masks = random_masks(model)
    compiled = torch.compile(model, backend=backend)
    optimizer = SGD(compiled.parameters(), lr=0.1, momentum=0.9)
    attach(masks, compiled, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(compiled(torch.randn(8, 8)), torch.randint(0, 3, (8,))).backward()
        optimizer.step()
    assert alive(model, masks) == 0
    assert_masked(compiled, masks)


@pytest.mark.trap(28, 29)
def test_copies_and_files_are_those_of_the_plain_model() -> None:
    model = net()
    masks, names = random_masks(model), list(model.state_dict())
    optimizer = AdamW(model.parameters(), lr=0.01)
    attach(masks, model, optimizer)
    train(model, optimizer)
    assert list(model.state_dict()) == names
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = net()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    inputs, _ = batch()
    expected = model.eval()(inputs)
    assert torch.equal(copied.eval()(inputs), expected)
    assert torch.equal(fresh.eval()(inputs), expected)
    whole = io.BytesIO()
    torch.save(model, whole)  # even the module itself can be pickled
    train(model, optimizer, 1)
    assert alive(model, masks) == 0


@pytest.mark.trap(29)
def test_masks_of_another_model_are_refused() -> None:
    masks = random_masks(net())
    other = nn.Sequential(nn.Linear(8, 3))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(MaskError):
        attach(masks, other, SGD(other.parameters(), lr=0.1))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


@pytest.mark.trap(30)
def test_tied_weights_are_masked_in_both_places() -> None:
    model = Tied()
    masks = random_masks(model)
    assert list(masks) == ["embedding.weight"]
    optimizer = AdamW(model.parameters(), lr=0.01)
    attach(masks, model, optimizer)
    for _ in range(3):
        tokens = torch.randint(0, 11, (16,))
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), tokens.roll(1)).backward()
        optimizer.step()
    pruned = ~masks["embedding.weight"]
    assert (model.head.weight[pruned] == 0).all()
    assert model.head.weight is model.embedding.weight


@pytest.mark.trap(31)
@pytest.mark.parametrize("kdim", [None, 5])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(kdim: int | None, training: bool) -> None:
    model = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True).train(training)
    masks = random_masks(model)
    assert ("in_proj_weight" in masks) == (kdim is None)
    assert "out_proj.weight" in masks
    optimizer = AdamW(model.parameters(), lr=0.01)
    attach(masks, model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        keys = torch.randn(2, 4, kdim or 8)
        model(torch.randn(2, 4, 8), keys, keys)[0].square().sum().backward()
        optimizer.step()
    assert alive(model, masks) == 0
    with torch.no_grad():  # the fast path of eval mode reads the same tensors
        model.eval()(torch.randn(2, 4, 8), keys, keys)
    assert_masked(model, masks)


def test_lstm() -> None:
    model = nn.LSTM(5, 7, num_layers=2)
    masks = random_masks(model)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(masks, model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 5))[0].square().sum().backward()
        optimizer.step()
    assert alive(model, masks) == 0


@pytest.mark.trap(32)
def test_an_optimizer_of_other_tensors_is_refused() -> None:
    model = net()
    with pytest.raises(MaskError, match=r"'0\.weight' first; build the optimizer"):
        attach(random_masks(model), model, SGD(net().parameters(), lr=0.1))


@pytest.mark.trap(32)
def test_parameters_replaced_after_attach_are_noticed() -> None:
    model = net()
    masks = random_masks(model)
    attachment = attach(masks, model, SGD(model.parameters(), lr=0.1))
    model.load_state_dict(net().state_dict(), assign=True)
    with pytest.raises(MaskError, match="no longer the tensor"):
        attachment.finalize()


def test_apply_after_load_state_dict() -> None:
    model = net()
    masks = random_masks(model)
    attachment = attach(masks, model, SGD(model.parameters(), lr=0.1))
    model.load_state_dict(net().state_dict())
    assert alive(model, masks) > 0
    attachment.apply()
    assert alive(model, masks) == 0


def test_several_optimizers_and_a_frozen_layer() -> None:
    model = net()
    masks = random_masks(model)
    model[4].weight.requires_grad_(False)
    optimizers = [SGD(model[0].parameters(), lr=0.1, momentum=0.9), AdamW(model[6].parameters(), lr=0.01)]
    attach(masks, model, optimizers)
    for _ in range(3):
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert alive(model, masks) == 0


def test_remove_can_be_called_twice_and_ends_the_masking() -> None:
    model = net()
    masks = random_masks(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    attachment = attach(masks, model, optimizer)
    attachment.remove()
    attachment.remove()
    train(model, optimizer, 1)
    assert alive(model, masks) > 0


def test_assert_masked_names_the_layer_the_count_and_the_largest() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    masks = Masks({"1.weight": torch.tensor([[True, False], [False, False]])})
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0], [-0.5, 0.25]]))
    with pytest.raises(MaskError, match=r"'1\.weight': 2 of 3 .*largest magnitude 0\.5\)"):
        assert_masked(model, masks)
    with torch.no_grad():
        model[1].weight.mul_(masks["1.weight"])
    assert_masked(model, masks)
    with torch.no_grad():
        model[1].weight[1, 1] = float("nan")
    with pytest.raises(MaskError, match="nan"):
        assert_masked(model, masks)
