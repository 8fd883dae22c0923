"""Who is better, and how sure that is: paired by prompt, at 95 %."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sdcompress.evaluation.statistics import mean_interval, spread_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ENOUGH = 0.05  # of an accuracy; a wider half-width decides nothing
ALIKE = 1.25  # two distances whose ratio surely lies within this factor are as good as equal
TWICE = 2.0
_NORMAL = 1.96  # half-width of a 95 % interval in standard deviations


class Interval(NamedTuple):
    """A figure and its 95 % interval, infinite where there is no bound."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def as_json(self, digits: int = 4) -> dict[str, float | None]:
        """None for what is infinite."""
        return {
            name: round(x, digits) if math.isfinite(x) else None
            for name, x in self._asdict().items()
        }


class Measured(NamedTuple):
    """accuracy: one value a prompt. above: the Fréchet distance to dense less the floor, first of
    the pictures as they are, then of each resample of the prompts; resamples are the same for all.
    """

    accuracy: Floats
    above: Floats


def mean(values: Floats) -> Interval:
    return Interval(*mean_interval(values))


def spread(values: Floats) -> Interval:
    """Of a figure and its resamples: see `Measured.above`."""
    value = float(values[0])
    return Interval(value, *spread_interval(value, values[1:]))


def ratio(a: Floats, b: Floats) -> Interval:
    """a / b with its interval by Fieller (1954): all k for which a − k·b may be 0.

    Unlike the spread of ratios it holds where b may be 0 too: there, no k is too large.
    """
    value = float(a[0] / b[0]) if b[0] > 0 else math.inf
    (vaa, vab), (_, vbb) = np.cov(a[1:], b[1:]) * _NORMAL**2
    square, cross, rest = b[0] ** 2 - vbb, a[0] * b[0] - vab, a[0] ** 2 - vaa
    inside = cross**2 - square * rest
    if square == 0 or inside < 0 or b[0] <= 0:
        return Interval(value, -math.inf, math.inf)
    low, high = sorted((cross + sign * math.sqrt(inside)) / square for sign in (-1, 1))
    if square > 0:
        return Interval(value, low, high)
    # All but what is between them, and of that the side on which the ratio is.
    return Interval(value, high, math.inf) if value >= high else Interval(value, -math.inf, low)


def at_least_as_good(ours: Measured, other: Measured) -> dict[str, Any]:
    """Whether ours is at least as good as another, by accuracy and by distance.

    "no" is said where the interval excludes it. Where it leaves both open, "yes" if it is narrow
    enough to call them alike (`ENOUGH`, `ALIKE`), else "inconclusive". `times` is how many times as
    far from dense the other is.
    """
    difference = mean(ours.accuracy - other.accuracy)
    times = ratio(other.above, ours.above)
    alike = times.low >= 1 / ALIKE and times.high <= ALIKE
    return {
        "accuracy": _verdict(difference, alike=difference.half_width <= ENOUGH),
        "accuracy_difference": difference,
        "distance": _verdict(spread(other.above - ours.above), alike=alike),
        "times": times,
    }


def _verdict(better_by: Interval, *, alike: bool) -> str:
    if better_by.high < 0:
        return "no"
    return "yes" if better_by.low >= 0 or alike else "inconclusive"


def closest(measured: Mapping[str, Measured], than: str = "magnitude") -> dict[str, Any]:
    """The method closest to dense, and whether it is twice as close as magnitude."""
    best = min(measured, key=lambda name: measured[name].above[0])
    far, near = measured[than].above, measured[best].above
    twice = "no" if best == than else _verdict(spread(far - TWICE * near), alike=False)
    return {"method": best, "times": ratio(far, near), "twice": twice}


def overall(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    """ "no" if it is so anywhere, else "inconclusive" if it is so anywhere, else "yes"."""
    found = {v[kind] for v in verdicts.values() for kind in ("accuracy", "distance")}
    return next((v for v in ("no", "inconclusive") if v in found), "yes")
