"""ProsPr against unrolled training written out, finite differences of the final loss, and SNIP."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import CLASSES, labelled, mlp
from sapwood import ConfigError, FunctionalModel, Masks, Snip, prune
from sapwood.criteria import ProsPr
from sapwood.criteria.channels import pooled
from scoring import data, flat, generator, random_masks

LR = 0.3


@pytest.fixture
def smooth() -> nn.Module:
    return mlp(4, 5, CLASSES, activation=nn.Tanh).double()


@pytest.fixture
def batches() -> list:
    (inputs, targets), *_ = labelled((4,), samples=12, dtype=torch.float64)
    return [(inputs[i : i + 3], targets[i : i + 3]) for i in range(0, 12, 3)]


def final_loss(model, gates, batches, *, steps, momentum=0.0):
    """The loss after SGD steps of every parameter from gated weights, by torch's own optimizer, without a graph."""
    params = [p.detach().clone() for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]
    params = [nn.Parameter(p * gates[n] if n in gates else p) for n, p in zip(names, params, strict=True)]
    sgd = torch.optim.SGD(params, lr=LR, momentum=momentum)
    order = itertools.cycle(batches)

    def loss():
        inputs, targets = next(order)
        outputs = torch.func.functional_call(model, dict(zip(names, params, strict=True)), (inputs,))
        return F.cross_entropy(outputs, targets)

    for _ in range(steps):
        sgd.zero_grad()
        loss().backward()
        sgd.step()
    return loss().item()


@pytest.mark.parametrize(("steps", "momentum"), [(0, 0.0), (1, 0.0), (3, 0.0), (3, 0.9), (5, 0.5)])
def test_equals_finite_differences_of_the_loss_after_training(smooth, batches, steps, momentum):
    net = FunctionalModel.of(smooth)
    scores = ProsPr(steps=steps, lr=LR, momentum=momentum)(net, Masks.dense(net.weights), data(batches), generator())
    step = 1e-5
    for name in net.prunable:
        for j in range(net.weights[name].numel()):
            losses = []
            for sign in (1, -1):
                gates = {n: torch.ones_like(w) for n, w in net.weights.items()}
                gates[name].view(-1)[j] += sign * step
                losses.append(final_loss(smooth, gates, batches, steps=steps, momentum=momentum))
            expected = abs(losses[0] - losses[1]) / (2 * step)
            assert scores[name].view(-1)[j].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_first_order_takes_the_steps_for_constants(smooth, batches):
    """|w dL/dw| at the weights that torch's own training arrives at."""
    net = FunctionalModel.of(smooth)
    masks = random_masks(net)
    scores = ProsPr(steps=2, lr=LR, first_order=True)(net, masks, data(batches), generator())
    params = {n: p.detach().clone() for n, p in smooth.named_parameters()}
    params |= {n: params[n] * masks[n] for n in masks}
    for i, (inputs, targets) in enumerate(batches[:3]):

        def loss(values, inputs=inputs, targets=targets):
            return F.cross_entropy(torch.func.functional_call(smooth, values, (inputs,)), targets)

        gradient = torch.func.grad(loss)(params)
        if i < 2:
            params = {n: p - LR * gradient[n] * masks.get(n, torch.tensor(True)) for n, p in params.items()}
    for name, weight in net.weights.items():
        torch.testing.assert_close(scores[name], (weight * gradient[name] * masks[name]).abs())
    exact = ProsPr(steps=2, lr=LR)(net, masks, data(batches), generator())
    assert not torch.allclose(flat(exact), flat(scores))


def test_without_steps_it_is_snip(smooth, batches):
    net = FunctionalModel.of(smooth)
    dense = Masks.dense(net.weights)
    scores = ProsPr(steps=0)(net, dense, data(batches), generator())
    snip = Snip()(net, dense, data(batches[:1]), generator())
    torch.testing.assert_close(flat(scores), flat(snip) / len(batches[0][0]))


