"""Ways of updating weights that go past an optimizer's `step()`: each is covered, or refused in a sentence."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

import sapwood
from optimizers import Accelerated, ListedLookahead, Sam, Whitened, everything
from sapwood import Masks, attach
from sapwood.errors import MaskError


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def random_masks(model: nn.Module, density: float = 0.5) -> Masks:
    return Masks({n: torch.rand(p.shape) < density for n, p in model.named_parameters() if p.dim() > 1})


def alive(model: nn.Module, masks: Masks) -> int:
    parameters = dict(model.named_parameters())
    return sum(int((parameters[name][~mask] != 0).sum()) for name, mask in masks.items())


def backward(model: nn.Module) -> None:
    F.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 3, (8,))).backward()


def write(model: nn.Module) -> None:
    """On every weight, and so that autograd sees nothing."""
    for parameter in model.parameters():
        parameter.data.add_(1.0)


@pytest.fixture
def attached():
    model = net()
    masks = random_masks(model)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, masks, optimizer, attach(masks, model, optimizer)


# Optimizers.


@pytest.mark.trap(48)
def test_two_phases() -> None:
    model = net()
    masks = random_masks(model)
    optimizer = Sam(model.parameters())
    attach(masks, model, optimizer)
    for move in (optimizer.first_step, optimizer.second_step) * 3:
        backward(model)
        move()
        assert alive(model, masks) == 0


@pytest.mark.trap(49)
@pytest.mark.parametrize("is_held", [False, True])
def test_a_layer_that_is_unfrozen_later(is_held: bool) -> None:
    model = net()
    masks = random_masks(model)
    model[0].requires_grad_(False)
    optimizer = SGD(model.parameters() if is_held else model[2].parameters(), lr=0.1, momentum=0.9)
    attach(masks, model, optimizer)
    backward(model)
    optimizer.step()
    model[0].requires_grad_(True)
    if not is_held:
        optimizer.add_param_group({"params": list(model[0].parameters())})
    before = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        assert (model[0].weight.grad[~masks["0.weight"]] == 0).all()
        optimizer.step()
        assert alive(model, masks) == 0
    assert not torch.equal(model[0].weight, before)


@pytest.mark.trap(49)
def test_an_optimizer_that_is_built_after_attach(attached) -> None:
    model, masks, *_ = attached
    optimizer = Whitened(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        for parameter in model.parameters():
            parameter.grad.add_(1.0)
        optimizer.step()
        assert alive(model, masks) == 0


@pytest.mark.trap(50)
@pytest.mark.parametrize("wrap", [Accelerated, ListedLookahead, lambda o: Accelerated(ListedLookahead(o))])
def test_wrappers_without_hooks(wrap) -> None:
    model = net()
    masks = random_masks(model)
    inner = AdamW(model.parameters(), lr=0.05)
    optimizer = wrap(inner)
    for _ in range(3):  # dense steps: moments and slow copies are of all weights
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    attach(masks, model, optimizer)
    assert all((inner.state[model.get_parameter(n)]["exp_avg"][~m] == 0).all() for n, m in masks.items())
    for _ in range(4):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert alive(model, masks) == 0


@pytest.mark.trap(50)
def test_a_scheduler_and_a_wrapper_know_of_each_other() -> None:
    model = net()
    masks = random_masks(model)
    optimizer = SGD(model.parameters(), lr=1.0)
    wrapper = pytest.importorskip("timm.optim").Lookahead(optimizer, k=1)
    before = torch.optim.lr_scheduler.StepLR(wrapper, 1)
    for _ in range(2):
        attach(masks, model, wrapper)
    after = torch.optim.lr_scheduler.StepLR(wrapper, 1)
    for _ in range(2):
        wrapper.zero_grad()
        backward(model)
        wrapper.step()
        before.step()
        after.step()
        assert alive(model, masks) == 0
    assert wrapper.param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.trap(50)
def test_a_state_that_is_loaded_later_revives_nothing(attached) -> None:
    model, masks, optimizer, _ = attached
    dense = net()
    other = SGD(dense.parameters(), lr=0.1, momentum=0.9)
    backward(dense)
    other.step()
    optimizer.load_state_dict(other.state_dict())
    optimizer.step()
    for name, mask in masks.items():
        assert (optimizer.state[model.get_parameter(name)]["momentum_buffer"][~mask] == 0).all()
    assert alive(model, masks) == 0


@pytest.mark.trap(50)
def test_a_preconditioner_of_a_square_weight_is_no_momentum() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    masks = random_masks(model)
    optimizer = Whitened(model.parameters())
    momentum = SGD(model.parameters(), lr=0.1, momentum=0.9)
    backward(model)
    optimizer.step()
    momentum.step()
    before = optimizer.state[model[0].weight]["rows"].clone()
    attach(masks, model, [optimizer, momentum])
    assert torch.equal(optimizer.state[model[0].weight]["rows"], before)
    assert (momentum.state[model[0].weight]["momentum_buffer"][~masks["0.weight"]] == 0).all()


def test_codes_of_a_quantised_state_are_left_alone() -> None:
    model = nn.Linear(4, 4)
    optimizer = SGD(model.parameters(), lr=0.1)
    codes = torch.full((4, 4), 7, dtype=torch.uint8)
    optimizer.state[model.weight]["codes"] = codes
    attach(random_masks(model), model, optimizer)
    assert (codes == 7).all()


@pytest.mark.trap(51)
def test_an_optimizer_inside_of_the_backward_pass(attached) -> None:
    model, masks, *_ = attached
    optimizers = {p: SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def step(parameter) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        backward(model)
        assert alive(model, masks) == 0


@pytest.mark.trap(51)
@pytest.mark.parametrize("mode", [{"sparse": True}, {"sparse": False}])
def test_sparse_gradients(mode) -> None:
    model = nn.Embedding(10, 4, **mode)
    masks = random_masks(model)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1) if mode["sparse"] else SGD(model.parameters(), 0.1)
    attach(masks, model, optimizer)
    words = torch.tensor([1, 1, 2, 5])
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            model(words).square().sum().backward()
        gradient = model.weight.grad.to_dense()
        expected = 2 * model.weight.detach() * masks["weight"] * torch.tensor([0, 2, 1, 0, 0, 1, 0, 0, 0, 0])[:, None]
        torch.testing.assert_close(gradient, 2 * expected)
        optimizer.step()
        assert alive(model, masks) == 0
    if mode["sparse"]:  # by hand: nothing masks it before the step
        model.weight.grad = torch.sparse_coo_tensor(
            torch.tensor([[1, 1, 2]]), torch.full((3, 4), torch.nan), (10, 4), check_invariants=True
        )
        optimizer.step()
        assert (model.weight[~masks["weight"]] == 0).all()


@pytest.mark.trap(51)
def test_gradients_that_nobody_accumulates(attached) -> None:
    """`autograd.grad`, many gradients at once, and gradients of gradients: pruned entries are zero, kept ones right."""
    model, masks, *_ = attached
    plain = net()
    plain.load_state_dict(model.state_dict())
    inputs = torch.randn(2, 8)
    for options in ({"grad_outputs": torch.eye(3), "is_grads_batched": True}, {"grad_outputs": torch.ones(3)}):
        found, expected = (torch.autograd.grad(m(inputs).sum(0), [m[0].weight], **options)[0] for m in (model, plain))
        torch.testing.assert_close(found, expected * masks["0.weight"])

    penalties = []
    for each in (model, plain):
        (gradient,) = torch.autograd.grad(each(inputs).square().sum(), [each[0].weight], create_graph=True)
        mask = masks["0.weight"] if each is plain else 1
        penalties.append(torch.autograd.grad((gradient * mask).square().sum(), [each[0].weight])[0])
    torch.testing.assert_close(penalties[0], penalties[1] * masks["0.weight"])


# Forward passes.


@pytest.mark.trap(52)
def test_every_forward_sees_zeros(attached) -> None:
    """The whole, a part, a layer; in training, evaluation and inference; under torch.func and checkpoints."""
    model, masks, *_ = attached
    inputs = torch.randn(2, 8)
    expected = model(inputs)

    def check(run) -> None:
        dirty = {n: p.detach().clone() for n, p in model.named_parameters()}
        write(model)
        for name, mask in masks.items():  # only pruned weights are wrong
            model.get_parameter(name).data[mask] = dirty[name][mask]
        for name in ("0.bias", "2.bias"):
            model.get_parameter(name).data.copy_(dirty[name])
        torch.testing.assert_close(run(), expected, msg=str(run))
        assert alive(model, masks) == 0

    check(lambda: model(inputs))
    check(lambda: model.eval()(inputs))
    check(lambda: model.train()[2](model[1](model[0](inputs))))
    check(lambda: torch.func.vmap(model)(inputs))
    check(lambda: torch.func.vjp(model, inputs)[0])
    check(lambda: torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False))
    check(lambda: nn.DataParallel(model)(inputs))
    with torch.inference_mode():
        check(lambda: model(inputs))
    with torch.no_grad():
        check(lambda: model(inputs))


@pytest.mark.trap(52)
def test_a_weight_that_is_read_without_calling_its_module() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model = nn.Sequential(Part(), nn.Linear(8, 3))
    masks = random_masks(model)
    attach(masks, model, None)
    for call in (model, model[0], model[0].attention):
        write(model)
        inputs = torch.randn(1, 2, 8)
        call(inputs, inputs, inputs) if call is model[0].attention else call(inputs)
        assert (model[0].attention.out_proj.weight[~masks["0.attention.out_proj.weight"]] == 0).all()


@pytest.mark.trap(52)
def test_forward_passes_that_raise_or_precede_each_other(attached) -> None:
    model, masks, *_ = attached
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 9))
    write(model)
    model[0](torch.randn(2, 8))  # alone, although the last call of the whole did not end
    assert (model[0].weight[~masks["0.weight"]] == 0).all()
    versions = [p._version for p in model.parameters()]
    (model(torch.randn(2, 8)) * model(torch.randn(2, 8))).sum().backward()  # the second does not spoil the first
    assert [p._version for p in model.parameters()] == versions


def test_tensors_of_the_caller_are_not_written_to(attached) -> None:
    model, *_ = attached
    lent = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    torch.func.functional_call(model, lent, (torch.randn(2, 8),))
    assert all((value == 1).all() for value in lent.values())


@pytest.mark.parametrize("method", ["ntk-sap", "ntk-sap-analytic", "synflow", "snip", "grasp", "magnitude"])
def test_an_attached_model_is_pruned_like_any_other(attached, method: str) -> None:
    model, *_ = attached
    plain = net()
    plain.load_state_dict(model.state_dict())
    batches = [(torch.randn(8, 8), torch.arange(8) % 3)]
    options = {"method": method, "density": 0.3, "batches": batches, "input_shape": (8,)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sapwood.SapwoodWarning)
        assert sapwood.prune(model, **options).masks == sapwood.prune(plain, **options).masks


@pytest.mark.trap(53)
@pytest.mark.parametrize("how", ["compiled first", "compiled later", "compiled in place"])
def test_what_a_compiled_forward_may_have_seen(how: str) -> None:
    model = net()
    masks = random_masks(model)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if how == "compiled first" else model
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    attachment = attach(masks, run, optimizer)
    if how == "compiled later":
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    if how == "compiled in place":
        model.compile(backend="aot_eager", fullgraph=True)

    def train() -> None:
        optimizer.zero_grad()
        (run(torch.randn(2, 8)).sum() + run(torch.randn(2, 8)).square().sum()).backward()
        assert all((model.get_parameter(n).grad[~m] == 0).all() for n, m in masks.items())
        optimizer.step()
        assert alive(model, masks) == 0

    train()
    model.load_state_dict(net().state_dict())
    if how == "compiled first":  # then a hook runs before it
        train()
        run(torch.randn(2, 8)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        optimizer.step()
        assert alive(model, masks) == 0
        return
    with pytest.raises(MaskError, match=r"'0\.weight' were written outside of an optimizer's step"):
        train()
    attachment.apply()
    train()


# What is handed to attach.


def test_a_result_brings_its_masks_and_its_weights() -> None:
    model = net()
    result = sapwood.prune(model, method="magnitude", density=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    attach(result, model, SGD(model.parameters(), lr=0.1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * result.masks.get(name, 1))
    ones = dataclasses.replace(result, params={n: torch.ones_like(p) for n, p in model.named_parameters()})
    attach(ones, model, SGD(model.parameters(), lr=0.1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.ones_like(parameter) * result.masks.get(name, 1))


def test_what_is_no_mask_and_no_optimizer_is_refused() -> None:
    model = net()
    masks = random_masks(model)
    with pytest.raises(MaskError, match=r"attach takes Masks or a result of prune, and got dict; sapwood\.Masks"):
        attach(dict(masks), model, SGD(model.parameters(), lr=0.1))
    for given in (42, [model], model.parameters()):
        with pytest.raises(MaskError, match=r"attach takes optimizers, which have .*, and got \w+; .* pass None"):
            attach(masks, model, given)
    with pytest.raises(MaskError, match="2 masked parameters that require grad are in no optimizer"):
        attach(masks, model, [])
    assert alive(model, masks) > 0 and not model._forward_pre_hooks


def test_nothing_to_train_and_nothing_masked() -> None:
    model = net()
    masks = random_masks(model)
    attach(masks, model.requires_grad_(False), [])
    write(model)
    model(torch.randn(2, 8))
    assert alive(model, masks) == 0 and not any(p.requires_grad for p in model.parameters())
    with attach(Masks({}), net(), []) as nothing:
        nothing.apply()


def test_weights_that_are_updated_by_hand() -> None:
    model = net()
    masks = random_masks(model)
    with attach(masks, model, None) as attachment:
        for _ in range(3):
            backward(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad + 0.01
            model(torch.randn(2, 8))
            assert alive(model, masks) == 0
        for assign in (False, True):
            model.load_state_dict(net().state_dict(), assign=assign)
            attachment.apply()
            assert alive(model, masks) == 0


@pytest.mark.trap(54)
def test_a_second_attach_replaces_the_masks_that_it_names(attached) -> None:
    model, masks, optimizer, first = attached
    others = Masks({"0.weight": ~masks["0.weight"]})
    second = attach(others, model, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    assert alive(model, others) == 0
    assert (model[0].weight[others["0.weight"]] != 0).float().mean() > 0.7  # those of the first are free
    assert (model[2].weight[~masks["2.weight"]] == 0).all()  # and where it alone has masks, it holds
    with pytest.raises(MaskError, match=r"'0\.weight' was attached to other masks since"):
        first.finalize()
    first.remove()
    write(model)
    model(torch.randn(2, 8))
    assert alive(model, others) == 0 and (model[2].weight != 0).all()
    second.remove()
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._state_dict_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0 and not any(p._backward_hooks for p in model.parameters())


@pytest.mark.trap(54)
def test_a_weight_that_another_model_holds() -> None:
    one, other = net(), net()
    attachment = attach(random_masks(one), one, None)
    other[0].weight = one[0].weight
    with pytest.raises(MaskError, match=r"'0\.weight' is shared with another model, .* remove\(\)"):
        attach(random_masks(other), other, None)
    attachment.remove()
    attach(random_masks(other), other, None)


@pytest.mark.trap(54)
def test_two_models_share_a_backbone() -> None:
    backbone = nn.Linear(8, 8)
    one, other = nn.Sequential(backbone, nn.Linear(8, 3)), nn.Sequential(backbone, nn.Linear(8, 2))
    first, second = random_masks(one), random_masks(other)
    attach(first, one, None)
    attach(second, other, None)
    write(one)
    one(torch.randn(2, 8))
    assert (backbone.weight[~second["0.weight"]] == 0).all()
    assert (one[1].weight[~first["1.weight"]] == 0).all()


def test_all_of_an_optimizer_is_found() -> None:
    model = net()
    wrapped = Accelerated(ListedLookahead(SGD(model[2].parameters(), lr=0.1)))
    optimizer = type("Both", (), {"both": [SGD(model[0].parameters(), lr=0.1), wrapped], "step": None})()
    with pytest.raises(MaskError, match="got Both"):
        attach(random_masks(model), model, optimizer)
    attach(random_masks(model), model, [optimizer.both[0], wrapped])
    assert len(everything(wrapped)) == 2
