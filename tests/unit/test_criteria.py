"""Every criterion keeps its contract; a new file is tested as soon as it appears."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdcompress import registry
from sdcompress.criteria import (
    DATA_FREE,
    GRADIENTS,
    STATISTICS,
    Criterion,
    LayerStats,
    for_weights,
    load_criterion,
)
from sdcompress.patterns import UNSTRUCTURED, Select, keep_mask

WEIGHTS = {"linear": torch.randn(6, 8), "conv": torch.randn(6, 8, 3, 3)}


def _recorded(weight: torch.Tensor, names: frozenset[str]) -> dict[str, torch.Tensor]:
    """Statistics of the shapes that `LayerStats` describes."""
    generator = torch.Generator().manual_seed(0)
    inputs = weight[0].numel()
    x = torch.randn(inputs, 100, generator=generator, dtype=torch.float64)
    shapes = dict.fromkeys(GRADIENTS, weight.shape)
    return {
        name: x @ x.T
        if name.endswith("hessian")
        else torch.rand(
            shapes.get(name, (1, *weight.shape[1:])), generator=generator, dtype=torch.float64
        )
        for name in sorted(names & STATISTICS)
    }


@pytest.mark.parametrize("name", for_weights())
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_criterion_is_pure_and_shaped_like_its_weight(name: str, kind: str) -> None:
    criterion, weight = load_criterion(name), WEIGHTS[kind]
    before = weight.clone()
    stats = LayerStats(3, _recorded(weight, criterion.needs))

    def run() -> tuple[torch.Tensor, ...]:
        if criterion.score:
            return (criterion.score(weight, stats),)
        assert criterion.solve
        select = Select(UNSTRUCTURED, tuple(weight.shape), weight.numel() // 2)
        mask, solved = criterion.solve(weight, stats, select)
        assert mask.dtype == torch.bool
        assert int((~mask).sum()) == weight.numel() // 2
        assert not solved[~mask].any()
        return mask, solved

    first, second = run(), run()
    for a, b in zip(first, second, strict=True):
        assert a.shape == weight.shape
        assert torch.equal(a, b)
        assert a.isfinite().all()
    assert torch.equal(weight, before)


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


@pytest.mark.parametrize("name", registry.names("criteria"))
def test_a_criterion_says_what_it_is_and_needs(name: str) -> None:
    assert registry.summary("criteria", name), "the first line of the docstring is its description"
    assert load_criterion(name).needs <= DATA_FREE | STATISTICS


def test_a_criterion_scores_or_solves_or_judges_groups() -> None:
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"score": min, "solve": min},
        {"score": min, "group": True},
    )
    for several in cases:
        with pytest.raises(TypeError, match="exactly one"):
            Criterion(**several)
    assert set(registry.names("criteria")) - set(for_weights()) == {"obs"}