def test_every_step_sees_a_fresh_batch_and_few_are_cycled(smooth, batches):
    net = FunctionalModel.of(smooth)

    def score(given):
        return flat(ProsPr(steps=3, lr=LR)(net, Masks.dense(net.weights), data(given), generator()))

    assert not torch.allclose(score(batches), score([*batches[:3], batches[0]]))
    assert torch.equal(score(batches[:2]), score([*batches[:2], *batches[:2]]))


def test_channels_fall_whole_up_to_the_one_in_which_the_budget_ends(batches):
    model = mlp(4, 8, 8, CLASSES).double()
    masks = prune(model, method="prospr", density=0.4, structure="channels", batches=batches).masks
    assert masks.kept == round(0.4 * masks.total)
    partial = [name for name, mask in masks.items() for row in mask if 0 < row.sum() < row.numel()]
    assert len(partial) <= 1
    net = FunctionalModel.of(model)
    dense = Masks.dense(net.weights)
    channels = ProsPr(structure="channels")(net, dense, data(batches), generator())
    weights = ProsPr()(net, dense, data(batches), generator())
    for name, score in channels.items():
        assert torch.equal(score, score[:, :1].expand_as(score))
        assert (score[:, 0] <= weights[name].sum(1) + 1e-12).all()  # signs cancel inside a channel


def test_channel_score_is_the_derivative_in_a_mask_of_channels(smooth, batches):
    net = FunctionalModel.of(smooth)
    scores = ProsPr(lr=LR, structure="channels")(net, Masks.dense(net.weights), data(batches), generator())
    step = 1e-5
    for row in range(5):
        losses = []
        for sign in (1, -1):
            gates = {n: torch.ones_like(w) for n, w in net.weights.items()}
            gates["0.weight"][row] += sign * step
            losses.append(final_loss(smooth, gates, batches, steps=3))
        expected = abs(losses[0] - losses[1]) / (2 * step)
        assert scores["0.weight"][row, 0].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(4, 6), False),
        (nn.Conv2d(4, 6, 3, groups=2), False),
        (nn.Conv2d(4, 6, 3, groups=2), True),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), False),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), True),
        (nn.Conv1d(6, 6, 3, groups=6), True),
    ],
)
def test_pooling_knows_the_channels_of_every_layer(layer, inputs):
    """A gate on each channel, written with the layer itself, has the pooled products for its gradient."""
    torch.manual_seed(0)
    layer = layer.double()
    channels = layer.weight.shape[1] if isinstance(layer, nn.Linear) else layer.in_channels
    x = torch.randn(2, channels, *[5] * (layer.weight.dim() - 2), dtype=torch.float64)
    if not isinstance(layer, nn.Linear):
        x = x.requires_grad_()
    output = layer(x)
    size = channels if inputs else output.shape[1]
    gate = torch.ones(size, *[1] * (x.dim() - 2), dtype=torch.float64, requires_grad=True)
    bias = 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (x.dim() - 2))
    gated = layer(x * gate) if inputs else (output - bias) * gate + bias
    loss = gated.sin().sum()
    weight, expected = torch.autograd.grad(loss, (layer.weight, gate))
    net = FunctionalModel.of(layer)
    found = pooled(net, {"weight": layer.weight.detach() * weight}, inputs=inputs)["weight"]
    groups = getattr(layer, "groups", 1)
    outputs = output.shape[1]
    for index in itertools.product(*map(range, found.shape)):
        if isinstance(layer, nn.ConvTranspose2d):
            source, target = index[0], index[0] // (channels // groups) * (outputs // groups) + index[1]
        else:
            source, target = index[0] // (outputs // groups) * (channels // groups) + index[1], index[0]
        torch.testing.assert_close(found[index], expected.flatten()[source if inputs else target])


def test_bad_fields_are_refused():
    for fields, message in [
        ({"steps": -1}, "steps is -1"),
        ({"lr": 0.0}, "lr is 0"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"structure": "channel"}, "Did you mean 'channels'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ProsPr(**fields)
