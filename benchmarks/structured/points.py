"""What is measured of the quality: the points, their order, and how each is made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.criteria import points as criteria_points
from benchmarks.criteria.points import CALIBRATION, TWO_FOUR
from sdcompress.bundle import to_json
from sdcompress.recipe import Recipe, Tune

CRITERIA = ("magnitude", "random", "wanda", "taylor", "fisher", "obs")
REFIT = ", refit"  # what stays fitted anew, as obs does of itself
TUNED = ("magnitude", "obs")
MACS = (0.85, 0.7, 0.5)
MAIN = (("macs", 0.7), ("latency", 0.75))  # the budgets whose speed is measured
TUNE = Tune(method="distill", steps=600, learning_rate=1e-3, warmup=20)
# Which weights go in 2:4, after the blocks; the criterion that goes with each choice of blocks.
AFTER = {"magnitude": "magnitude", "obs": "obs_refit"}


class Point(NamedTuple):
    """The UNet with blocks chosen by `method` until a `share` of what `budget` counts is left.

    `pattern` is what is pruned after that, in every Linear and Conv, "" for nothing.
    """

    method: str
    budget: str
    share: float
    pattern: str = ""
    tuned: bool = False

    @property
    def name(self) -> str:
        """For files."""
        words = (f"{self.budget}{self.share:g}", self.pattern, self.method, "tuned" * self.tuned)
        text = "-".join(filter(None, words))
        return text.translate({ord(":"): "to", ord(" "): "-", ord(","): None})

    def __str__(self) -> str:
        then = f", then {self.pattern}" if self.pattern else ""
        tuned = ", tuned" if self.tuned else ""
        return f"{self.budget} {self.share:g} {self.method}{then}{tuned}"


def all_points() -> list[Point]:
    """Every point once, the most telling first."""
    methods = (*CRITERIA, f"magnitude{REFIT}")
    found = [Point(method, *MAIN[0]) for method in methods]
    for budget in MAIN:
        found += [Point(method, *budget) for method in TUNED]
        found += [Point(method, *budget, tuned=True) for method in TUNED]
        found += [Point(method, *budget, TWO_FOUR, tuned=True) for method in TUNED]
        found += [Point(method, *budget, TWO_FOUR) for method in TUNED]
    found += [Point(method, "macs", share) for share in MACS for method in methods]
    return list(dict.fromkeys(found))


def recipe(point: Point, table: Path) -> Recipe:
    """`table`: the latencies that a budget of latency is spent by."""
    criterion = point.method.removesuffix(REFIT)
    structure: dict[str, Any] = {
        "budget": {point.budget: point.share},
        "rules": [{"criterion": criterion, "refit": point.method.endswith(REFIT)}],
    }
    if point.budget == "latency":
        structure["table"] = str(table)
    unet: dict[str, Any] = {"structure": structure}
    if point.pattern:
        rule = {"scope": "all", "criterion": AFTER[criterion], "pattern": point.pattern}
        unet["rules"] = [rule]
    given = {"name": "point", "prune": {"unet": unet}, "calibration": CALIBRATION}
    return Recipe.model_validate(given)


def protocol(samples: int) -> str:
    """A digest of all that an answer depends on, but for its point, the latency table and the code
    of sdcompress.
    """
    made_of = [criteria_points.protocol(samples), TUNE.model_dump(mode="json")]
    return hashlib.sha256(to_json(made_of).encode()).hexdigest()[:16]
