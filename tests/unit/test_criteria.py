"""Every criterion and allocation keeps its contract; a new file is tested as soon as it appears."""

from __future__ import annotations

import pytest
import torch

from sdcompress import registry
from sdcompress.allocation import allocate
from sdcompress.criteria import STATISTICS, Criterion, LayerStats, load_criterion
from sdcompress.patterns import UNSTRUCTURED, keep_mask
from sdcompress.plan import LayerPlan

WEIGHTS = {"linear": torch.randn(6, 8), "conv": torch.randn(6, 8, 3, 3)}


@pytest.mark.parametrize("name", registry.names("criteria"))
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_criterion_is_pure_and_shaped_like_its_weight(name: str, kind: str) -> None:
    criterion, weight = load_criterion(name), WEIGHTS[kind]
    assert registry.summary("criteria", name), "the first line of the docstring is its description"
    assert criterion.score is not None
    before = weight.clone()
    recorded = {
        name: torch.rand((1, *weight.shape[1:]), dtype=torch.float64)
        for name in sorted(criterion.needs & STATISTICS)
    }
    first = criterion.score(weight, LayerStats(3, recorded))
    second = criterion.score(weight, LayerStats(3, recorded))
    assert first.shape == weight.shape
    assert torch.equal(first, second)
    assert torch.equal(weight, before)
    assert first.isfinite().all()


def test_magnitude_keeps_the_largest() -> None:
    criterion = load_criterion("magnitude")
    assert criterion.score is not None
    scores = criterion.score(torch.tensor([[1.0, -8.0, 3.0, -2.0]]), LayerStats())
    assert keep_mask(scores, UNSTRUCTURED, 2, "tensor").int().tolist() == [[0, 1, 1, 0]]


def test_random_is_seeded() -> None:
    score = load_criterion("random").score
    assert score is not None
    weight = torch.zeros(32, 32)
    a, b = score(weight, LayerStats(seed=1)), score(weight, LayerStats(seed=2))
    assert not torch.equal(a, b)


def test_a_criterion_either_scores_or_solves() -> None:
    with pytest.raises(TypeError, match="exactly one"):
        Criterion()


def _layer(name: str, numel: int, zeros: int | None) -> LayerPlan:
    return LayerPlan(
        component="unet",
        name=name,
        kind="linear",
        shape=(1, numel),
        dtype="F32",
        asked=0.5,
        zeros=zeros,
    )


@pytest.mark.parametrize("name", registry.names("allocation"))
def test_an_allocation_covers_every_layer_once_and_keeps_the_total(name: str) -> None:
    layers = [_layer("a", 10, 5), _layer("b", 30, 15)]
    groups = allocate(name, layers)
    assert [p for g in groups for p in g.layers] == layers
    assert sum(g.zeros for g in groups) == 20
    assert registry.summary("allocation", name)
