"""What a batch is: which part is what, what rows are, what may be drawn, and how much each batch weighs."""

import collections
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sapwood
from nets import mlp
from sapwood import DataError, FunctionalModel, Masks, UnsupportedModelError, diagnosis, ntk, prune
from sapwood.batches import Argument, first, small

QUICK = {
    "ntk-sap": {"rounds": 1, "resamples": 1, "samples": 10},
    "ntk-sap-jvp": {"rounds": 1, "resamples": 1, "samples": 10},
    "synflow": {"rounds": 1},
    "px": {"rounds": 1},
    "ntt": {"rounds": 1, "interval": 1, "random_inputs": True, "batch_size": 10},
}
X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def snip(model, batches, **fields) -> Masks:
    return prune(model, method="snip", sparsity=0.5, batches=batches, **fields).masks


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


class Tagger(nn.Module):
    """Classes of all words; with labels, a loss in one of the forms that models return it in."""

    def __init__(self, returns: str = "object", reduce: str = "targets") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.returns, self.reduce = returns, reduce
        self.embed, self.a, self.b = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, ids, labels=None):
        logits = self.b(torch.relu(self.a(self.embed(ids))))
        if labels is None:
            return logits
        loss = LOSSES[self.reduce](logits, labels)
        return {
            "object": SimpleNamespace(loss=loss, logits=logits),
            "dict": {"loss": loss, "logits": logits},
            "loss first": (loss, logits),
            "loss last": (logits, loss),
            "loss alone": loss,
            "no loss": (logits,),
            "two": (logits, loss, 2 * loss),
        }[self.returns]


def of_targets(logits, labels, **options):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def of_later(logits, labels):
    return of_targets(logits[:, :-1], labels[:, 1:])


def of_samples(logits, labels):
    return torch.stack([F.cross_entropy(*pair) for pair in zip(logits, labels, strict=True)]).mean()


CLASS_WEIGHTS = torch.tensor([1.0, 5, 1, 1, 1])
LOSSES = {
    "targets": of_targets,
    "later targets": of_later,
    "samples": of_samples,
    "sum": lambda logits, labels: of_targets(logits, labels, reduction="sum"),
}


