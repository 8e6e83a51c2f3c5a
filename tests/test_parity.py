"""Scores beside those of the authors' code: explicit weights and inputs, and what that code made of them.

The vectors in `tests/parity` were written by the authors' own files, unmodified unless a vector says otherwise, in
float64 and with six digits (`tests/parity/README.md` names repositories and commits).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets import mlp
from sapwood import (
    PX,
    FunctionalModel,
    Grasp,
    Masks,
    NtkSap,
    Ntt,
    ProsPr,
    Snip,
    SynFlow,
    SynFlowL2,
    Taylor,
    prune,
)
from sapwood.methods.ntt import Student
from sapwood.models import create
from scoring import data, generator

FOLDER = Path(__file__).parent / "parity"


def vector(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Normed(nn.Module):
    """Net B of the vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.head = nn.Linear(27, 2)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.conv(x))).flatten(1))


def net_of(case: Mapping, **options) -> FunctionalModel:
    """Net A or B with the weights of a vector."""
    model = (mlp(4, 3, 2, bias=False) if "0.weight" in case["weights"] else Normed()).double()
    model.load_state_dict({n: tensor(w) for n, w in case["weights"].items()}, strict=False)
    return FunctionalModel.of(model, **options)


def batch_of(case: Mapping) -> tuple[Tensor, Tensor]:
    return tensor(case["input"]), torch.tensor(case["target"])


def rolled(case: Mapping) -> list[tuple[Tensor, Tensor]]:
    """The four batches of ProsPr and Taylor."""
    inputs, targets = batch_of(case)
    return [(inputs + 0.1 * i, torch.roll(targets, i)) for i in range(4)]


def scores_of(criterion: Callable, net: FunctionalModel, batches: list) -> dict[str, Tensor]:
    return criterion(net, Masks.dense(net.weights), data(batches), generator())


def equal(found: Mapping[str, Tensor], expected: Mapping[str, list], *, normalised: bool = False) -> None:
    """Up to the six digits that a vector has; names differ where a layer is called otherwise there."""
    total = sum(score.abs().sum() for score in found.values()) if normalised else 1.0
    largest = max(tensor(values).abs().max() for values in expected.values())
    for score, values in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(score / total, tensor(values), rtol=1e-5, atol=1e-9 * largest.item())


BOTH = [("A", True), ("B train", True), ("B eval", False)]


class TestOneRound:
    @pytest.mark.parametrize(("case", "train"), BOTH)
    def test_snip(self, case, train):
        given = vector("snip")[case]
        equal(scores_of(Snip(train), net_of(given), [batch_of(given)]), given["scores"], normalised=True)

    @pytest.mark.parametrize(("case", "train"), BOTH)
    def test_grasp(self, case, train):
        """They divide by the sum of the signed scores."""
        given = vector("grasp")[case]
        found = scores_of(Grasp(batch_statistics=train), net_of(given), [batch_of(given)])
        total = sum(score.sum() for score in found.values()).abs()
        equal({name: score / total for name, score in found.items()}, given["scores"])

    @pytest.mark.parametrize("case", ["A", "B eval"])
    def test_synflow(self, case):
        given = vector("synflow")[case]
        equal(scores_of(SynFlow(), net_of(given), [batch_of(given)]), given["scores"])

    def test_synflow_l2(self):
        """The PX repository's own SynFlow-L2 lacks a factor |w|."""
        given = vector("synflow_l2")
        net = net_of(given)
        found = scores_of(SynFlowL2(), net, [batch_of(given)])
        equal(found, given["scores"])
        lacking = {name: score / net.weights[name].abs() for name, score in found.items()}
        equal(lacking, given["px_repository_as_published"])

    def test_ntk_sap(self):
        """One draw: weights and perturbation are given."""
        given = vector("ntk_sap")
        net = net_of(given)
        fresh, direction = ({n: tensor(w) for n, w in given[key].items()} for key in ("fresh", "directions"))
        params = {**net.params, **fresh}
        inputs, _ = batch_of(given)
        found = NtkSap(epsilon=1e-4).mask_gradient(net, Masks.dense(net.weights), params, direction, inputs)
        equal({name: gradient.abs() for name, gradient in found.items()}, given["scores"])

    @pytest.mark.trap(73)
    def test_force_takes_nll_of_raw_logits(self):
        given = vector("force_saliency")
        inputs, targets = batch_of(given)
        for loss, expected in ((F.nll_loss, "scores_as_published"), (None, "scores_cross_entropy")):
            found = scores_of(Snip(), net_of(given, loss=loss), [(inputs, targets)])
            equal({name: score / len(targets) for name, score in found.items()}, given[expected])


