import copy
import pickle
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nets import mlp
from sapwood import MaskError, MaskFileError, Masks, fingerprint, prune
from sapwood.masks import clean_name

shapes = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4)


@st.composite
def masks(draw, count: int = 1):
    """`count` masks over the same random layers."""
    layers = draw(shapes)
    seed = draw(st.integers(0, 2**31))
    rng = torch.Generator().manual_seed(seed)
    made = [
        Masks({f"l{i}.weight": torch.rand(s, generator=rng) < 0.5 for i, s in enumerate(layers)}) for _ in range(count)
    ]
    return made[0] if count == 1 else made


class TestValue:
    def test_counts_by_hand(self):
        m = Masks({"a": torch.tensor([[True, False], [False, False]]), "b": torch.tensor([True, True])})
        assert (m.kept, m.total, m.density, m.sparsity) == (3, 6, 0.5, 0.5)
        assert m.per_layer() == {"a": (1, 4), "b": (2, 2)}
        assert m.per_layer()["a"].density == 0.25
        assert (~m).collapsed == ("b",)
        assert "3 of 6" in repr(m) and m.table().splitlines()[-1].split() == ["all", "3", "6", "50.00%"]

    def test_read_only(self):
        m = Masks({"a": torch.ones(2, dtype=torch.bool)})
        with pytest.raises(TypeError):
            m.tensors["a"] = torch.zeros(2, dtype=torch.bool)
        with pytest.raises(MaskError, match="bool"):
            Masks({"a": torch.ones(2)})

    @given(masks(count=2))
    def test_set_algebra(self, pair):
        a, b = pair
        assert ~~a == a
        assert (a & b) <= a <= (a | b)
        assert ~(a & b) == (~a | ~b)
        assert (a & b).kept + (a | b).kept == a.kept + b.kept
        assert (a & ~a).kept == 0 and (a | ~a).density == 1
        assert (a == b) is all(torch.equal(a[n], b[n]) for n in a)

    @pytest.mark.trap(24)
    @given(masks(), st.integers(0, 100))
    def test_shuffling_keeps_counts(self, m, seed):
        shuffled = m.shuffled(torch.Generator().manual_seed(seed))
        assert shuffled.per_layer() == m.per_layer()

    @pytest.mark.trap(24)
    def test_shuffling_moves_positions(self):
        m = Masks({"a": torch.arange(1000).reshape(10, 100) < 500})
        moved = m.shuffled(torch.Generator().manual_seed(0))
        assert 200 < (m & moved).kept < 300
        assert moved == m.shuffled(torch.Generator().manual_seed(0))

    @given(masks(), st.integers(0, 100))
    def test_shuffling_with_taps_keeps_the_count_of_every_tap(self, m, seed):
        shuffled = m.shuffled(torch.Generator().manual_seed(seed), taps=True)
        assert shuffled.per_layer() == m.per_layer()
        for name, mask in m.items():
            if mask.dim() > 2:
                assert torch.equal(shuffled[name].sum((0, 1)), mask.sum((0, 1)))

    def test_shuffling_with_taps_moves_channel_pairs_only(self):
        m = Masks({"a": torch.zeros(8, 8, 3, 3, dtype=torch.bool)})
        m["a"][:4, :, 1, 1] = True
        moved = m.shuffled(torch.Generator().manual_seed(0), taps=True)["a"]
        assert moved[..., 1, 1].sum() == moved.sum() == 32 and moved[4:].any()
        flat = Masks({"a": torch.arange(100).reshape(10, 10) < 50})
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        assert flat.shuffled(seeds[0], taps=True) == flat.shuffled(seeds[1])  # one tap

    def test_apply_leaves_its_arguments_alone(self):
        params = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([3.0])}
        effective = Masks({"a": torch.tensor([False, True])}).apply(params)
        assert effective["a"].tolist() == [0, -2] and effective["b"] is params["b"]
        assert params["a"].tolist() == [1, -2]

    def test_copies_and_pickles(self):
        m = Masks({"a": torch.tensor([True, False])}, {"seed": 3})
        for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), m.to("cpu")):
            assert twin == m and twin.provenance["seed"] == 3

    def test_names_of_wrapped_models(self):
        assert clean_name("module._orig_mod.layer.module.weight") == "layer.module.weight"
        assert clean_name("_forward_module.weight") == clean_name("weight") == "weight"


