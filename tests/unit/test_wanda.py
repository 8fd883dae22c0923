"""Wanda on weights small enough to do by hand."""

from __future__ import annotations

import torch

from sdcompress.criteria import LayerStats, load_criterion
from sdcompress.patterns import UNSTRUCTURED, Pattern, keep_mask, planned_zeros

WANDA = load_criterion("wanda")


def _score(weight: torch.Tensor, sq_norm: torch.Tensor) -> torch.Tensor:
    assert WANDA.score is not None
    return WANDA.score(weight, LayerStats(recorded={"input_sq_norm": sq_norm}))


def test_a_linear_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [8.0, 7.0, 6.0, 5.0]])
    scores = _score(weight, torch.tensor([[64.0, 9.0, 4.0, 1.0]], dtype=torch.float64))
    assert scores.tolist() == [[8, 6, 6, 4], [64, 21, 12, 5]]
    # Half of each row goes; of the two equal scores the first.
    zeros = planned_zeros(UNSTRUCTURED, (2, 4), 0.5)
    mask = keep_mask(scores, UNSTRUCTURED, zeros, WANDA.compare)
    assert mask.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]


def test_a_conv_by_hand() -> None:
    """One output channel is all large, yet each loses the same: rows are output channels."""
    weight = torch.ones(2, 2, 3, 3)
    weight[1] *= 100
    sq_norm = torch.arange(1.0, 19).reshape(1, 2, 3, 3) ** 2
    scores = _score(weight, sq_norm.double())
    assert scores[1, 1].tolist() == [[1000, 1100, 1200], [1300, 1400, 1500], [1600, 1700, 1800]]
    zeros = planned_zeros(UNSTRUCTURED, (2, 2, 3, 3), 0.5)
    mask = keep_mask(scores, UNSTRUCTURED, zeros, WANDA.compare)
    assert mask.int().tolist() == [[[[0] * 3] * 3, [[1] * 3] * 3]] * 2


def test_two_to_four_of_a_conv_runs_along_its_input_channels() -> None:
    weight = torch.ones(1, 4, 1, 2)
    sq_norm = torch.tensor([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]]).reshape(1, 4, 1, 2)
    mask = keep_mask(_score(weight, sq_norm.double()), Pattern(2, 4), 4, WANDA.compare)
    assert mask[0, :, 0, 0].tolist() == [False, False, True, True]
    assert mask[0, :, 0, 1].tolist() == [True, True, False, False]


def test_equal_norms_leave_magnitude_within_the_row() -> None:
    magnitude = load_criterion("magnitude").score
    assert magnitude is not None
    for shape in ((6, 8), (6, 4, 3, 3)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        sq_norm = torch.full((1, *shape[1:]), 3.7, dtype=torch.float64)
        for pattern in (UNSTRUCTURED, Pattern(2, 4)):
            zeros = planned_zeros(pattern, shape, 0.4)
            one = keep_mask(_score(weight, sq_norm), pattern, zeros, "row")
            other = keep_mask(magnitude(weight, LayerStats()), pattern, zeros, "row")
            assert torch.equal(one, other)
