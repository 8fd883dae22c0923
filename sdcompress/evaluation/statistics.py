"""Means with intervals, and the Fréchet distance of two sets of features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RESAMPLES = 2000
_BLOCK = 1 << 22  # how many drawn indices are held at a time
_TAIL = (0.025, 0.975)
_NORMAL = 1.96  # half-width of a 95 % interval in standard deviations


def mean_interval(values: Floats, seed: int = 0) -> tuple[float, float, float]:
    """The mean of one value a prompt and its 95 % percentile bootstrap interval over prompts.

    The same number of values always gives the same draws, so that the figures of several models
    on the same prompts move together. Where all values agree, the interval is empty: what a sample
    never shows, resampling it cannot show either.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    n = len(values)
    rows = max(1, _BLOCK // n)
    means = np.concatenate(
        [
            values[rng.integers(0, n, (min(rows, RESAMPLES - done), n))].mean(axis=1)
            for done in range(0, RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means, _TAIL)
    mean = float(values.mean())
    return mean, min(mean, float(low)), max(mean, float(high))


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and covariance [d, d] of features, and of how many; None where nobody said."""

    mean: Floats
    covariance: Floats
    count: int | None


def gaussian(features: Floats, times: Floats | None = None) -> Gaussian:
    """Of features [n, d], the i-th counted `times[i]` times; the covariance is divided by n − 1."""
    import numpy as np

    weights = np.ones(len(features)) if times is None else times
    n = weights.sum()
    mean = weights @ features / n
    centred = (features - mean) * np.sqrt(weights)[:, None]
    return Gaussian(mean, centred.T @ centred / (n - 1), int(n))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """‖μa − μb‖² + tr(A + B − 2 (A B)^½), the squared 2-Wasserstein distance of two normals.

    Dowson & Landau 1982. (A B)^½ has the trace of (A^½ B A^½)^½, which is symmetric, so that its
    eigenvalues are real and computed stably even where a covariance is not of full rank.
    """
    import numpy as np

    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    shared = np.sqrt(np.maximum(product, 0)).sum()
    apart = np.square(a.mean - b.mean).sum()
    distance = apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(0.0, float(distance))


def resamplings(n: int, dimension: int, seed: int = 0) -> Iterator[Floats]:
    """How often each of n samples is drawn, once for each resample; fewer where features are wide.

    The cost of a distance grows with the cube of the dimension; a standard deviation needs few.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    for _ in range(100 if dimension <= 512 else 20):
        yield np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)


def spread_interval(value: float, resampled: Floats) -> tuple[float, float]:
    """A distance's 95 % interval: 1.96 standard deviations of its resamples to either side.

    Not their percentiles: a resample repeats samples, which makes every distance larger than the
    one that was measured, so only how far they scatter is used.
    """
    import numpy as np

    half = _NORMAL * float(np.std(resampled, ddof=1))
    return value - half, value + half
