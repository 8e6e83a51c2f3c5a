"""The closed form's layer densities against the published estimator's (slow; see docs/closed-form.md)."""

import pytest

from sapwood import Method, NtkSap, models, prune
from test_paper import AUTHORS

DENSITY, SHAPE = 0.8**18, (3, 32, 32)


def allocation(counts: dict[str, float]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: kept / total for name, kept in counts.items()}


def mean_allocation(results) -> dict[str, float]:
    names = results[0].masks
    return allocation({name: sum(r.masks.per_layer()[name].kept for r in results) for name in names})


def variation(one: dict[str, float], other: dict[str, float]) -> float:
    """Total variation: the share of the kept weights that lie in other layers."""
    return sum(abs(one[name] - other[name]) for name in one) / 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_resnet20_allocates_as_the_authors_code():
    """Three seeds of the faithful mode against the middle of five seeds of the authors' code."""
    model = models.create("resnet20")
    results = [prune(model, method="ntk-sap-analytic", density=DENSITY, input_shape=SHAPE, seed=s) for s in range(3)]
    sizes = {name: count.total for name, count in results[0].masks.per_layer().items()}
    authors = {f"{n}.weight": sum(bounds) / 2 * sizes[f"{n}.weight"] for n, bounds in AUTHORS.items()}
    assert variation(mean_allocation(results), allocation(authors)) <= 0.07


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_vgg16_allocates_roughly_as_the_published_estimator():
    """Fewer draws than published (3 of 16 inputs a round, or it would take half an hour), so the tolerance is wide."""
    model = models.create("vgg16-bn")
    closed = prune(model, method="ntk-sap-analytic", density=DENSITY, input_shape=SHAPE)
    few = Method(NtkSap(resamples=3, samples=16, batch_size=16), rounds=20)
    drawn = prune(model, method=few, density=DENSITY, input_shape=SHAPE)
    assert variation(mean_allocation([closed]), mean_allocation([drawn])) <= 0.2