def words(empty: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight sentences of six words, four of them with two words that count, or with none."""
    generator = torch.Generator().manual_seed(1)
    ids, tags = (torch.randint(0, top, (8, 6), generator=generator) for top in (20, 5))
    tags[:4, 0 if empty else 2 :] = -100
    return ids, tags


def cut(at: tuple[int, ...], mapping: bool = False, empty: bool = False) -> list:
    ids, tags = words(empty)
    pairs = [(ids[a:b], tags[a:b]) for a, b in itertools.pairwise((0, *at, 8))]
    return [{"ids": ids, "labels": tags} for ids, tags in pairs] if mapping else pairs


def gradient(model, batches, **options) -> torch.Tensor:
    """All entries, to one scale."""
    net = FunctionalModel.of(model, **options)
    found = torch.cat([g.flatten() for g in net.gradient(Masks.dense(net.weights), batches, train=False).values()])
    return found / found.norm()


CUTS = [(4,), (3,), (1,), (2, 5), (1, 2, 3, 4, 5, 6, 7)]


@pytest.mark.trap(63)
class TestWeights:
    @pytest.mark.parametrize("at", CUTS)
    def test_cross_entropy_is_the_mean_over_the_targets_that_count(self, at):
        model = Tagger()
        ids, tags = words()
        expected = torch.autograd.grad(of_targets(model(ids), tags), [model.a.weight, model.b.weight])
        expected = torch.cat([g.flatten() for g in expected])
        torch.testing.assert_close(gradient(model, cut(at)), expected / expected.norm())

    @pytest.mark.parametrize("empty", [False, True])
    @pytest.mark.parametrize("reduce", LOSSES)
    @pytest.mark.parametrize("at", [(4,), (3,), (2, 5)])
    def test_what_a_model_or_user_means_over_is_found_out(self, at, reduce, empty):
        """Against autograd on all data at once; a mean over sentences is none if one has no word that counts."""
        if reduce == "samples" and empty:
            pytest.skip("no number")
        loss = LOSSES[reduce]
        whole, parts = cut((), True, empty), cut(at, True, empty)
        model = Tagger(reduce=reduce)
        ids, tags = words(empty)
        expected = torch.autograd.grad(loss(model(ids), tags), [model.a.weight, model.b.weight])
        expected = torch.cat([g.flatten() for g in expected])
        expected /= expected.norm()
        for batches in (whole, parts):
            torch.testing.assert_close(gradient(model, batches), expected, rtol=1e-4, atol=1e-6)
        pairs = cut(at, empty=empty)
        torch.testing.assert_close(gradient(model, pairs, loss=loss), expected, rtol=1e-4, atol=1e-6)
        mapped = gradient(model, parts, loss=lambda output, batch: loss(output, batch["labels"]))
        torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        "loss",
        [
            lambda o, t: of_targets(o, t, weight=CLASS_WEIGHTS),
            lambda o, t: of_targets(o, t.clamp(min=0), ignore_index=0),
            lambda o, t: (o.flatten(1) @ o.flatten(1).T).logsumexp(1).mean(),  # samples against each other
            lambda o, t: of_targets(o + torch.rand_like(o), t),
        ],
    )
    def test_what_is_not_known_is_refused_and_the_users_word_decides(self, loss):
        assert snip(Tagger(), cut(()), loss=loss).kept == 104
        with pytest.raises(DataError, match=r"How much each batch weighs.*one batch.*sums.*pair"):
            snip(Tagger(), cut((4,)), loss=loss)
        assert snip(Tagger(), cut((4,)), loss=lambda o, t: (loss(o, t), len(o))).kept == 104

    def test_readings_that_weigh_batches_differently_are_refused(self):
        """All sentences are full, so a mean over words and one over sentences cannot be told; the lengths differ."""
        ids, tags = words()
        full = [{"ids": ids, "labels": tags.clamp(min=0)}, {"ids": ids[:, :3], "labels": tags[:, :3].clamp(min=0)}]
        with pytest.raises(DataError, match="a mean over samples or a mean over targets"):
            snip(Tagger(), full)
        assert snip(Tagger(), [full[0], full[0]]) == snip(Tagger(), full[:1])  # they weigh the same in any reading

    def test_a_pair_says_what_the_mean_is_over(self):
        def weighted(output, target):
            return of_targets(output, target, weight=CLASS_WEIGHTS), CLASS_WEIGHTS[target[target >= 0]].sum()

        one, two = (gradient(Tagger(), cut(at), loss=weighted) for at in ((), (3,)))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
        alone = gradient(Tagger(), cut(()), loss=lambda o, t: weighted(o, t)[0])
        torch.testing.assert_close(one, alone)

    @pytest.mark.parametrize(
        ("method", "fields"),
        [
            ("grasp", {}),
            ("force", {"rounds": 3}),
            ("obd", {"diagonal": "hutchinson"}),
            ("obd", {"diagonal": "exact"}),
            ("skeletonization", {"error": "loss"}),
            ("obs", {"curvature": "exact", "damping": 1.0}),
            ("obs", {}),
        ],
    )
    def test_every_method_that_adds_up_batches(self, method, fields):
        one, two = (
            prune(Tagger().double(), method=method, sparsity=0.5, batches=cut(at), **fields).masks for at in ((), (3,))
        )
        assert one == two

    def test_the_loss_is_looked_at_once(self):
        calls = []

        def loss(output, target):
            calls.append(len(target))
            return of_targets(output, target)

        prune(Tagger(), method="iter-snip", rounds=5, sparsity=0.5, batches=cut((4,)), loss=loss)
        assert calls.count(1) == 1 + 2 * 8 and len(calls) == 1 + 2 * (8 + 1) + 5 * 2

    def test_no_target_counts(self):
        ids, tags = words()
        for batch in [(ids, tags.fill_(-100)), {"ids": ids, "labels": tags}]:
            with pytest.raises(DataError, match="No target counts"):
                snip(Tagger(), [batch])


class TestParts:
    """Every way to say the same batch gives the same masks, or is refused."""

    expected = property(lambda self: snip(linear(), [(X, Y)]))

    @pytest.mark.trap(64)
    @pytest.mark.parametrize("kind", [tuple, list])
    def test_more_than_two_parts_are_refused(self, kind):
        for method in ("snip", "ntk-sap", "synflow"):
            with pytest.raises(DataError, match=r"3 parts.*\(8, 6\).*mapping"):
                prune(linear(), method=method, sparsity=0.5, batches=[kind((X, torch.ones(8, 6), Y))])
        with pytest.raises(DataError, match="0 parts"):
            prune(linear(), sparsity=0.5, batches=[kind(())])
        with pytest.raises(DataError, match="3 parts"):
            ntk.kernel(linear(), (X, X, Y))

    @pytest.mark.trap(64)
    def test_named_fields_and_mappings_of_any_kind(self):
        @dataclasses.dataclass
        class Fields:
            input: torch.Tensor
            labels: torch.Tensor

        class Encoding(collections.UserDict):
            def to(self, device):
                raise AssertionError("the user's own encoding is not moved")

        pair = collections.namedtuple("pair", "image label")
        turned = collections.namedtuple("turned", "label input")
        more = collections.namedtuple("more", "input weight labels")
        same = [Fields(X, Y), Encoding(input=X, label=Y), {"input": X, "targets": Y}, pair(X, Y), turned(Y, X), [X, Y]]
        same += [({"input": X}, Y), [{"input": X}, Y]]
        assert all(snip(linear(), [batch]) == self.expected for batch in same)
        assert snip(linear(), (batch for batch in [(X, Y)])) == self.expected

        forward = {"forward": lambda model, inputs: model(inputs["input"])}
        assert snip(linear(), [more(X, X, Y)], **forward) == self.expected
        keyed = {"forward": lambda model, inputs: model(inputs[0])}
        assert snip(linear(), [{0: X, "labels": Y}], **keyed) == self.expected
        with pytest.raises(DataError, match="the key 0"):
            snip(linear(), [{0: X, "labels": Y}])

    @pytest.mark.trap(64)
    def test_inputs_of_several_parts_and_objects_are_the_one_argument(self):
        several = {"forward": lambda model, inputs: model(inputs[0] + inputs[1])}
        assert snip(linear(), [((X, torch.zeros(8, 6)), Y)], **several) == self.expected
        assert snip(linear(), [[[X, torch.zeros(8, 6)], Y]], **several) == self.expected
        graph = {"forward": lambda model, graph: model(graph.x)}
        assert snip(linear(), [(SimpleNamespace(x=X), Y)], **graph) == self.expected
        with pytest.raises(DataError, match=r"needs targets.*SimpleNamespace"):
            snip(linear(), [SimpleNamespace(x=X, y=Y)], **graph)

    @pytest.mark.trap(64)
    def test_what_is_no_list_of_batches_is_refused(self):
        for batches, message in [
            (X, "one Tensor"),
            ({"input": X}, "one dict"),
            ((X, Y), r"batches=\[\(input, target\)\]"),
            (["text"], "is str"),
            ([None], "is NoneType"),
            ([(X, Y), (X[:0], Y[:0])], "no samples"),
        ]:
            with pytest.raises(DataError, match=message):
                prune(linear(), sparsity=0.5, batches=batches)
        with pytest.raises(sapwood.SapwoodError, match="generator"):
            snip(linear(), [(pair for pair in [(X, Y)])])
        assert snip(linear(), [(X[:1], Y[:1])]).kept == 9

    @pytest.mark.trap(64)
    def test_ids_do_not_come_from_a_shape(self):
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
        with pytest.raises(UnsupportedModelError, match="Token ids come in batches"):
            prune(model, sparsity=0.5, input_shape=(16,))

    @pytest.mark.trap(64)
    def test_a_forward_that_writes_into_its_inputs_gets_copies(self):
        class InPlace(nn.Linear):
            def forward(self, x):
                return super().forward(x.mul_(2))

        ours = X.clone()
        version = ours._version
        one, two = (prune(InPlace(6, 3), method="iter-snip", sparsity=0.5, batches=[(ours, Y)]) for _ in range(2))
        assert torch.equal(ours, X) and ours._version == version and one.masks.kept == two.masks.kept

        with torch.inference_mode():
            ours = X.clone()
        assert snip(linear(), [(ours, Y)]) == self.expected


@pytest.mark.trap(65)
class TestLosses:
    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (Y[:, None], r"\(8, 3\) float32.*\(8, 1\) int64.*pass loss="),
            (Y[:3], r"\(8, 3\) float32.*\(3,\) int64"),
            (Y + 5, "out of bounds.*pass loss="),
            (Y - 1, "out of bounds.*pass loss="),
            (F.one_hot(Y, 3), r"\(8, 3\) int64"),
            (F.one_hot(Y, 3).float(), r"\(8, 3\) float32.*not class indices"),
            (Y.float(), r"\(8,\) float32.*not class indices"),
            (Y[:, None].float(), r"\(8, 1\) float32.*not class indices"),
            (Y > 0, r"\(8,\) bool.*not class indices"),
            (Y.tolist(), "not class indices"),
            ({"boxes": Y}, "boxes.*not class indices"),
        ],
    )
    def test_targets_that_do_not_fit(self, target, message):
        for method in ("snip", "grasp", "taylor", "prospr"):
            with pytest.raises(DataError, match=message):
                prune(linear(), method=method, sparsity=0.5, batches=[(X, target)])

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
    def test_class_indices_of_any_width(self, dtype):
        assert snip(linear(), [(X, Y.to(dtype))]) == snip(linear(), [(X, Y)])

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (nn.CrossEntropyLoss(reduction="none"), r"loss= is shape \(8,\).*scalar"),
            (lambda o, t: 1.0, "loss= is float"),
            (lambda o, t: None, "loss= is NoneType"),
            (lambda o, t: (o.argmax(1) == t).sum(), "int64"),
            (lambda o, t: o[t["boxes"]], r"loss= failed on outputs of shape \(8, 3\).*\(8,\) int64"),
            (nn.BCEWithLogitsLoss(), "Target size"),
            (lambda o, t: F.cross_entropy(o.detach(), t), "does not depend"),
        ],
    )
    def test_losses_that_fail_or_are_no_scalar(self, loss, message):
        with pytest.raises(sapwood.SapwoodError, match=message):
            snip(linear(), [(X, Y)], loss=loss)

    def test_dimension_of_the_classes(self):
        """(N, C, L) and (N, L, C) both work; where both fit, nothing is guessed."""
        tags = torch.randint(0, 5, (4, 7), generator=torch.Generator().manual_seed(0))
        x = torch.randn(4, 7, 6)

        def pointwise(model, inputs):
            return model(inputs).mT

        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        last, second = snip(model, [(x, tags)]), snip(model, [(x, tags)], forward=pointwise)
        assert last == second
        for method in ("snip", "skeletonization"):
            with pytest.raises(DataError, match=r"dimension 1 and the last.*\(4, 5, 5\)"):
                prune(model, method=method, sparsity=0.5, batches=[(x[:, :5], tags[:, :5])])

    @pytest.mark.parametrize("returns", ["object", "dict", "loss first", "loss last", "loss alone"])
    def test_every_form_in_which_models_return_their_loss(self, returns):
        batch = {"ids": words()[0], "labels": words()[1]}
        expected = snip(Tagger(), [(batch["ids"], batch["labels"])], loss=of_later)
        assert snip(Tagger(returns, "later targets"), [batch]) == expected
        assert expected != snip(Tagger(), [(batch["ids"], batch["labels"])])

    def test_several_scalars_and_none(self):
        batch = {"ids": words()[0], "labels": words()[1]}
        with pytest.raises(DataError, match="2 scalars"):
            snip(Tagger("two"), [batch])
        assert snip(Tagger("no loss"), [batch]) == snip(Tagger(), [(batch["ids"], batch["labels"])])

    def test_models_that_cannot_do_without_labels(self):
        class Needs(Tagger):
            def forward(self, ids, labels):
                return super().forward(ids, labels)

        ids, tags = words()
        batches = cut((3,), mapping=True)
        expected = snip(Tagger(), [(ids, tags)])
        assert snip(Needs("loss first"), batches) == expected
        assert snip(Needs("loss first"), batches, loss=lambda o, b: of_targets(o[1], b["labels"])) == expected
        with pytest.raises(UnsupportedModelError, match=r"'labels'.*forward="):
            prune(Needs(), sparsity=0.5, batches=batches)
        result = prune(Needs("loss first"), sparsity=0.5, batches=[(ids, None)], rounds=1, forward=with_labels)
        assert result.masks.kept == 104

    def test_a_wrapper_that_passes_everything_on(self):
        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = Tagger("object", "later targets")

            def forward(self, *args, **kwargs):
                return self.model(*args, **kwargs)

        (batch,) = cut((), mapping=True)
        inside = snip(Tagger("object", "later targets"), [batch])
        found = snip(Wrapper(), [batch])
        assert all(found[f"model.{name}"].equal(mask) for name, mask in inside.items())


def with_labels(model, ids):
    return model(ids, torch.zeros_like(ids))


def innermost(by):
    """The value in a dictionary or list of one."""
    by = next(iter(by.values())) if isinstance(by, dict) else by
    return by[0] if isinstance(by, list) else by


class Scaled(nn.Module):
    """A layer, its outputs scaled by something beside its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 3)

    def forward(self, x, by=None):
        by = innermost(by)
        if by is None or isinstance(by, str):
            return self.fc(x)
        return self.fc(x) * (by.reshape(len(x), -1)[:, :1] if torch.is_tensor(by) and by.dim() else by)


