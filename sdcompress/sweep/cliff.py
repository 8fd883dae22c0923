"""Where a curve of quality against sparsity leaves its tolerance, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from sdcompress.evaluation.quality import Estimate, MetricResult, holds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 1000
BY_PROMPTS = "bootstrap over prompts, the same prompts at every sparsity"
BY_ESTIMATES = "the metric's own intervals, all at their worse and all at their better end"


class Cliff(BaseModel):
    """The last sparsity within the tolerance, with all smaller ones, and the first beyond it.

    `last_within` None: not even the smallest sparsity measured is within. `first_beyond` None: all
    are. `low` and `high` enclose the true cliff with 95 %; None: it may lie outside of what was
    measured, on that side. `first` and `last` are the ends of the curve, `how` says where the
    interval comes from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    limit: float
    last_within: float | None
    first_beyond: float | None
    low: float | None
    high: float | None
    first: float
    last: float
    how: str

    def __str__(self) -> str:
        if self.last_within is None:
            return f"below {self.first:.4g}"
        return f"beyond {self.last:.4g}" if self.first_beyond is None else f"{self.last_within:.4g}"

    @property
    def interval(self) -> str:
        low = f"below {self.first:.4g}" if self.low is None else f"{self.low:.4g}"
        high = f"beyond {self.last:.4g}" if self.high is None else f"{self.high:.4g}"
        return f"{low} to {high}"


def find_cliff(
    curve: Sequence[tuple[float, MetricResult]],
    limit: float,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Cliff:
    """The cliff of a curve: (sparsity, result) pairs of one metric, in any order.

    Quality need not fall steadily: a sparsity counts as within only where all smaller ones are.

    The interval is a percentile bootstrap. Prompts are drawn with replacement, the same ones at
    every sparsity and for the dense model, and the cliff is found again; it runs from the 2.5 %
    quantile of the last sparsity within to the 97.5 % quantile of the first beyond, between which
    the cliff of a curve measured at these sparsities lies. A distance between sets of pictures has
    no value a prompt: there, all estimates stand at the worse end of their intervals, then at the
    better end.

    Raises:
        ValueError: the curve is empty, or its points are of different metrics or prompts.
        UsageError: the limit is in proportion to a figure of the dense model that is 0.
    """
    ordered = sorted(curve, key=lambda point: point[0])
    if not ordered:
        raise ValueError("a cliff needs at least one point")
    places = [sparsity for sparsity, _ in ordered]
    results = [result for _, result in ordered]
    if len({(r.metric, len(r.values), len(r.dense_values)) for r in results}) > 1:
        raise ValueError("the points of a curve need the same metric on the same prompts")
    within = _within(results, limit)
    if results[0].values:
        worse, better = _bootstrap(results, limit, resamples, seed)
    else:
        worse, better = (_within([_at(r, end) for r in results], limit) for end in (-1, 1))
    return Cliff(
        metric=results[0].metric,
        limit=limit,
        last_within=_last(places, within),
        first_beyond=_next(places, within),
        low=_last(places, min(worse, within)),
        high=_next(places, max(better, within)),
        first=places[0],
        last=places[-1],
        how=BY_PROMPTS if results[0].values else BY_ESTIMATES,
    )


def _within(results: Sequence[MetricResult], limit: float) -> int:
    """How many points from the smallest sparsity on keep the tolerance."""
    for i, result in enumerate(results):
        if not holds(result, limit):
            return i
    return len(results)


def _last(places: Sequence[float], within: int) -> float | None:
    return places[within - 1] if within else None


def _next(places: Sequence[float], within: int) -> float | None:
    return places[within] if within < len(places) else None


def _at(result: MetricResult, end: int) -> MetricResult:
    """The result with its estimate moved to the better (+1) or worse (-1) end of its interval."""
    higher = (result.better == "higher") == (end > 0)
    return _with(result, result.model.high if higher else result.model.low, None)


def _bootstrap(
    results: Sequence[MetricResult], limit: float, resamples: int, seed: int
) -> tuple[int, int]:
    """The 2.5 % and 97.5 % quantiles of how many points are within."""
    import numpy as np

    values = np.array([r.values for r in results])  # [points, prompts]
    dense = np.array([r.dense_values for r in results]) if results[0].dense_values else None
    prompts = values.shape[1]
    draws = np.random.default_rng(seed).multinomial(
        prompts, np.full(prompts, 1 / prompts), size=resamples
    )  # [resamples, prompts]: how often each prompt is drawn
    means = _means(values, draws)
    dense_means = None if dense is None else _means(dense, draws)
    counts = sorted(
        _within(
            [
                _with(r, float(means[k, i]), None if dense_means is None else dense_means[k, i])
                for i, r in enumerate(results)
            ],
            limit,
        )
        for k in range(resamples)
        if dense_means is None or dense_means[k].all()  # there is no ratio to 0
    )
    tail = int((1 - CONFIDENCE) / 2 * len(counts))
    return counts[tail], counts[-1 - tail]


def _means(values: NDArray[np.float64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """The means of values [points, prompts] in each resample: [resamples, points]."""
    means: NDArray[np.float64] = draws @ values.T / values.shape[1]
    return means


def _with(result: MetricResult, model: float, dense: float | None) -> MetricResult:
    update = {"model": Estimate(value=model, low=model, high=model)}
    if dense is not None:
        update["dense"] = Estimate(value=dense, low=dense, high=dense)
    return result.model_copy(update=update)
