"""Intervals and the Fréchet distance, against closed forms and other implementations."""

from __future__ import annotations

import numpy as np
import pytest

from sdcompress.evaluation.statistics import (
    Gaussian,
    frechet_distance,
    gaussian,
    mean_interval,
    resamplings,
    spread_interval,
)


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    error = values.std() / np.sqrt(400)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert mean_interval(values) == (mean, low, high)


def test_draws_do_not_depend_on_how_they_are_cut_into_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sdcompress.evaluation import statistics

    values = np.random.default_rng(2).normal(size=50)
    whole = mean_interval(values)
    monkeypatch.setattr(statistics, "_BLOCK", 50 * 7)
    assert mean_interval(values) == whole


def test_values_that_all_agree_have_no_spread() -> None:
    assert mean_interval(np.ones(10)) == (1.0, 1.0, 1.0)


def test_distance_of_normals_whose_axes_agree() -> None:
    # Then it is |Δμ|² + Σ (√a − √b)²: 9 + 16 + (1 − 2)² + (3 − 5)² = 30.
    a = Gaussian(np.zeros(2), np.diag([1.0, 9.0]), None)
    b = Gaussian(np.array([3.0, 4.0]), np.diag([4.0, 25.0]), None)
    assert frechet_distance(a, b) == pytest.approx(30)
    assert frechet_distance(b, a) == pytest.approx(30)


def test_distance_of_normals_whose_axes_differ() -> None:
    """In two dimensions tr √M = √(tr M + 2 √det M), which needs no eigenvalues."""
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    product = a @ b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    zero = np.zeros(2)
    assert frechet_distance(Gaussian(zero, a, 9), Gaussian(zero, b, 9)) == pytest.approx(expected)


def test_a_set_has_no_distance_from_itself_even_without_full_rank() -> None:
    few = gaussian(np.random.default_rng(0).normal(size=(5, 40)))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)


def test_distance_agrees_with_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Mean(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        num_features = 3

        def forward(self, pictures):  # type: ignore[no-untyped-def]
            return pictures.double().mean((2, 3))

    rng = np.random.default_rng(0)
    real, made = (rng.integers(0, top, (50, 3, 4, 4)).astype(np.uint8) for top in (255, 200))
    theirs = fid.FrechetInceptionDistance(Mean()).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(real), real=True)
    theirs.update(torch.from_numpy(made), real=False)
    a, b = (gaussian(x.astype(float).mean((2, 3))) for x in (real, made))
    assert frechet_distance(a, b) == pytest.approx(float(theirs.compute()), rel=1e-9)


def test_counting_a_sample_twice_is_having_it_twice() -> None:
    features = np.random.default_rng(3).normal(size=(4, 3)) + 100
    times = np.array([2.0, 0.0, 1.0, 1.0])
    counted, repeated = gaussian(features, times), gaussian(features[[0, 0, 2, 3]])
    np.testing.assert_allclose(counted.mean, repeated.mean)
    np.testing.assert_allclose(counted.covariance, repeated.covariance)
    assert counted.count == repeated.count == 4
    np.testing.assert_allclose(repeated.covariance, np.cov(features[[0, 0, 2, 3]].T))


def test_resamplings_are_seeded_and_fewer_where_features_are_wide() -> None:
    first = list(resamplings(10, 64))
    assert len(first) == 100
    assert len(list(resamplings(10, 2048))) == 20
    assert all(times.sum() == 10 for times in first)
    assert all(np.array_equal(a, b) for a, b in zip(first, resamplings(10, 64), strict=True))


def test_the_interval_of_a_distance_lies_around_what_was_measured() -> None:
    # The resamples lie above the value, as those of distances do; their spread is 1.
    assert spread_interval(5.0, np.array([9.0, 10.0, 11.0])) == pytest.approx((3.04, 6.96))