class TestFile:
    @settings(max_examples=30)
    @given(masks())
    def test_round_trip(self, tmp_path_factory, m):
        path = tmp_path_factory.mktemp("masks") / "m.safetensors"
        m.save(path)
        assert Masks.load(path) == m

    def test_provenance_comes_back_and_a_bit_is_a_bit(self, tmp_path):
        model = mlp(100, 200, 10)
        result = prune(model, method="random", sparsity=0.9, seed=4)
        result.masks.save(tmp_path / "m.safetensors")
        loaded = Masks.load(tmp_path / "m.safetensors")
        assert loaded.provenance == result.masks.provenance
        assert loaded.provenance["method"] == "random" and loaded.provenance["seed"] == 4
        assert loaded.provenance["fingerprint"] == fingerprint(dict(model.named_parameters()))
        assert set(loaded.provenance) >= {"fields", "density", "torch", "sapwood"}
        size = (tmp_path / "m.safetensors").stat().st_size
        assert size < result.masks.total / 8 + 1500
        assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) & stat.S_IRUSR

    @pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "not safetensors", "foreign", "newer"])
    def test_a_bad_file_is_one_clear_sentence(self, tmp_path, damage):
        from safetensors.torch import save_file

        path = tmp_path / "m.safetensors"
        Masks({"a": torch.ones(5000, dtype=torch.bool)}).save(path)
        if damage == "missing":
            path.unlink()
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "not safetensors":
            path.write_bytes(b"hello" * 100)
        elif damage == "foreign":
            save_file({"w": torch.zeros(3)}, path)
        else:
            content = path.read_bytes()
            path.write_bytes(content.replace(b'"version":"2"', b'"version":"9"'))
        with pytest.raises(MaskFileError, match=r"m\.safetensors"):
            Masks.load(path)

    def test_a_mask_that_does_not_fill_its_shape_is_refused(self, tmp_path):
        from safetensors.torch import save_file

        metadata = {"format": "sapwood-masks", "version": "1", "shapes": '{"a": [100]}', "provenance": "{}"}
        save_file({"a": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "m", metadata)
        with pytest.raises(MaskFileError, match="damaged"):
            Masks.load(tmp_path / "m")

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "m.safetensors"
        old = Masks({"a": torch.tensor([True, False])})
        old.save(path)

        def full_disk(_):
            raise OSError("No space left on device")

        monkeypatch.setattr("os.fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            (~old).save(path)
        assert Masks.load(path) == old
        assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


class TestFit:
    @pytest.mark.trap(29)
    def test_masks_of_another_model_are_refused(self):
        ours, wider, deeper = mlp(4, 8, 3), mlp(4, 9, 3), mlp(4, 8, 8, 3)
        m = prune(ours, method="magnitude", density=0.5).masks
        m.check(dict(ours.named_parameters()))
        m.check(dict(nn.Sequential(*ours).named_parameters()))
        with pytest.raises(MaskError, match=r"another model.*shape"):
            m.check(dict(wider.named_parameters()))
        with pytest.raises(MaskError, match="no parameter"):
            m.check(dict(nn.Linear(4, 8).named_parameters()))
        with pytest.raises(MaskError, match="shape"):
            m.check(dict(deeper.named_parameters()))

    def test_the_fingerprint_sees_what_the_masks_do_not_cover(self):
        ours = mlp(4, 8, 3)
        m = prune(ours, method="magnitude", density=0.5, exclude="2").masks
        other = mlp(4, 8, 5)
        with pytest.raises(MaskError, match="strict=False"):
            m.check(dict(other.named_parameters()))
        m.check(dict(other.named_parameters()), strict=False)

    def test_wrapped_models_fit(self):
        ours = mlp(4, 8, 3)
        m = prune(ours, method="magnitude", density=0.5).masks
        m.check(dict(torch.compile(ours, backend="eager").named_parameters()))
