"""Cliffs by hand, and how often the interval holds the true one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdcompress.errors import UsageError
from sdcompress.evaluation.quality import Estimate, MetricResult
from sdcompress.sweep.cliff import BY_ESTIMATES, BY_PROMPTS, find_cliff


def _accuracy(values: list[float], dense: list[float]) -> MetricResult:
    mean, dense_mean = (sum(v) / len(v) for v in (values, dense))
    return MetricResult(
        metric="prompt_accuracy",
        unit="share",
        better="higher",
        model=Estimate(value=mean, low=0, high=1),
        dense=Estimate(value=dense_mean, low=0, high=1),
        samples=len(values),
        values=tuple(values),
        dense_values=tuple(dense),
    )


def _certain(*shares: float) -> list[tuple[float, MetricResult]]:
    """Points at 0.1, 0.2, … where every prompt has the same value: nothing is left to chance."""
    return [((i + 1) / 10, _accuracy([share] * 4, [1.0] * 4)) for i, share in enumerate(shares)]


def _distance(value: float, low: float, high: float) -> MetricResult:
    return MetricResult(
        metric="clip_distance",
        unit="1",
        better="lower",
        model=Estimate(value=value, low=low, high=high),
        floor=Estimate(value=2.0, low=1.5, high=2.5),
        samples=50,
    )


@pytest.mark.parametrize(
    ("shares", "within", "beyond", "text", "interval"),
    [
        ((1.0, 0.95, 0.8), 0.2, 0.3, "0.2", "0.2 to 0.3"),
        ((1.0, 0.9, 0.9), 0.3, None, "beyond 0.3", "0.3 to beyond 0.3"),
        ((0.5, 0.4, 0.3), None, 0.1, "below 0.1", "below 0.1 to 0.1"),
        # It recovers, and that does not count: the cliff is before the first that leaves.
        ((1.0, 0.8, 1.0, 0.7), 0.1, 0.2, "0.1", "0.1 to 0.2"),
    ],
)
def test_without_chance_the_cliff_is_where_it_is(
    shares: tuple[float, ...],
    within: float | None,
    beyond: float | None,
    text: str,
    interval: str,
) -> None:
    cliff = find_cliff(list(reversed(_certain(*shares))), 0.9, resamples=50)
    assert (cliff.last_within, cliff.first_beyond) == (within, beyond)
    assert (cliff.low, cliff.high) == (within, beyond)
    assert (str(cliff), cliff.interval) == (text, interval)
    assert cliff.how == BY_PROMPTS


def test_resamples_are_paired() -> None:
    """Model and dense fail the same prompts: the ratio is 1 in every resample."""
    hits = [1.0] * 10 + [0.0] * 10
    cliff = find_cliff([(0.5, _accuracy(hits, hits))], 1.0, resamples=200)
    assert (cliff.low, cliff.high) == (0.5, None)
    # The same shares, on other prompts, are not sure at all.
    apart = find_cliff([(0.5, _accuracy(hits, hits[::-1]))], 1.0, resamples=200)
    assert (apart.last_within, apart.low, apart.high) == (0.5, None, None)


def test_the_interval_of_two_prompts_by_hand() -> None:
    """One of two prompts fails at 0.2; a quarter of the draws has it twice, another never."""
    curve = [
        (0.1, _accuracy([1.0, 1.0], [1.0, 1.0])),
        (0.2, _accuracy([1.0, 0.0], [1.0, 1.0])),
        (0.3, _accuracy([0.0, 0.0], [1.0, 1.0])),
    ]
    cliff = find_cliff(curve, 0.6)
    assert (cliff.last_within, cliff.first_beyond) == (0.1, 0.2)
    assert (cliff.low, cliff.high) == (0.1, 0.3)


def test_a_distance_has_its_own_interval() -> None:
    curve = [(0.4, _distance(2.0, 1.0, 3.0)), (0.5, _distance(3.5, 2.0, 4.5)),
             (0.6, _distance(5.0, 3.9, 6.0)), (0.7, _distance(9.0, 8.0, 10.0))]  # fmt: skip
    # At most twice the floor of 2: 4. At the worse ends 0.4 is the last; at the better ones 0.6.
    cliff = find_cliff(curve, 2.0)
    assert (cliff.last_within, cliff.first_beyond) == (0.5, 0.6)
    assert (cliff.low, cliff.high) == (0.4, 0.7)
    assert cliff.how == BY_ESTIMATES


def test_what_is_no_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        find_cliff([], 0.9)
    mixed = [(0.1, _accuracy([1.0] * 4, [1.0] * 4)), (0.2, _accuracy([1.0] * 5, [1.0] * 5))]
    with pytest.raises(ValueError, match="same prompts"):
        find_cliff(mixed, 0.9)
    with pytest.raises(UsageError, match="choose another metric"):
        find_cliff([(0.1, _accuracy([0.0] * 4, [0.0] * 4))], 0.9)


def test_the_true_cliff_is_inside_about_95_times_in_100() -> None:
    """Simulated prompts: the chance to fail grows smoothly with sparsity, past a known cliff."""
    limit, true_cliff, width = 0.8, 0.5, 0.05
    grid = [0.38, 0.42, 0.46, 0.49, 0.51, 0.54, 0.58, 0.62]
    # share(s) = 1 / (1 + exp((s − m) / width)) is `limit` at the cliff
    middle = true_cliff - width * math.log(1 / limit - 1)
    shares = [1 / (1 + math.exp((s - middle) / width)) for s in grid]
    rng = np.random.default_rng(7)
    runs, inside, widths = 100, 0, []
    for _ in range(runs):
        difficulty = rng.random(60)  # the same prompts at every sparsity
        curve = [
            (s, _accuracy((difficulty < share).astype(float).tolist(), [1.0] * 60))
            for s, share in zip(grid, shares, strict=True)
        ]
        cliff = find_cliff(curve, limit, resamples=100)
        low, high = cliff.low or 0.0, cliff.high or 1.0
        inside += low <= true_cliff <= high
        widths.append(high - low)
    assert 0.92 <= inside / runs <= 1.0
    assert np.median(widths) < 0.2  # and not by saying nothing
