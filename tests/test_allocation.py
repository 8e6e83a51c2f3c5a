import fractions
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapwood import BudgetError, ConfigError, Global, Layerwise, Masks, Method, SynFlow
from sapwood.allocation import allocation, apportion, budget, target_density
from sapwood.schedules import SCHEDULES, densities

LAYERS = {"conv1": (4, 3, 3, 3), "conv2": (6, 4, 3, 3), "fc": (5, 6)}
RULES = ["global", "uniform", "layerwise", "uniform+", "erk", {"conv1": 0.9, "conv2": 0.1, "fc": 0.5}]


def scores(seed: int = 0, levels: int = 0) -> dict[str, torch.Tensor]:
    """Random scores; with `levels` they take that many values, so that ties abound."""
    rng = torch.Generator().manual_seed(seed)
    draws = {name: torch.rand(shape, generator=rng) for name, shape in LAYERS.items()}
    return {name: (d * levels).floor() for name, d in draws.items()} if levels else draws


TOTAL = sum(math.prod(shape) for shape in LAYERS.values())
DENSE = Masks.dense(scores())


class TestExactness:
    @pytest.mark.trap(2)
    @pytest.mark.trap(33)
    @given(
        st.sampled_from(range(len(RULES))),
        st.integers(127, TOTAL),
        st.integers(0, 50),
        st.integers(0, 4),
        st.integers(0, 9),
    )
    def test_exactly_k_whatever_the_rule_and_the_ties(self, rule, keep, seed, levels, floor):
        rule = allocation(RULES[rule], min_per_layer=floor)
        given_scores = scores(seed, levels)
        masks = rule(given_scores, DENSE, keep)
        assert masks.kept == keep
        assert all(count.kept >= min(floor, count.total) for count in masks.per_layer().values())
        assert masks == rule(given_scores, DENSE, keep)

    @pytest.mark.trap(2)
    @pytest.mark.parametrize("keep", [1, 2, TOTAL // 2, TOTAL - 1, TOTAL])
    def test_all_equal_scores_are_kept_by_position(self, keep):
        flat = {name: torch.zeros(shape) for name, shape in LAYERS.items()}
        masks = Global()(flat, DENSE, keep)
        kept = torch.cat([m.flatten() for m in masks.values()])
        assert torch.equal(kept, torch.arange(TOTAL) < keep)

    @given(st.integers(1, TOTAL), st.integers(0, 50))
    def test_global_keeps_the_largest(self, keep, seed):
        given_scores = scores(seed)
        masks = Global()(given_scores, DENSE, keep)
        kept = torch.cat([given_scores[n][m] for n, m in masks.items()])
        gone = torch.cat([given_scores[n][~m] for n, m in masks.items()])
        assert not len(gone) or kept.min() >= gone.max()

    @given(
        st.lists(st.sampled_from(range(len(RULES))), min_size=1, max_size=1),
        st.lists(st.integers(120, TOTAL), min_size=2, max_size=5),
    )
    def test_nested_whatever_the_scores_do(self, rule, budgets):
        """Rounding by largest remainders may give a layer more as the total falls; the candidates must still bind."""
        masks = DENSE
        for index, keep in enumerate(sorted(budgets, reverse=True)):
            later = allocation(RULES[rule[0]])(scores(index), masks, keep)
            assert later <= masks and later.kept == keep
            masks = later

    def test_negative_and_minus_infinite_candidates(self):
        masks = Global()({"a": torch.tensor([-3.0, -1.0, -2.0])}, Masks({"a": torch.tensor([True, False, True])}), 1)
        assert masks["a"].tolist() == [False, False, True]


class TestLayerBudgets:
    @pytest.mark.trap(33)
    def test_erk_against_a_table_worked_by_hand(self):
        """Parts 4+3+3+3 = 13, 6+4+3+3 = 16 and 5+6 = 11 of 40: 120 weights give 39, 48 and 33, but fc has 30."""
        counts = {n: c.kept for n, c in Layerwise("erk")(scores(), DENSE, 120).per_layer().items()}
        assert counts == {"conv1": 40, "conv2": 50, "fc": 30}  # 90 divided 13:16 = 40.3, 49.7
        counts = {n: c.kept for n, c in Layerwise("erk")(scores(), DENSE, 80).per_layer().items()}
        assert counts == {"conv1": 26, "conv2": 32, "fc": 22}

    def test_uniform_and_its_variant(self):
        uniform = Layerwise("uniform")(scores(), DENSE, TOTAL // 2).per_layer()
        assert all(count.density == pytest.approx(0.5, abs=0.02) for count in uniform.values())
        variant = Layerwise("uniform+")(scores(), DENSE, TOTAL // 2).per_layer()
        assert variant["conv1"].density == 1
        assert variant["conv2"].density == pytest.approx(variant["fc"].density, abs=0.02)
        for keep, floor in ((100, 0), (108, 0), (116, 4)):
            with pytest.raises(BudgetError, match="first layer"):
                Layerwise("uniform+", floor)(scores(), DENSE, keep)

    def test_like_other_masks(self):
        other = Global()(scores(1), DENSE, 77)
        same = allocation(other)(scores(2), DENSE, 77)
        assert same.per_layer() == other.per_layer() and same != other

    def test_a_layer_without_a_density_is_named(self):
        with pytest.raises(BudgetError, match="'fc'"):
            Layerwise({"conv1": 1, "conv2": 1})(scores(), DENSE, 10)

    @given(
        st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50), st.integers(0, 5)), min_size=1, max_size=6), st.data()
    )
    def test_apportion_stays_within_bounds(self, layers, data):
        names = range(len(layers))
        weights, sizes = {n: layers[n][0] for n in names}, {n: layers[n][1] for n in names}
        floors = {n: min(layers[n][2], sizes[n]) for n in names}
        total = data.draw(st.integers(sum(floors.values()), sum(sizes.values())))
        counts = apportion(weights, floors, sizes, total)
        assert sum(counts.values()) == total
        assert all(floors[n] <= counts[n] <= sizes[n] for n in names)


class TestBudgetErrors:
    def test_floors_above_the_budget(self):
        with pytest.raises(BudgetError, match="min_per_layer=20 needs 60"):
            allocation("global", 20)(scores(), DENSE, 30)
        with pytest.raises(BudgetError, match="0 or more"):
            allocation("global", -1)

    def test_more_than_there_is(self):
        for rule in ("global", "uniform"):
            with pytest.raises(BudgetError, match="may be kept"):
                allocation(rule)(scores(), DENSE, TOTAL + 1)

    def test_a_wrong_name_lists_the_nearest(self):
        with pytest.raises(ConfigError, match="Did you mean 'uniform'"):
            allocation("unifrom")

    @pytest.mark.trap(3)
    def test_densities(self):
        assert target_density(None, 0.98, None) == pytest.approx(0.02)
        assert target_density(None, None, 50) == pytest.approx(0.02)
        assert target_density(None, 0, None) == 1
        for words in [
            (0, None, None),
            (1.2, None, None),
            (None, 1, None),
            (None, 1.2, None),
            (None, None, 0.5),
            (None, -0.1, None),
        ]:
            with pytest.raises(BudgetError, match="must be"):
                target_density(*words)
        for words in [(None, None, None), (0.5, 0.5, None)]:
            with pytest.raises(BudgetError, match="exactly one"):
                target_density(*words)
        with pytest.raises(BudgetError, match=r"the least is 0\.001"):
            budget(0.0001, 1000)


class TestRounding:
    @given(st.floats(1e-3, 1), st.integers(1000, 10**7))
    def test_is_within_one_of_the_exact_product_on_its_side(self, density, total):
        exact, slack = fractions.Fraction(density) * total, fractions.Fraction(total, 10**15)
        assert abs(budget(density, total) - exact) <= 0.5 + slack
        assert exact - slack <= budget(density, total, "up") < exact + 1 + slack
        assert exact - 1 - slack < budget(density, total, "down") <= exact + slack

    def test_is_that_of_the_authors_double_precision(self):
        """Where the product is a whole number, theirs may be one beside it."""
        assert [budget(0.29, 100, rounding) for rounding in ("nearest", "up", "down")] == [29, 29, 28]
        assert [budget(0.9, 100, rounding) for rounding in ("nearest", "up", "down")] == [90, 91, 90]
        assert [budget(0.125, 100, rounding) for rounding in ("nearest", "up", "down")] == [12, 13, 12]

    def test_nothing_left_and_unknown_names(self):
        assert budget(0.001, 100, "up") == 1
        for rounding in ("nearest", "down"):
            with pytest.raises(BudgetError, match="keeps none of 100"):
                budget(0.001, 100, rounding)
        for call in (lambda: budget(0.5, 10, "upp"), lambda: Method(SynFlow(), rounding="upp")):
            with pytest.raises(ConfigError, match="Did you mean 'up'"):
                call()


class TestSchedules:
    @given(st.sampled_from(sorted(SCHEDULES)), st.floats(1e-4, 0.999), st.integers(1, 100))
    def test_decreasing_and_exact_at_the_end(self, name, density, rounds):
        steps = densities(name, density, rounds)
        assert len(steps) == rounds and steps[-1] == density
        assert all(1 >= a >= b - 1e-12 for a, b in itertools.pairwise(steps))

    def test_values(self):
        assert densities("exponential", 0.25, 2) == pytest.approx([0.5, 0.25])
        assert densities("linear", 0.5, 2) == pytest.approx([0.75, 0.5])
        assert densities("cubic", 0.2, 2) == pytest.approx([0.3, 0.2])
        with pytest.raises(ConfigError, match="exponential"):
            densities("exponentail", 0.5, 2)
        with pytest.raises(ConfigError, match="1 or more"):
            densities("linear", 0.5, 0)
