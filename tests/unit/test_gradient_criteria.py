"""Scores from gradients, and RIA, against numbers worked out by hand, for Linear and 3x3 Conv."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdcompress.criteria import LayerStats, load_criterion
from sdcompress.patterns import UNSTRUCTURED, keep_mask, parse_pattern

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 0.0, -1.0, 5.0]])
# The gradients of two samples. In the first column of the first row they cancel.
SAMPLES = torch.tensor(
    [
        [[3.0, 1.0, 0.0, -0.5], [0.5, 9.0, 2.0, 1.0]],
        [[-3.0, 2.0, 0.0, -0.5], [1.0, 7.0, -1.0, 1.0]],
    ],
    dtype=torch.float64,
)
STATS = LayerStats(
    recorded={
        "grad_mean": SAMPLES.mean(0),
        "grad_abs": SAMPLES.abs().mean(0),
        "grad_sq": (SAMPLES**2).mean(0),
    }
)
SCORES = {
    "taylor": [[3.0, 3.0, 0.0, 2.0], [3.0, 0.0, 1.5, 5.0]],
    "snip": [[0.0, 3.0, 0.0, 2.0], [3.0, 0.0, 0.5, 5.0]],
    "fisher": [[4.5, 5.0, 0.0, 2.0], [5.0, 0.0, 1.25, 12.5]],
}
# Four go, of all eight, and two of every four.
MASKS = {
    "taylor": ([[1, 1, 0, 0], [1, 0, 0, 1]], [[1, 1, 0, 0], [1, 0, 0, 1]]),
    "snip": ([[0, 1, 0, 1], [1, 0, 0, 1]], [[0, 1, 0, 1], [1, 0, 0, 1]]),
    "fisher": ([[1, 1, 0, 0], [1, 0, 0, 1]], [[1, 1, 0, 0], [1, 0, 0, 1]]),
}


def _score(name: str, weight: Tensor, stats: LayerStats) -> Tensor:
    score = load_criterion(name).score
    assert score is not None
    return score(weight, stats)


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_a_linear_layer(name: str) -> None:
    scores = _score(name, WEIGHT, STATS)
    assert scores.tolist() == SCORES[name]
    unstructured, groups = MASKS[name]
    assert keep_mask(scores, UNSTRUCTURED, 4, "tensor").int().tolist() == unstructured
    assert keep_mask(scores, parse_pattern("2:4"), 4, "tensor").int().tolist() == groups


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_a_conv(name: str) -> None:
    """Four input channels by a kernel of nine places, of which two are those of the Linear."""
    weight, samples = torch.ones(2, 4, 3, 3), torch.full((2, 2, 4, 3, 3), 8.0).double()
    weight[:, :, 0, 2], weight[:, :, 2, 1] = WEIGHT, -WEIGHT.flip(1)
    samples[..., 0, 2], samples[..., 2, 1] = SAMPLES, SAMPLES.flip(2)
    stats = LayerStats(
        recorded={
            "grad_mean": samples.mean(0),
            "grad_abs": samples.abs().mean(0),
            "grad_sq": (samples**2).mean(0),
        }
    )
    scores = _score(name, weight, stats)
    assert scores[:, :, 0, 2].tolist() == SCORES[name]
    assert scores[:, :, 2, 1].flip(1).tolist() == SCORES[name]
    assert scores[:, :, 1, 1].tolist() == [[{"fisher": 32.0}.get(name, 8.0)] * 4] * 2
    mask = keep_mask(scores, parse_pattern("2:4"), 36, "tensor")
    assert mask[:, :, 0, 2].int().tolist() == MASKS[name][1]  # along the channels
    assert mask[:, :, 1, 1].int().tolist() == [[0, 0, 1, 1]] * 2  # of equals the first ones go


def test_on_one_sample_they_all_say_the_same() -> None:
    """Then E g² = (E|g|)² = (E g)²."""
    g = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    stats = LayerStats(recorded={"grad_mean": g, "grad_abs": g.abs(), "grad_sq": g * g})
    taylor, snip, fisher = (_score(name, weight, stats) for name in SCORES)
    assert torch.equal(taylor, snip)
    torch.testing.assert_close(fisher, taylor**2 / 2)


def test_small_numbers_are_not_lost_in_half_precision() -> None:
    weight = torch.tensor([[1e-4, 2e-4]], dtype=torch.float16)
    small = torch.full((1, 2), 1e-9, dtype=torch.float64)
    for name in SCORES:
        stats = LayerStats(recorded=dict.fromkeys(("grad_mean", "grad_abs", "grad_sq"), small))
        scores = _score(name, weight, stats).float()
        assert 0 < scores[0, 0] < scores[0, 1]


def test_ria_of_a_linear_layer() -> None:
    """Rows add up to 10 and 10, columns to 5, 2, 4 and 9; the roots of the norms are 2, 1, 3, 0."""
    squares = torch.tensor([[16.0, 1.0, 81.0, 0.0]], dtype=torch.float64)
    criterion = load_criterion("ria")
    scores = _score("ria", WEIGHT, LayerStats(recorded={"input_sq_norm": squares}))
    expected = [[0.6, 1.2, 3.15, 0.0], [2.4, 0.0, 1.05, 0.0]]
    torch.testing.assert_close(
        scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )
    mask = keep_mask(scores, UNSTRUCTURED, 4, criterion.compare)  # two of each row
    assert mask.int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]]


def test_ria_of_a_conv() -> None:
    """A row is all of an output's kernel; a column is one place of it, over the outputs."""
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 0, 0, 0], weight[0, 1, 2, 2] = 1.0, 3.0
    weight[1, 0, 0, 0], weight[1, 1, 1, 1] = -3.0, 1.0
    squares = torch.ones(1, 2, 3, 3, dtype=torch.float64)
    squares[0, 1, 2, 2] = 16.0
    scores = _score("ria", weight, LayerStats(recorded={"input_sq_norm": squares}))
    expected = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    expected[0, 0, 0, 0] = 1 / 4 + 1 / 4
    expected[0, 1, 2, 2] = 2 * (3 / 4 + 3 / 3)
    expected[1, 0, 0, 0] = 3 / 4 + 3 / 4
    expected[1, 1, 1, 1] = 1 / 4 + 1 / 1
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)


def test_ria_saves_what_is_alone_in_its_column() -> None:
    """What magnitude would cut off first."""
    weight = torch.tensor([[0.1, 5.0, 6.0], [0.0, 7.0, 8.0]])
    squares = torch.ones(1, 3, dtype=torch.float64)
    scores = _score("ria", weight, LayerStats(recorded={"input_sq_norm": squares}))
    assert keep_mask(scores, UNSTRUCTURED, 2, "row").int().tolist() == [[1, 0, 1], [0, 1, 1]]
    magnitude = _score("magnitude", weight, LayerStats())
    assert keep_mask(magnitude, UNSTRUCTURED, 2, "row").int().tolist() == [[0, 1, 1], [0, 1, 1]]


def test_ria_of_empty_rows_and_columns_is_zero() -> None:
    weight = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    squares = torch.ones(1, 2, dtype=torch.float64)
    scores = _score("ria", weight, LayerStats(recorded={"input_sq_norm": squares}))
    assert scores.tolist() == [[0.0, 2.0], [0.0, 0.0]]
