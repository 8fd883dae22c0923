"""The budget: which metrics have to keep which limits, and whether what was measured does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sdcompress.errors import UsageError
from sdcompress.evaluation.metrics import Distance, Score, load_metric
from sdcompress.evaluation.quality import MetricResult, Quality, margin
from sdcompress.search.bisect import Kept
from sdcompress.sweep.run import parse_keep


def parse_budget(keep: Iterable[str]) -> dict[str, float]:
    """`parse_keep`, where a search needs at least one limit.

    Raises:
        UsageError: none is given, or as `parse_keep` says.
    """
    budget = parse_keep(keep)
    if not budget:
        raise UsageError("no budget to keep; give at least one --keep, such as clip_score=0.98")
    return budget


def judge(
    quality: Quality, budget: Mapping[str, float], *, by_value: bool = False
) -> dict[str, Kept]:
    """What is kept of each metric of the budget, by the worse end of its interval.

    `by_value`: by the figure itself, whatever its interval says.
    """
    return {m: _kept(quality.metrics[m], limit, by_value) for m, limit in budget.items()}


def _kept(result: MetricResult, limit: float, by_value: bool) -> Kept:
    figures = (result.model.value, *_interval(result))
    margins = [margin(_with(result, figure), limit) for figure in figures]
    sign = 1 if result.better == "higher" else -1
    value, *ends = (limit + sign * m for m in margins)
    decisive = margins[0] if by_value else min(margins)
    return Kept(
        value=value,
        low=min(ends),
        high=max(ends),
        limit=limit,
        at="least" if sign > 0 else "most",
        margin=decisive / limit,
        holds=decisive >= 0,
    )


def _interval(result: MetricResult) -> tuple[float, float]:
    """Where the dense model was scored on the same prompts, by the difference, which is sharper."""
    if result.dense and result.difference and result.dense_values:
        dense, difference = result.dense.value, result.difference
        return dense + difference.low, dense + difference.high
    return result.model.low, result.model.high


def _with(result: MetricResult, figure: float) -> MetricResult:
    return result.model_copy(update={"model": result.model.model_copy(update={"value": figure})})


def in_words(metric: str, kept: Kept) -> str:
    """`psnr 21.3 [20.9, 21.7] dB, at least 20`."""
    found = f"{metric} {kept.value:.4g} [{kept.low:.4g}, {kept.high:.4g}]"
    return f"{found}{_terms(metric)}, at {kept.at} {kept.limit:g}"


def _terms(metric: str) -> str:
    loaded = load_metric(metric)
    if isinstance(loaded, Score):
        return " of the dense model's"
    if isinstance(loaded, Distance):
        return " of the floor"
    return "" if loaded.unit == "1" else f" {loaded.unit}"
