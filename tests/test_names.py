"""Names of wrapped models: one translation, both ways, that every call which takes masks or names goes through."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

import sapwood
from nets import mlp
from sapwood import MaskError, Masks, UnsupportedModelError, fingerprint, ntk, prunable, prune
from sapwood.diagnosis import diagnose, effective
from sapwood.masks import clean_name
from sapwood.names import Names, unwrapped


def compiled(model: nn.Module) -> nn.Module:
    twice = type(model).__name__ == "OptimizedModule"  # of which torch.compile gives back a bare function
    return model if twice else torch.compile(model, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "average": AveragedModel,
    "checkpoint": checkpoint_wrapper,
    "offload": offload_wrapper,
    "data parallel": nn.DataParallel,
}


class Nest(nn.Module):
    """A chain of its children, whose names may be those that wrappers use."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = torch.relu(child(x))
        return x


NAMES = ["module", "_orig_mod", "_forward_module", "_checkpoint_wrapped_module", "fc", "0", "n_averaged"]


@st.composite
def trees(draw, depth: int = 3):
    """Wrappers from the inside out, and the children by name; None: a linear layer."""
    wrappers = draw(st.lists(st.sampled_from(list(WRAPPERS)), max_size=2))
    if depth < 3 and (depth == 0 or draw(st.booleans())):
        return wrappers, None
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
    return wrappers, {name: draw(trees(depth - 1)) for name in names}


def build(tree, wrap: bool) -> nn.Module:
    wrappers, children = tree
    if children is None:
        module: nn.Module = nn.Linear(3, 3)
    else:
        module = Nest({name: build(child, wrap) for name, child in children.items()})
    for kind in wrappers if wrap else ():
        module = WRAPPERS[kind](module)
    return module


def twins(tree) -> tuple[nn.Module, nn.Module]:
    """The same network bare and wrapped, of equal weights."""
    plain, model = build(tree, wrap=False), build(tree, wrap=True)
    with torch.no_grad():
        for own, other in zip(plain.parameters(), model.parameters(), strict=True):
            other.copy_(own)
    return plain, model


@pytest.mark.trap(68)
@settings(max_examples=150, deadline=None)
@given(trees())
def test_any_nest_of_wrappers_has_the_names_of_the_bare_model(tree):
    plain, model = twins(tree)
    names = Names.of(model)
    bare = dict(plain.named_parameters())
    assert list(names.parameters) == list(bare)
    assert len(set(names.raw.values())) == len(names.raw)
    for name, parameter in names.parameters.items():
        assert model.get_parameter(names.raw[name]) is parameter
    assert names.translated([names.raw[name] for name in bare]) == {names.raw[name]: name for name in bare}
    assert names.translated(bare) == {name: name for name in bare}
    assert fingerprint(names.parameters) == fingerprint(bare)


@pytest.mark.trap(68)
@settings(max_examples=60, deadline=None)
@given(trees(), st.integers(0, 100))
def test_every_call_that_takes_masks_sees_through_any_nest(tree, seed):
    plain, model = twins(tree)
    options = {"method": "magnitude", "density": 0.5}
    masks = prune(plain, **options).masks
    result = prune(model, **options, within=masks)
    assert result.masks == masks and result.masks.provenance["fingerprint"] == masks.provenance["fingerprint"]
    assert list(prunable(model)) == list(masks)
    first = next(iter(Names.of(model).raw.values()))  # torch's name of it
    if len(masks) > 1 and first not in list(masks)[1:]:  # else it is another weight's name without wrappers, too
        assert list(prunable(model, exclude=first)) == list(masks)[1:]

    shared = {"input_shape": (3,)}
    assert effective(model, masks, **shared) == effective(plain, masks, **shared)
    assert Names.of(model).fit(masks) == masks == Names.of(plain).fit(result.masks)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ntk.kernel(model, x, masks), ntk.kernel(plain, x, masks))

    result.load_into(model)
    for name, parameter in Names.of(model).parameters.items():
        if name in masks:
            assert not parameter[~masks[name]].any()
    assert sapwood.from_torch_prune(sapwood.to_torch_prune(masks, model)) == masks


