"""A sweep from its points to its page, going on from whatever was done before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sdcompress.bundle import Bundle, write_text
from sdcompress.catalog import read_catalog
from sdcompress.errors import InputError, UsageError
from sdcompress.evaluation.metrics import Score, load_metric, metric_names
from sdcompress.evaluation.quality import QualitySettings
from sdcompress.plan import make_plan
from sdcompress.recipe import Recipe
from sdcompress.sweep.outcome import Sweep, gather, table
from sdcompress.sweep.points import (
    Point,
    PointResult,
    alone,
    contact_strip,
    point_digest,
    point_recipe,
    read_point,
    save_point,
)

RESULTS, SWEEP, PAGE = "results.csv", "sweep.json", "report.html"
DEFAULT_KEEP = {"clip_score": 0.98, "prompt_accuracy": 0.95}
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


def sweep(
    dense: Bundle,
    points: Sequence[Point],
    settings: QualitySettings,
    out: Path,
    *,
    keep: Mapping[str, float] | None = None,
    base: Recipe | None = None,
    preset: str | None = None,
    jobs: int = 1,
    address: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Sweep:
    """Measure every point and write results.csv, sweep.json, plot.svg, plot.png and report.html.

    Points that `out` has an answer of are not measured again, those that failed are. `keep` is the
    tolerance that cliffs are found by: metric → limit, see `evaluation.quality.margin`. `base` is
    the recipe whose seed, calibration and tuning the points use. With `address`, points are tasks
    of a Ray cluster.

    Raises:
        UsageError: a point does not fit the model, a metric cannot run, or `keep` names another.
        InputError: another sweep or search is at work in `out`, it cannot be written, or files that
            the settings name changed meanwhile.
    """
    from sdcompress.evaluation.pictures import dense_pictures
    from sdcompress.evaluation.pictures import make as make_pictures

    keep = _tolerance(keep, settings)
    for name in settings.metrics:
        if why := load_metric(name).why_not(settings, dense):
            raise UsageError(f"{name}: {why}")
    catalog = read_catalog(dense.path)
    recipes = [point_recipe(point, base) for point in points]
    for recipe in recipes:
        make_plan(recipe, catalog)
    digests = [point_digest(dense, recipe, settings) for recipe in recipes]
    with alone(out):
        known = {digest: read_point(out, digest) for digest in digests}
        answers = {digest: answer for digest, answer in known.items() if answer and answer.quality}
        left = {d: r for d, r in zip(digests, recipes, strict=True) if d not in answers}
        total = len(known)
        held_against = dense_pictures(dense, settings, out)
        made = 0

        def count(more: int) -> None:
            nonlocal made
            made += more
            progress("pictures of the dense model", made, 2 * len(settings.prompts))

        def within_point(done: int, of: int) -> None:
            progress("pictures of a point", done, of)

        make_pictures(held_against, count)
        progress("points", len(answers), total)
        if left:
            asked = list(left.values())
            for answer in _run(asked, dense, settings, out, jobs, address, within_point):
                save_point(out, answer)
                answers[answer.digest] = answer
                progress("points", len(answers), total)
        if not answers.keys() >= set(digests):
            raise InputError(
                f"{out}: files that the settings name changed while points were measured; repeat "
                "the command"
            )
        results = [(p, answers[d]) for p, d in zip(points, digests, strict=True)]
        outcome = gather(dense, results, settings, keep, preset)
        _write_outcome(out, outcome, list(answers.values()), contact_strip(held_against[0]))
        return outcome


def _run(
    recipes: Sequence[Recipe],
    dense: Bundle,
    settings: QualitySettings,
    out: Path,
    jobs: int,
    address: str | None,
    progress: Callable[[int, int], None],
) -> Iterator[PointResult]:
    if address:
        from sdcompress.sweep.on_ray import run_on_ray

        return run_on_ray(recipes, dense, settings, out, address=address, jobs=jobs)
    from sdcompress.sweep.processes import run_here

    jobs = min(jobs, len(recipes))
    return run_here(recipes, dense, settings, out, jobs=jobs, progress=progress)


def _write_outcome(out: Path, outcome: Sweep, answers: Sequence[PointResult], dense: str) -> None:
    """Write everything that people and programs read; `dense`: a strip of its pictures."""
    from sdcompress.sweep.page import render
    from sdcompress.sweep.plot import draw

    write_text(out / RESULTS, table(outcome))
    write_text(out / SWEEP, outcome.model_dump_json(indent=1) + "\n")
    strips = {answer.digest: answer.pictures for answer in answers}
    write_text(out / PAGE, render(outcome, draw(outcome, out), strips, dense))


def parse_keep(texts: Iterable[str]) -> dict[str, float]:
    """Metric → limit, from texts such as "clip_score=0.98"; what it means, `quality.margin` says.

    Raises:
        UsageError: one is malformed, unknown or given twice, or a limit is not above 0 or one that
            the dense model itself does not keep.
    """
    found: dict[str, float] = {}
    for text in texts:
        metric, _, number = (part.strip() for part in text.partition("="))
        if metric not in metric_names():
            raise UsageError(
                f"--keep {text}: expected METRIC=LIMIT with one of {', '.join(metric_names())}, "
                f"found {metric!r}"
            )
        if metric in found:
            raise UsageError(f"--keep {metric} is given twice; leave one out")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not (math.isfinite(limit) and limit > 0):
            raise UsageError(
                f"--keep {text}: expected a number above 0, as in {metric}=0.98, found {number!r}"
            )
        if limit > (best := _best(metric)):
            raise UsageError(
                f"--keep {text}: the dense model itself has {best:g}; ask for less than that"
            )
        found[metric] = limit
    return found


def _best(metric: str) -> float:
    """The most that the dense model has, in the terms of the limit, where more is better."""
    return 1.0 if metric == "ssim" or isinstance(load_metric(metric), Score) else math.inf


def _tolerance(keep: Mapping[str, float] | None, settings: QualitySettings) -> dict[str, float]:
    """What was asked; else the defaults of the metrics that are measured."""
    if keep:
        if missing := sorted(set(keep) - set(settings.metrics)):
            raise UsageError(
                f"--keep {missing[0]}: expected one of the metrics measured, "
                f"{', '.join(settings.metrics)}; add it with --metric"
            )
        return dict(keep)
    return {name: limit for name, limit in DEFAULT_KEEP.items() if name in settings.metrics}