def seen_by(method: str, model: nn.Module, batches: list, **fields) -> list:
    """All inputs of the passes of a search."""
    seen = []

    def forward(model, inputs):
        seen.append({k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()})
        return model(**inputs)

    prune(model, method=method, sparsity=0.5, batches=batches, forward=forward, **QUICK[method], **fields)
    return seen


@pytest.mark.trap(66)
class TestDrawing:
    MASK = (torch.arange(8) < 5).float()

    @pytest.mark.parametrize("method", QUICK)
    @pytest.mark.parametrize(
        "by", [MASK, MASK.bool(), torch.linspace(0.1, 1, 8), torch.tensor(0.5), {"deep": MASK}, [MASK], torch.eye(8)]
    )
    def test_beside_another_tensor_the_user_says_which_are_numbers(self, method, by):
        """Masks, time steps, an adjacency, scalars, nested and in lists: refused, or left as they are."""
        batch = {"x": X, "by": by}
        with pytest.raises(DataError, match=r"draw=.*'x'"):
            seen_by(method, Scaled(), [batch])
        known = set(innermost(by).flatten().tolist())
        seen = seen_by(method, Scaled(), [batch], draw=("x",))
        assert all(set(innermost(inputs["by"]).flatten().tolist()) <= known for inputs in seen)
        assert not all(set(inputs["x"].flatten().tolist()) <= set(X.flatten().tolist()) for inputs in seen)

    def test_a_float_mask_is_what_the_same_mask_of_integers_is(self):
        class Pooled(Tagger):
            def forward(self, ids, mask):
                hidden = torch.relu(self.a(self.embed(ids))) * mask.float()[..., None]
                return self.b(hidden.sum(1))

        ids = words()[0]
        mask = (torch.arange(6) < 3).long().expand(8, 6)
        whole = prune(Pooled(), sparsity=0.8, rounds=1, batches=[{"ids": ids, "mask": mask}]).masks
        with pytest.raises(DataError, match=r"'mask'.*draw=\(\)"):
            prune(Pooled(), sparsity=0.8, rounds=1, batches=[{"ids": ids, "mask": mask.float()}])
        batches = [{"ids": ids, "mask": mask.float()}]
        assert prune(Pooled(), sparsity=0.8, rounds=1, batches=batches, draw=()).masks == whole

    def test_a_lone_tensor_is_the_numbers_and_plain_values_stay(self):
        for by in (None, 2.0, "text"):
            seen = [inputs for inputs in seen_by("ntk-sap", Scaled(), [{"x": X, "by": by}]) if len(inputs["x"]) > 2]
            assert seen and all(inputs["by"] == by and inputs["x"].shape == (10, 6) for inputs in seen)
            assert not any(torch.equal(inputs["x"][:8], X) for inputs in seen)

    @pytest.mark.parametrize("kind", [tuple, list, collections.namedtuple("Two", "x mask")._make])
    def test_positions_of_a_tuple(self, kind):
        seen = []

        def forward(model, inputs):
            seen.append(inputs)
            return model(inputs[0])

        batch = (kind([X, self.MASK]), Y)
        with pytest.raises(DataError, match="draw"):
            prune(linear(), sparsity=0.5, batches=[batch], forward=forward)
        seen.clear()
        prune(linear(), sparsity=0.5, batches=[batch], forward=forward, draw=(0,), **QUICK["ntk-sap"])
        assert {type(inputs) for inputs in seen} == {type(batch[0])}
        assert seen[-1][0].shape == ((8, 6) if kind is list else (10, 6)) and not torch.equal(seen[-1][0][:8], X)
        assert set(seen[-1][1].tolist()) == {0, 1}

    def test_names_that_are_not_there(self):
        ids = {"ids": words()[0]}
        for draw, model, batch in [("by", Scaled(), {"x": X}), ("x", Scaled(), X), (("ids",), Tagger(), ids)]:
            with pytest.raises(DataError, match="draw names"):
                prune(model, sparsity=0.5, batches=[batch], draw=draw)

    def test_what_cannot_be_looked_into(self):
        packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 5, 6), torch.tensor([5, 3, 2]), batch_first=True)
        model = Sequence(batch_first=True)
        with pytest.raises(DataError, match=r"PackedSequence.*draw"):
            prune(model, sparsity=0.5, batches=[packed])
        assert prune(model, sparsity=0.5, batches=[packed], draw=(), rounds=1).masks.kept == 90
        assert snip(model, [(packed, torch.arange(3))]).kept == 90

    def test_the_diagnosis_asks_too(self):
        model, batch = Scaled(), {"x": X, "by": self.MASK}
        masks = snip(model, [{**batch, "labels": Y}])
        with pytest.raises(DataError, match="draw"):
            diagnosis.diagnose(model, masks, batches=[batch])
        found = diagnosis.diagnose(model, masks, batches=[batch], draw=("x",))
        assert found.effective == diagnosis.diagnose(model, masks, input_shape=(6,)).effective