class TestProsPr:
    def test_without_momentum(self):
        given = vector("prospr")
        equal(scores_of(ProsPr(), net_of(given), rolled(given)), given["scores lr=0.1 momentum=0.0"])

    def test_with_momentum_their_first_buffer_is_detached(self):
        given = vector("prospr")
        expected = given["scores lr=0.5 momentum=0.9"]
        theirs = ProsPr(lr=0.5, momentum=0.9, detach_first_buffer=True)
        equal(scores_of(theirs, net_of(given), rolled(given)), expected)
        found = scores_of(ProsPr(lr=0.5, momentum=0.9), net_of(given), rolled(given))
        with pytest.raises(AssertionError):
            equal(found, expected)

    def test_without_momentum_there_is_no_buffer(self):
        given = vector("prospr")
        equal(
            scores_of(ProsPr(detach_first_buffer=True), net_of(given), rolled(given)),
            given["scores lr=0.1 momentum=0.0"],
        )


PX_CASES = {
    "A, layers called a and b": PX(),
    "A, last layer called fc (as published: its signed weights are used unsquared in both auxiliary networks)": PX(
        as_released=True
    ),
    "B, last layer called head (as published: auxiliary networks in train mode)": PX(
        as_released=True, spare_classifier=False
    ),
    "B, last layer called fc (as published: auxiliary networks in train mode)": PX(as_released=True),
    "B by the formula of the paper (both auxiliary networks in eval mode, all weights squared), Sapwood and their "
    "code so changed": PX(),
}


class TestPX:
    @pytest.mark.trap(74)
    @pytest.mark.parametrize("case", PX_CASES)
    def test_formula_and_released_code(self, case):
        given = vector("px")[case]
        equal(scores_of(PX_CASES[case], net_of(given), [batch_of(given)]), given["scores"])

    def test_every_case_is_tested(self):
        assert {key for key, value in vector("px").items() if isinstance(value, dict)} == set(PX_CASES)

    def test_without_norms_and_with_no_layer_spared_the_code_has_the_formula(self):
        given = vector("px")["A, layers called a and b"]
        found = scores_of(PX(as_released=True, spare_classifier=False), net_of(given), [batch_of(given)])
        equal(found, given["scores"])


class TestRounds:
    """SynFlow to a quarter in twenty rounds: one weight a round is all that differs."""

    @pytest.mark.trap(75)
    @pytest.mark.parametrize(("rounding", "who"), [("up", "their"), ("nearest", "sapwood")])
    def test_kept_weights_and_masks(self, rounding, who):
        given = vector("synflow_rounds")
        model = Normed().double()
        model.load_state_dict({n: tensor(w) for n, w in given["weights"].items()}, strict=False)
        result = prune(model, method="synflow", rounds=20, rounding=rounding, density=0.25, input_shape=(2, 3, 3))
        assert [r.kept for r in result.history] == given[f"{who}_kept_per_round"]
        for name, mask in result.masks.items():
            assert torch.equal(mask, tensor(given[f"{who}_masks"][name]).bool())
        assert result.masks.provenance["fields"]["rounding"] == rounding


ERK_NETS = {
    "ResNet-20": lambda: create("resnet20", num_classes=10),
    "MLP 784-300-100-10": lambda: mlp(784, 300, 100, 10),
}


class TestErk:
    """The formula as the authors state it, solved here with a loop of its own."""

    def densities(self, shapes: Mapping[str, tuple], density: float) -> dict[str, float]:
        dense: set[str] = set()
        while True:
            raw = {n: sum(s) / torch.Size(s).numel() for n, s in shapes.items()}
            left = density * sum(torch.Size(s).numel() for s in shapes.values())
            left -= sum(torch.Size(shapes[n]).numel() for n in dense)
            scale = left / sum(raw[n] * torch.Size(s).numel() for n, s in shapes.items() if n not in dense)
            found = {n: 1.0 if n in dense else scale * raw[n] for n in shapes}
            if max(found.values()) <= 1:
                return found
            dense |= {max(found, key=found.__getitem__)}

    @pytest.mark.parametrize("case", range(6))
    def test_densities_of_layers(self, case):
        given = vector("erk")["comparison"][case]
        masks = prune(ERK_NETS[given["net"]](), method="erk", density=given["density"]).masks
        expected = self.densities({name: tuple(mask.shape) for name, mask in masks.items()}, given["density"])
        for name, count in masks.per_layer().items():
            assert abs(count.kept - expected[name] * count.total) < 1
        assert [name for name, share in expected.items() if share == 1] == given["dense"]
        assert masks.kept == given["kept"][0]


