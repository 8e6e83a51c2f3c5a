"""Optimal Brain Surgeon against closed forms: least squares, matrix inverses, deleting one by one."""

import pytest
import torch
from torch import nn

from nets import CLASSES, labelled, mlp
from sapwood import ConfigError, Data, FunctionalModel, Masks, ScoreError, prune
from sapwood.methods.curvature import hessian, inverse_fisher
from sapwood.methods.obs import Obs, deletion_costs, surgery


def squared(output, target):
    return (output - target).square().mean()


@pytest.fixture
def regression():
    """A linear model at its least-squares solution, and its data."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=rng, dtype=torch.float64) @ torch.randn(6, 6, generator=rng, dtype=torch.float64)
    y = torch.randn(40, 1, generator=rng, dtype=torch.float64)
    model = nn.Linear(6, 1, bias=False).double()
    model.weight.data = torch.linalg.lstsq(x, y).solution.T
    return model, x, y


def refitted(x, y, kept):
    """Least squares on the kept inputs alone: weights, and loss."""
    weights = torch.zeros(x.shape[1], dtype=x.dtype)
    weights[kept] = torch.linalg.lstsq(x[:, kept], y).solution.flatten()
    return weights, squared(x @ weights.unsqueeze(1), y)


EXACT = Obs(curvature="exact", damping=0.0)


class TestOnAQuadratic:
    def test_one_deletion_is_the_best_and_the_rest_is_the_new_optimum(self, regression):
        model, x, y = regression
        result = prune(model, method=EXACT, density=5 / 6, batches=[(x, y)], loss=squared)
        candidates = [refitted(x, y, [i for i in range(6) if i != q]) for q in range(6)]
        best = min(range(6), key=lambda q: candidates[q][1])
        assert not result.masks["weight"][0, best]
        torch.testing.assert_close(result.params["weight"][0], candidates[best][0])

    def test_costs_are_the_rise_of_the_loss(self, regression):
        model, x, y = regression
        net = FunctionalModel.of(model, loss=squared)
        inverse = EXACT.inverse(net, Masks.dense(net.weights), Data(((x, y),)))
        weights = net.weights["weight"]
        first = weights[0].square() / (2 * inverse[0].diagonal())
        before = squared(x @ weights.T, y)
        for q in range(6):
            rise = refitted(x, y, [i for i in range(6) if i != q])[1] - before
            assert first[q].item() == pytest.approx(rise.item(), rel=1e-9)

    @pytest.mark.parametrize("keep", [1, 2, 3, 4])
    def test_several_deletions_equal_greedy_refitting(self, regression, keep):
        model, x, y = regression
        kept = list(range(6))
        while len(kept) > keep:
            kept = min(([i for i in kept if i != q] for q in kept), key=lambda rest: refitted(x, y, rest)[1])
        result = prune(model, method=EXACT, density=keep / 6, batches=[(x, y)], loss=squared)
        assert result.masks["weight"][0].nonzero().flatten().tolist() == kept
        torch.testing.assert_close(result.params["weight"][0], refitted(x, y, kept)[0])

    def test_rounds_lead_to_the_same_place(self, regression):
        model, x, y = regression
        runs = [
            prune(model, method=EXACT, density=0.5, rounds=r, schedule="linear", batches=[(x, y)], loss=squared)
            for r in (1, 3)
        ]
        assert runs[0].masks == runs[1].masks and len(runs[1].history) == 3
        torch.testing.assert_close(runs[0].params["weight"], runs[1].params["weight"])

    def test_within_masks(self, regression):
        _, x, y = regression
        first = Masks({"weight": torch.tensor([[False, True, True, True, True, True]])})
        start = nn.Linear(6, 1, bias=False).double()
        start.weight.data = refitted(x, y, [1, 2, 3, 4, 5])[0].unsqueeze(0)
        result = prune(start, method=EXACT, density=0.5, batches=[(x, y)], loss=squared, within=first)
        kept = result.masks["weight"][0].nonzero().flatten().tolist()
        assert len(kept) == 3 and result.masks <= first
        torch.testing.assert_close(result.params["weight"][0], refitted(x, y, kept)[0])


@pytest.fixture
def classifier():
    model = mlp(4, 5, CLASSES, activation=nn.Tanh).double()
    return model, labelled((4,), samples=9, dtype=torch.float64)


def sample_gradients(model, batches):
    (inputs, targets), weights = batches[0], [model[0].weight, model[2].weight]
    rows = []
    for x, t in zip(inputs, targets, strict=True):
        loss = nn.functional.cross_entropy(model(x.unsqueeze(0)), t.unsqueeze(0))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


class TestCurvature:
    @pytest.mark.parametrize("width", [35, 7, 8])
    def test_recursion_equals_the_inverse_of_each_block(self, classifier, width):
        model, batches = classifier
        net = FunctionalModel.of(model)
        found = inverse_fisher(net, Masks.dense(net.weights), Data(tuple(batches)), width, 1e-3)
        g = sample_gradients(model, batches)
        fisher = g.T @ g / len(g) + 1e-3 * torch.eye(35, dtype=torch.float64)
        for block, start in zip(found, range(0, 35, width), strict=True):
            part = fisher[start : start + width, start : start + width]
            torch.testing.assert_close(block[: len(part), : len(part)], torch.linalg.inv(part), rtol=1e-8, atol=1e-8)

    def test_does_not_depend_on_how_samples_are_batched(self, classifier):
        model, [(inputs, targets)] = classifier
        net = FunctionalModel.of(model)
        split = ((inputs[:4], targets[:4]), (inputs[4:], targets[4:]))
        whole, parts = (
            inverse_fisher(net, Masks.dense(net.weights), Data(batches), 8, 1e-3)
            for batches in (((inputs, targets),), split)
        )
        torch.testing.assert_close(whole, parts)

    def test_hessian_equals_torch_func(self, classifier):
        model, batches = classifier
        (inputs, targets) = batches[0]
        net = FunctionalModel.of(model)
        flat = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()

        def loss(w):
            hidden = torch.tanh(inputs @ w[:20].view(5, 4).T + model[0].bias.detach())
            return nn.functional.cross_entropy(hidden @ w[20:].view(3, 5).T + model[2].bias.detach(), targets)

        found = hessian(net, Masks.dense(net.weights), Data(tuple(batches)))
        torch.testing.assert_close(found, torch.func.hessian(loss)(flat))

    def test_pruned_weights_stand_apart(self, classifier):
        model, batches = classifier
        net = FunctionalModel.of(model)
        masks = Masks(
            {n: torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.6 for n, w in net.weights.items()}
        )
        kept = torch.cat([m.flatten() for m in masks.values()])
        whole = hessian(net, masks, Data(tuple(batches)))
        assert torch.equal(whole[~kept], torch.eye(35, dtype=torch.float64)[~kept])
        inverse = inverse_fisher(net, masks, Data(tuple(batches)), 35, 1e-3)[0]
        assert not inverse[~kept][:, kept].any()

    def test_a_hessian_that_is_not_positive_is_refused_with_the_remedy(self, classifier):
        model, batches = classifier
        with pytest.raises(ScoreError, match="not positive definite") as caught:
            prune(model, method="obs", curvature="exact", density=0.5, batches=batches)
        damping = float(str(caught.value).split("above ")[1].split(",")[0]) * 1.01
        assert prune(model, method="obs", curvature="exact", damping=damping, density=0.5, batches=batches).params


class TestDeletion:
    @pytest.mark.parametrize("blocks", [1, 3])
    def test_costs_and_surgery_equal_one_deletion_after_the_other(self, blocks):
        rng = torch.Generator().manual_seed(0)
        root = torch.randn(blocks, 6, 9, generator=rng, dtype=torch.float64)
        matrices, weights = root @ root.mT, torch.randn(blocks, 6, generator=rng, dtype=torch.float64)
        inverse = torch.linalg.inv(matrices)
        alive = torch.ones(blocks, 6, dtype=torch.bool)
        alive[0, 2] = False
        weights[0, 2], inverse[0, 2], inverse[0, :, 2], inverse[0, 2, 2] = 0.0, 0.0, 0.0, 1.0
        costs = deletion_costs(inverse, weights, alive)
        for b in range(blocks):
            left, w, worst = [i for i in range(6) if alive[b, i]], weights[b].clone(), 0.0
            pruned = torch.zeros(blocks, 6, dtype=torch.bool)
            while left:
                sub = torch.linalg.inv(torch.linalg.inv(inverse[b])[left][:, left])
                price = w[left].square() / (2 * sub.diagonal())
                q = int(price.argmin())
                worst = max(worst, price[q].item())
                assert costs[b, left[q]].item() == pytest.approx(worst, rel=1e-9)
                w[left] -= sub[:, q] * w[left[q]] / sub[q, q]
                pruned[b, left[q]] = True
                left.pop(q)
                w[pruned[b]] = 0.0
                torch.testing.assert_close(surgery(inverse, weights, pruned)[b], w)
        order = [costs[b][alive[b]].unique().numel() for b in range(blocks)]
        assert order == [int(alive[b].sum()) for b in range(blocks)]  # no ties, so that a budget ends a sequence

    def test_blocked_equals_one_block_where_there_is_one(self, classifier):
        model, batches = classifier
        one, same, blocked = (prune(model, method="obs", density=0.4, block=b, batches=batches) for b in (0, 64, 5))
        assert one.masks == same.masks
        assert all(torch.equal(one.params[n], same.params[n]) for n in one.params)
        assert any(not torch.equal(one.params[n], blocked.params[n]) for n in one.params)

    def test_lowers_the_loss_against_pruning_without_surgery(self, classifier):
        model, batches = classifier
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]) + 1e-3 * sum(
                p.square().sum() for p in model.parameters()
            )
            loss.backward()
            return loss

        optimizer.step(closure)
        result = prune(model, method="obs", density=0.7, damping=1e-3, rounds=4, batches=batches)
        losses = []
        for params in (result.params, {n: dict(model.named_parameters())[n] for n in result.masks}):
            output = torch.func.functional_call(model, result.masks.apply(params), (batches[0][0],))
            losses.append(nn.functional.cross_entropy(output, batches[0][1]).item())
        assert losses[0] < losses[1]


def test_masks_hold_in_the_returned_weights_and_the_model_is_as_it_was(classifier):
    model, batches = classifier
    before = [p.clone() for p in model.parameters()]
    result = prune(model, method="obs", density=0.3, batches=batches)
    assert set(result.params) == set(result.masks)
    assert all(not result.params[n][~mask].any() for n, mask in result.masks.items())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"curvature": "fischer"}, "Did you mean 'fisher'"),
        ({"damping": 0.0}, "damping above 0"),
        ({"curvature": "exact", "damping": 1.0}, r"Hessian of 11,000 weights is out of reach"),
    ],
)
def test_refuses(fields, said):
    with pytest.raises(ConfigError, match=said):
        prune(mlp(100, 100, 10), method="obs", density=0.5, batches=labelled((100,)), **fields)


def test_blocks_too_large_for_memory_say_how_large():
    with pytest.raises(ConfigError, match=r"block=0 needs 12 GiB for 40,000 weights"):
        prune(nn.Linear(200, 200), method="obs", density=0.5, block=0, batches=labelled((200,)))


def test_blocks_over_pieces_at_a_time_equal_blocks_at_once(classifier, monkeypatch):
    model, batches = classifier
    runs = []
    for numbers in (2**24, 50):
        monkeypatch.setattr("sapwood.methods.obs.AT_ONCE", numbers)
        runs.append(prune(model, method="obs", density=0.4, block=5, batches=batches))
    assert runs[0].masks == runs[1].masks
    assert all(torch.equal(runs[0].params[n], runs[1].params[n]) for n in runs[0].params)