class Sequence(nn.Module):
    def __init__(self, batch_first: bool = False, every: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.every, self.axis = every, 1 if batch_first else 0
        self.rnn, self.fc = nn.GRU(6, 5, batch_first=batch_first), nn.Linear(5, 3)

    def forward(self, x):
        outputs, last = self.rnn(x)
        return self.fc(outputs if self.every else last[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fc = nn.TransformerEncoderLayer(6, 2, 8), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.layer(x))


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, edges):
        hidden = torch.relu(self.a(x))
        return self.b(torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]]))


@pytest.mark.trap(67)
@pytest.mark.filterwarnings("ignore::sapwood.SapwoodWarning")
class TestRows:
    @pytest.mark.parametrize("method", QUICK)
    @pytest.mark.parametrize(
        "build", [Sequence, lambda: Sequence(every=True), Attention, lambda: nn.Sequential(nn.Linear(6, 3), Mixed())]
    )
    def test_what_is_not_batch_first_is_taken_as_it_is(self, method, build):
        """(length, batch, width): the same shape as samples, and told from them by what the model does."""
        x = torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(0))
        shapes = set()

        def forward(model, inputs):
            shapes.add(tuple(inputs.shape))
            return model(inputs)

        prune(build(), method=method, sparsity=0.5, batches=[x], forward=forward, **QUICK[method])
        assert shapes - {(2, 4, 6)} == {(7, 4, 6)}  # a few of its rows are looked at

    @pytest.mark.parametrize("x", [torch.zeros(7, 4, 6), torch.ones(1, 4, 6)])
    def test_a_dummy_batch_and_a_head_of_zeros_hide_nothing(self, x):
        model = Sequence(every=True)
        nn.init.zeros_(model.fc.weight)
        shapes = set()

        def forward(model, inputs):
            shapes.add(tuple(inputs.shape))
            return model(inputs)

        prune(model, sparsity=0.5, batches=[x], forward=forward, **QUICK["ntk-sap"])
        assert shapes == {tuple(x.shape), (2, 4, 6)}

    @pytest.mark.parametrize("norm", [True, False])
    def test_samples_are_resized_as_ever(self, norm):
        shapes = set()

        def forward(model, inputs):
            shapes.add(tuple(inputs.shape))
            return model(inputs)

        model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=norm), nn.Linear(3, 3))
        prune(model, sparsity=0.5, batches=[X], forward=forward, **QUICK["ntk-sap"])
        assert shapes == ({(10, 6), (2, 6)} if norm else {(10, 6), (2, 6), (4, 6)})

    @pytest.mark.parametrize("method", QUICK)
    @pytest.mark.parametrize("nodes", [12, 2])
    def test_graphs(self, method, nodes):
        """Also one of two nodes, whose edges have as many rows."""
        generator = torch.Generator().manual_seed(0)
        batch = {"x": torch.randn(nodes, 6), "edges": torch.randint(0, nodes, (2, 30), generator=generator)}
        with pytest.raises(DataError, match="draw"):
            seen_by(method, Graph(), [batch])
        seen = seen_by(method, Graph(), [batch], draw=("x",))
        whole = [inputs for inputs in seen if torch.equal(inputs["edges"], batch["edges"])]
        assert len(whole) >= len(seen) - 3 and all(inputs["x"].shape == (nodes, 6) for inputs in seen)

    def test_methods_that_need_samples_say_so(self):
        generator = torch.Generator().manual_seed(0)
        graph = {"x": torch.randn(12, 6), "edges": torch.randint(0, 12, (2, 30), generator=generator)}
        with pytest.raises(DataError, match="cannot be cut into samples"):
            prune(Graph(), method="obd", sparsity=0.5, batches=[{**graph, "labels": torch.arange(12) % 3}])
        with pytest.raises(DataError, match="cannot be cut into samples"):
            ntk.kernel(Graph(), graph)
        with pytest.raises(DataError, match="cannot be cut into samples"):
            prune(Graph(), sparsity=0.5, batches=[graph], draw=("x",), chunk_size=3)
        square = (torch.randn(4, 4, 6), torch.arange(4) % 3)
        for fields in ({"method": "obd"}, {"method": "obs"}, {"method": "taylor", "per": "sample"}):
            with pytest.raises(DataError, match="rows of its inputs"):
                prune(Sequence(), sparsity=0.5, batches=[square], **fields)
            assert prune(Sequence(True), sparsity=0.5, batches=[square], **fields).masks.kept == 90
        with pytest.raises(UnsupportedModelError, match=r"rows of its inputs.*chunk_size=0"):
            prune(Sequence(), sparsity=0.5, batches=[square[0]], chunk_size=3)

    def test_batches_of_whole_things_weigh_by_their_targets(self):
        """Two graphs in two batches against both in one: nodes are what the loss is a mean over."""
        generator = torch.Generator().manual_seed(0)
        graphs = [
            (torch.randn(n, 6, generator=generator), torch.randint(0, n, (2, 9), generator=generator)) for n in (5, 9)
        ]
        targets = [torch.arange(n) % 3 for n in (5, 9)]
        model = Graph()
        parts = [{"x": x, "edges": e, "labels": t} for (x, e), t in zip(graphs, targets, strict=True)]
        (a, b), (c, d) = graphs
        joint = {"x": torch.cat([a, c]), "edges": torch.cat([b, d + 5], 1), "labels": torch.cat(targets)}
        torch.testing.assert_close(gradient(model, parts), gradient(model, [joint]), rtol=1e-4, atol=1e-6)

    def test_detection(self):
        """Lists of images of several sizes, targets in dictionaries, a loss of one's own that says what it counts."""

        class Detector(nn.Linear):
            def forward(self, images):
                assert isinstance(images, list)
                return [{"boxes": super(Detector, self).forward(image)} for image in images]

        def loss(output, target):
            pairs = zip(output, target, strict=True)
            return torch.stack([(a["boxes"] - b["boxes"]).abs().mean() for a, b in pairs]).mean()

        images, boxes = [torch.randn(5, 6), torch.randn(7, 6)], [{"boxes": torch.zeros(n, 3)} for n in (5, 7)]
        torch.manual_seed(0)
        model = Detector(6, 3)
        one = snip(model, [(images, boxes)], loss=loss)
        parts = [(images[:1], boxes[:1]), (images[1:], boxes[1:])]
        with pytest.raises(DataError, match="How much each batch weighs"):
            snip(model, parts, loss=loss)
        assert snip(model, parts, loss=lambda o, t: (loss(o, t), len(t))) == one

    def test_small(self):
        assert small((X, Y)).shape == (2, 6) and small({"x": X, "labels": Y}, 3)["x"].shape == (3, 6)
        graph = {"x": X, "edges": torch.zeros(2, 30)}
        assert small(graph)["x"] is X and small([X[:1], X]).shape == (1, 6)
        assert small(([X, X], Y)).value == [X, X] and isinstance(small(SimpleNamespace()), Argument)
        assert small({"x": X, "scale": torch.tensor(2.0), "flag": True})["scale"] == 2
        assert [part.shape[0] for part in first((X, Y))] == [1, 1]
        assert first((X, Y[:3]))[0] is X and first({**graph, "labels": Y})["labels"] is Y

    def test_user_models_random_state_is_left_alone(self):
        class Noisy(nn.Linear):
            def forward(self, x):
                return super().forward(x) + torch.rand(len(x), 3)

        model = Noisy(6, 3)
        before = torch.get_rng_state()
        prune(model, sparsity=0.5, batches=[X], **QUICK["ntk-sap"])
        snip(model, [(X, Y)])
        assert torch.equal(before, torch.get_rng_state())


class Mixed(nn.Module):
    """Sums along the first dimension."""

    def forward(self, x):
        return x - 0.5 * x.mean(0, keepdim=True)


def test_ordinary_batches_cost_no_further_pass():
    """A pair (images, labels) under the default loss: SNIP runs the model once a batch, after two looks at it."""
    calls = []

    def forward(model, inputs):
        calls.append(len(inputs))
        return model(inputs)

    snip(mlp(6, 8, 3), [(X, Y), (X[:3], Y[:3])], forward=forward)
    assert calls == [2, 2, 8, 3]  # the first two are the witness's