class OwnNames(nn.Module):
    """Modules of the user's that are called as wrappers call theirs."""

    def __init__(self, wrap=lambda module: module) -> None:
        super().__init__()
        self.module, self._orig_mod, self.fc = wrap(nn.Linear(4, 6)), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self._orig_mod(torch.relu(self.module(x)))))


@pytest.mark.trap(69)
def test_a_users_own_module_keeps_its_name():
    model = OwnNames()
    expected = ["module.weight", "_orig_mod.weight", "fc.weight"]
    assert list(prune(model, method="random", density=0.5).masks) == expected
    assert list(prunable(nn.DataParallel(model))) == expected
    assert unwrapped(model) is model and unwrapped(compiled(AveragedModel(nn.DataParallel(model)))) is not model


@pytest.mark.trap(69)
def test_a_subclass_that_computes_is_no_wrapper():
    class Scaled(nn.DataParallel):
        def forward(self, x):
            return 2 * self.module(x)

    model = Scaled(nn.Linear(4, 3))
    assert unwrapped(model) is model and list(prunable(model)) == ["module.weight"]


@pytest.mark.trap(69)
def test_names_that_would_collide_are_refused_with_both():
    model = nn.Sequential()
    model.add_module("a", nn.Sequential())
    model.a.add_module("b", nn.Linear(2, 2))
    model._modules["a.b"] = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"'a\.b\.weight' and 'a\.b\.weight'"):
        Names.of(model)

    both = {"module.fc.weight": torch.zeros(2, 2), "fc.weight": torch.zeros(2, 2), "x": torch.zeros(1)}
    own = Masks.dense({"_orig_mod.fc.weight": torch.zeros(2, 2)})
    with pytest.raises(MaskError, match=r"'module\.fc\.weight' and 'fc\.weight'"):
        own.check(both)
    with pytest.raises(MaskError, match=r"'module\.fc\.weight' and 'fc\.weight' are both"):
        Masks.dense({name: both[name] for name in list(both)[:2]}).check({"fc.weight": torch.zeros(2, 2)})
    Masks.dense({"fc.weight": torch.zeros(2, 2)}).check(both)  # its own name is there


@pytest.mark.trap(69)
def test_masks_apply_under_raw_names_or_say_that_they_cannot():
    params = {"body._orig_mod.weight": torch.ones(2), "fc.bias": torch.ones(1)}
    masks = Masks({"body.weight": torch.tensor([True, False])})
    assert masks.apply(params)["body._orig_mod.weight"].tolist() == [1, 0]
    with pytest.raises(MaskError, match=r"no parameter 'body\.weight'"):
        masks.apply({"fc.bias": torch.ones(1)})
    raw = Masks({"body._orig_mod.weight": torch.tensor([False, True])})
    assert (masks & raw)["body.weight"].tolist() == [False, False]


def as_former_versions_wrote(model: nn.Module) -> Masks:
    """Names were cleaned word by word, and the fingerprint is of torch's own names."""
    named = dict(model.named_parameters())
    keep = {clean_name(name): torch.rand(p.shape) < 0.5 for name, p in named.items() if p.dim() > 1}
    return Masks(keep, {"fingerprint": fingerprint(named)})


@pytest.mark.trap(69)
@pytest.mark.parametrize("wrap", [lambda m: m, *WRAPPERS.values()], ids=["bare", *WRAPPERS])
def test_files_of_former_versions_are_accepted(wrap, tmp_path):
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    models = [plain, wrap(plain), OwnNames(), OwnNames(wrap), nn.Sequential(wrap(nn.Linear(4, 3)), nn.Linear(3, 3))]
    for model in models[:2] + models[4:]:
        as_former_versions_wrote(model).save(tmp_path / "masks")
        old = Masks.load(tmp_path / "masks")
        fitted = Names.of(model).fit(old)
        assert list(fitted) == list(prunable(model))
        assert all(torch.equal(a, b) for a, b in zip(fitted.values(), old.values(), strict=True))


@pytest.mark.trap(69)
def test_a_former_file_of_a_module_called_module_is_read():
    model = nn.Sequential()
    model.add_module("module", nn.Linear(4, 3))
    old = as_former_versions_wrote(model)
    assert list(old) == ["weight"] and list(Names.of(model).fit(old)) == ["module.weight"]