@pytest.fixture
def transfer():
    """The student of `ntt.json` under the authors' objective, with its masks, inputs, and probes that are exact.

    With every output once for a probe, and a factor that makes their mean the sum over all pairs, nothing is estimated.
    """
    given = vector("ntt")
    model = mlp(5, 7, 6, 3).double()
    state = {f"{i}.weight": tensor(w).T for i, w in zip((0, 2, 4), given["teacher"], strict=True)}
    state |= {f"{i}.bias": tensor(b) for i, b in zip((0, 2, 4), given["bias"], strict=True)}
    model.load_state_dict(state)
    net, inputs = FunctionalModel.of(model), tensor(given["x"])
    ntt = Ntt(as_released=True, gamma=1e-3**0.5, l2=1e-4)
    student = Student(ntt, net, data([inputs]), 0.5, generator())
    weights = {f"{i}.weight": tensor(w).T for i, w in zip((0, 2, 4), given["student"], strict=True)}
    masks = Masks({f"{i}.weight": tensor(m).T.bool() for i, m in zip((0, 2, 4), given["masks"], strict=True)})
    leaves = masks.apply({**student.params, **weights})
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    probes = 12**0.5 * torch.eye(24, dtype=torch.float64).view(24, 8, 3)
    return given, student, leaves, masks, inputs, probes


class TestNtt:
    def test_objective_and_its_gradient(self, transfer):
        given, student, leaves, masks, inputs, probes = transfer
        loss = student.loss(leaves, masks, inputs, probes)
        # Inputs and weights have six digits, and part of their kernel is in float32.
        assert loss.item() == pytest.approx(given["loss lambda=1e-3 l2coef=1e-4 density=0.5"], rel=3e-5)
        gradients = torch.autograd.grad(loss, [leaves[name] for name in masks])
        for gradient, mask, expected in zip(gradients, masks.values(), given["grad of it, by layer"], strict=True):
            torch.testing.assert_close((gradient * mask).T, tensor(expected), rtol=1e-4, atol=1e-6)
            assert not tensor(expected).T[~mask].any()  # what is pruned has no gradient

    @pytest.mark.parametrize(
        ("gamma", "l2", "term"), [(0.0, 0.0, "target_dist"), (1.0, 0.0, "ker_dist"), (0.0, 0.5, "l2")]
    )
    def test_every_term(self, transfer, gamma, l2, term):
        given, student, leaves, masks, inputs, probes = transfer
        student.ntt = Ntt(as_released=True, gamma=gamma, l2=l2)
        rest = 0.0 if term == "target_dist" else given["target_dist"]
        assert student.loss(leaves, masks, inputs, probes).item() - rest == pytest.approx(given[term], rel=2e-5)

    def test_random_probes_have_that_expectation(self, transfer):
        _, student, leaves, masks, inputs, probes = transfer
        exact = student.loss(leaves, masks, inputs, probes).item()
        draws = [student.loss(leaves, masks, inputs, student.signs(inputs, 64)).item() for _ in range(20)]
        assert sum(draws) / len(draws) == pytest.approx(exact, rel=0.02)

    def test_by_default_what_is_pruned_has_no_gradient(self, transfer):
        _, student, _, masks, _, _ = transfer
        student.ntt = Ntt()
        student.scales = 1.0, 1.0
        student.step(masks)
        assert all(not student.params[name].grad[~mask].any() for name, mask in masks.items())


class TestTaylor:
    @pytest.mark.trap(77)
    @pytest.mark.parametrize(("mode", "train"), [("train mode", True), ("eval mode", False)])
    def test_channels_behind_batchnorm(self, mode, train):
        """Theirs is the mean over batches, ours the sum."""
        given = vector("taylor_channels")
        criterion = Taylor("channels", batch_statistics=train)
        found = scores_of(criterion, net_of(given), rolled(given))["conv.weight"]
        torch.testing.assert_close(found[:, 0, 0, 0] / 4, tensor(given[mode]), rtol=1e-5, atol=0)
        assert torch.equal(found, found[:, :1, :1, :1].expand_as(found))
