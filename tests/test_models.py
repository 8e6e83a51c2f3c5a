"""Own models against counts worked out from the papers and against torchvision; the names of everybody's models."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sapwood import models
from sapwood.errors import ConfigError
from sapwood.models.wide_resnet import PreActivationBlock


def prunable(model: nn.Module) -> list[int]:
    return [m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def on_meta(name: str, **settings: object) -> nn.Module:
    with torch.device("meta"):
        return models.create(name, **settings)


@pytest.mark.parametrize(
    ("name", "num_classes", "weights", "tensors", "parameters"),
    [  # first the networks of the NTK-SAP experiments, then totals that other authors give (or, for resnet8, by hand)
        ("resnet20", 10, 270_896, 22, 272_474),
        ("vgg16-bn", 100, 14_761_664, 14, 14_774_436),
        ("resnet18", 1000, 11_678_912, 21, 11_689_512),
        ("resnet50", 1000, 25_502_912, 54, 25_557_032),
        ("resnet18-3x3", 200, 11_261_632, 21, None),
        ("resnet34", 1000, None, 37, 21_797_672),
        ("resnet32", 10, None, 34, 466_906),
        ("resnet56", 10, None, 58, 855_770),
        ("resnet110", 10, None, 112, 1_730_714),
        ("resnet8", 10, None, 10, 78_042),
        ("wrn-16-4", 10, None, 17, 2_748_890),
        ("wrn-28-10", 10, None, 29, 36_479_194),
        ("wrn-40-2", 10, None, 41, 2_243_546),
    ],
)
def test_published_counts(
    name: str, num_classes: int, weights: int | None, tensors: int | None, parameters: int | None
) -> None:
    model = on_meta(name, num_classes=num_classes)
    sizes = prunable(model)
    assert weights in (None, sum(sizes))
    assert tensors in (None, len(sizes))
    assert parameters in (None, sum(p.numel() for p in model.parameters()))


def test_vit_counts_by_hand() -> None:
    width, depth, tokens = 192, 12, 64
    layer = 12 * width**2 + 9 * width + 4 * width  # attention and MLP weights, their biases, two LayerNorms
    ends = (3 * 16 + 1) * width + tokens * width + 2 * width + 10 * (width + 1)
    assert sum(p.numel() for p in on_meta("vit-tiny").parameters()) == depth * layer + ends


@pytest.mark.parametrize("name", models.names())
def test_every_model_takes_its_usual_input(name: str) -> None:
    model = on_meta(name, num_classes=7)
    assert model(torch.empty(2, *models.input_shape(name), device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", models.names())
def test_every_model_takes_other_channels_and_sizes(name: str) -> None:
    model = on_meta(name, num_classes=5, in_channels=1, image_size=48)
    assert model(torch.empty(2, 1, 48, 48, device="meta")).shape == (2, 5)


@pytest.mark.parametrize("name", ["resnet8", "mlp", "vit-tiny", "wrn-10-1"])
def test_small_grey_digits(name: str) -> None:
    out = models.create(name, in_channels=1, image_size=8)(torch.randn(3, 1, 8, 8))
    assert out.shape == (3, 10)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["mlp", "resnet20", "resnet50", "wrn-10-1", "vgg11-bn", "vit-tiny"])
def test_every_family_can_be_traced(name: str) -> None:
    torch.fx.symbolic_trace(on_meta(name))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_imagenet_resnets_are_torchvisions(name: str) -> None:
    ours, theirs = (
        models.create(name, num_classes=11).eval(),
        models.create(f"torchvision:{name}", num_classes=11).eval(),
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_wide_block_is_pre_activation() -> None:
    x = torch.randn(2, 4, 8, 8)
    for outputs, stride in ((4, 1), (6, 2)):
        block = PreActivationBlock(4, outputs, stride).eval()
        active = F.relu(x / math.sqrt(1 + block.bn1.eps))  # untouched BatchNorm: mean 0, variance 1
        hidden = F.relu(F.conv2d(active, block.conv1.weight, stride=stride, padding=1) / math.sqrt(1 + block.bn2.eps))
        out = F.conv2d(hidden, block.conv2.weight, padding=1)
        out += x if block.shortcut is None else F.conv2d(active, block.shortcut.weight, stride=stride)
        torch.testing.assert_close(block(x), out)


def test_mlp_is_three_products() -> None:
    model = models.create("mlp", in_channels=1, image_size=4, widths=(6, 5)).double()
    (w1, b1), (w2, b2), (w3, b3) = ((m.weight, m.bias) for m in model.modules() if isinstance(m, nn.Linear))
    x = torch.randn(3, 1, 4, 4, dtype=torch.double)
    expected = ((x.view(3, 16) @ w1.T + b1).relu() @ w2.T + b2).relu() @ w3.T + b3
    torch.testing.assert_close(model(x), expected)


def test_vit_without_positions_does_not_see_the_order_of_patches() -> None:
    model = models.create("vit-tiny", depth=2, width=24).eval()
    nn.init.zeros_(model.positions)
    x = torch.randn(2, 3, 32, 32)
    swapped = torch.cat([x[..., 4:8], x[..., :4], x[..., 8:]], dim=-1)
    torch.testing.assert_close(model(x), model(swapped), rtol=1e-4, atol=1e-5)
    within = torch.cat([x[..., 1:2], x[..., :1], x[..., 2:]], dim=-1)
    assert not torch.allclose(model(x), model(within), rtol=1e-3)


def test_vit_layers_start_differently() -> None:
    first, second = (models.create("vit-tiny", depth=2, width=24).encoder[i].linear1.weight for i in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["resnet20", "vgg11-bn", "wrn-10-2", "mlp"])
def test_weights_start_kaiming_normal(name: str) -> None:
    for module in models.create(name).modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() > 4000:
            fan_in = module.weight[0].numel()
            weight = module.weight.detach()
            ratio = float(weight.std() / math.sqrt(2 / fan_in))
            assert ratio == pytest.approx(1, abs=4 / math.sqrt(2 * weight.numel()))  # four standard errors
            assert weight.abs().max() > 2.5 * weight.std()  # no uniform draw reaches that


def test_same_seed_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(models.create("resnet8").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_one_field_changes_the_stem() -> None:
    changed, named = on_meta("resnet18", stem="3x3"), on_meta("resnet18-3x3")
    assert {k: v.shape for k, v in changed.state_dict().items()} == {k: v.shape for k, v in named.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet21", {}, r"Unknown model 'resnet21'. Did you mean 'resnet.*vgg16-bn.*wrn-DEPTH-WIDTH"),
        ("vgg16_bn", {}, "Did you mean 'vgg16-bn'"),
        ("resnet20", {"width": 3}, "Did you mean 'widths'"),
        ("resnet20", {"stem": "5x5"}, "Legal: 3x3, 7x7"),
        ("wrn-17-4", {}, "6n \\+ 4"),
        ("vit-tiny", {"image_size": 30}, "must divide image_size"),
        ("torchvision:resnet19", {}, "Nearest: resnet18"),
        ("torchvision:resnet18", {"in_channels": 1}, "in_channels=1"),
        ("timm:resnet19", {}, "Nearest: .*resnet18"),
        ("no_such_package.models:make", {}, "No module named 'no_such_package'"),
        ("math:no_such_factory", {}, "no attribute 'no_such_factory'"),
        ("math:pi", {}, "must name something callable"),
        ("collections:Counter", {}, "must return a torch.nn.Module, but gave Counter"),
    ],
)
def test_wrong_names_and_settings_are_explained(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.create(name, **settings)


def test_timm_gets_classes_channels_and_size() -> None:
    model = models.create("timm:vit_tiny_patch16_224", num_classes=4, in_channels=1, image_size=32)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    free = models.create("timm:resnet18", num_classes=4, in_channels=2, image_size=32)
    assert free(torch.randn(2, 2, 32, 32)).shape == (2, 4)


def test_outside_input_shapes() -> None:
    assert models.input_shape("torchvision:vgg11") == (3, 224, 224)
    assert models.input_shape("timm:vit_tiny_patch16_384") == (3, 384, 384)
    assert models.input_shape("wrn-22-2") == (3, 32, 32)
    with pytest.raises(ConfigError, match="--input-shape"):
        models.input_shape("package.module:factory")
    with pytest.raises(ConfigError, match="Unknown model"):
        models.input_shape("resnet21")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_that_cannot_be_imported(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"need {library}.*pip install 'sapwood\[vision\]'"):
        models.create(f"{library}:resnet18")


def test_factories_get_what_they_accept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def fixed(): return nn.Linear(2, 3)\n"
        "def sized(num_classes, width=5): return nn.Linear(width, num_classes)\n"
        "def anything(**kwargs): return nn.Linear(kwargs['in_channels'], kwargs['num_classes'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shapes = [
        tuple(models.create(f"own_models:{name}", num_classes=7, in_channels=4, **settings).weight.shape)
        for name, settings in (("fixed", {}), ("sized", {"width": 6}), ("anything", {}))
    ]
    assert shapes == [(3, 2), (7, 6), (7, 4)]