def test_an_unknown_wrapper_takes_the_masks_of_what_it_holds():
    class Shadow(nn.Module):  # as timm's and many others' averages of weights
        def __init__(self, model):
            super().__init__()
            self.module = model

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    model = mlp(4, 6, 3)
    result = prune(model, method="random", density=0.5)
    result.load_into(Shadow(model))
    assert all(not p[~result.masks[n]].any() for n, p in model.named_parameters() if n in result.masks)
    assert Names.of(model).fit(prune(Shadow(model), method="random", density=0.5).masks) == result.masks


def test_densities_by_name_and_masks_to_be_like_may_have_raw_names():
    model = nn.Sequential(compiled(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))
    shares = {"0._orig_mod.weight": 0.25, "2.weight": 0.75}
    found = prune(model, method="random", density=0.5, allocation=shares).masks
    like = prune(model, method="random", allocation=Masks({f"module.{n}": m for n, m in found.items()})).masks
    assert like.per_layer() == found.per_layer()
    within = Masks({f"module.{name}": mask for name, mask in found.items()})
    assert prune(model, method="random", density=0.1, within=within).masks <= found


def test_tied_weights_may_be_named_by_any_owner():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    mask = torch.rand(3, 3) < 0.5
    names = Names.of(model)
    assert list(names.fit(Masks({"2.weight": mask}))) == ["0.weight"]
    assert names.fit(Masks({"0.weight": mask, "2.weight": mask})).total == 9
    with pytest.raises(MaskError, match=r"'0\.weight' and '2\.weight' are one tied weight"):
        names.fit(Masks({"0.weight": mask, "2.weight": ~mask}))


@pytest.mark.trap(69)
def test_attach_and_imp_take_the_masks_of_modules_with_names_of_wrappers():
    model = OwnNames(AveragedModel)
    masks = prune(model, method="random", density=0.5).masks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with sapwood.attach(masks, model, optimizer):
        for _ in range(2):
            model(torch.randn(4, 4)).sum().backward()
            optimizer.step()
    sapwood.assert_masked(model, masks)

    result = sapwood.imp(model, train=lambda copy, masks: None, density=0.25, levels=1, rewind=False)
    result.load_into(nn.DataParallel(model))
    sapwood.assert_masked(model, result.masks)


@contextlib.contextmanager
def alone(folder):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(module, *, use_orig_params=True):
    """FSDP1 on one process, of which torch warns that it shards nothing."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


@pytest.mark.trap(68)
@pytest.mark.parametrize("where", ["whole", "part"])
def test_wrappers_of_distributed_training(where, tmp_path):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    with alone(tmp_path):
        for wrap in (nn.parallel.DistributedDataParallel, fabric.setup_module, sharded):
            torch.manual_seed(0)
            plain = OwnNames()
            torch.manual_seed(0)
            model = wrap(OwnNames()) if where == "whole" else OwnNames(wrap)
            options = {"method": "ntk-sap", "density": 0.5, "input_shape": (4,), "rounds": 2, "samples": 8}
            result = prune(model, **options)
            assert result.masks == prune(plain, **options).masks
            assert diagnose(model, result.masks, input_shape=(4,)).sparsity == pytest.approx(
                diagnose(plain, result.masks, input_shape=(4,)).sparsity
            )
            result.load_into(model)
            assert not Names.of(model).parameters["module.weight"][~result.masks["module.weight"]].any()


@pytest.mark.trap(68)
def test_shards_are_refused_by_name_with_the_way_out(tmp_path):
    masks = prune(mlp(4, 6, 3), method="random", density=0.5).masks
    with alone(tmp_path):
        model = sharded(mlp(4, 6, 3), use_orig_params=False)
        for call in (lambda: prune(model, method="random", density=0.5), lambda: Names.of(model).fit(masks)):
            with pytest.raises(UnsupportedModelError, match=r"'0\.weight' is sharded .*summon_full_params"):
                call()
        with pytest.raises(UnsupportedModelError, match="convert the model before"):
            sapwood.to_torch_prune(masks, sharded(mlp(4, 6, 3)))
        with warnings.catch_warnings(), type(model).summon_full_params(model):
            assert Names.of(model).fit(masks) == masks
