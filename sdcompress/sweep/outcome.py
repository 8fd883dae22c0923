"""What a sweep comes to: sweep.json, results.csv, and where every curve falls off."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sdcompress import __version__
from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.catalog import COMPONENTS
from sdcompress.errors import UsageError
from sdcompress.evaluation.quality import MetricResult, QualitySettings
from sdcompress.plan import Accounting
from sdcompress.sweep.cliff import Cliff, find_cliff
from sdcompress.sweep.grid import Published, published
from sdcompress.sweep.points import Curve, Point, PointResult


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Record):
    """One point. `digest` names its file in `points`, which has the value of every prompt too.

    `sparsity` is what was asked of the components pruned, over all their parameters; `failed` says
    why there are no metrics, `warnings` what is wrong with the pictures.
    """

    digest: str
    curve: Curve
    point: Point
    sparsity: float
    accounting: Accounting
    metrics: dict[str, MetricResult] = {}
    failed: str | None = None
    warnings: tuple[str, ...] = ()


class CurveCliff(_Record):
    """Where one curve leaves one tolerance, or why that cannot be said.

    `failed`: the sparsities of the curve that have no result.
    """

    curve: Curve
    metric: str
    cliff: Cliff | None = None
    why_not: str | None = None
    failed: tuple[float, ...] = ()


class PublishedCliff(_Record):
    """Where a curve of a study leaves the tolerance, by its single runs."""

    component: str
    method: str
    metric: str
    last_within: float | None
    first_beyond: float | None


class Sweep(_Record):
    """The whole of sweep.json. `keep` is the tolerance: metric → limit. `dense` is a digest."""

    schema_version: Literal[1] = 1
    version: str = __version__
    model: SourceRecord
    dense: str
    settings: QualitySettings
    keep: dict[str, float]
    preset: str | None
    points: tuple[Row, ...]
    cliffs: tuple[CurveCliff, ...]
    published: tuple[PublishedCliff, ...] = ()

    def curves(self) -> dict[Curve, list[Row]]:
        """The points of each curve that have a result, from the smallest sparsity on."""
        found: dict[Curve, list[Row]] = {row.curve: [] for row in self.points}
        for row in sorted(self.points, key=lambda row: row.sparsity):
            if not row.failed:
                found[row.curve].append(row)
        return found


def gather(
    dense: Bundle,
    results: Sequence[tuple[Point, PointResult]],
    settings: QualitySettings,
    keep: Mapping[str, float],
    preset: str | None,
) -> Sweep:
    """Add up the answers of a sweep."""
    by_curve: dict[Curve, list[PointResult]] = {}
    for point, result in results:
        by_curve.setdefault(point.curve, []).append(result)
    return Sweep(
        model=dense.manifest.source,
        dense=dense.digest,
        settings=settings,
        keep=dict(keep),
        preset=preset,
        points=tuple(_row(point, result) for point, result in results),
        cliffs=tuple(
            _cliff(curve, answers, metric, limit)
            for curve, answers in by_curve.items()
            for metric, limit in keep.items()
        ),
        published=tuple(_published_cliffs(keep)) if preset else (),
    )


def _row(point: Point, result: PointResult) -> Row:
    assert result.accounting
    assert result.sparsity is not None
    metrics = result.quality.metrics if result.quality else {}
    bare = {"values": (), "dense_values": ()}
    return Row(
        digest=result.digest,
        curve=point.curve,
        point=point,
        sparsity=result.sparsity,
        accounting=result.accounting,
        metrics={name: metric.model_copy(update=bare) for name, metric in metrics.items()},
        failed=result.failed,
        warnings=result.quality.warnings if result.quality else (),
    )


def _cliff(curve: Curve, answers: Sequence[PointResult], metric: str, limit: float) -> CurveCliff:
    measured = [
        (answer.sparsity, answer.quality.metrics[metric])
        for answer in answers
        if answer.quality and answer.sparsity is not None
    ]
    failed = sorted(a.sparsity for a in answers if a.failed and a.sparsity is not None)
    cliff: Cliff | None = None
    why_not: str | None = "all its points failed"
    if measured:
        try:
            cliff, why_not = find_cliff(measured, limit), None
        except UsageError as e:  # there is no ratio to a dense model that scores 0
            why_not = str(e)
    return CurveCliff(
        curve=curve, metric=metric, cliff=cliff, why_not=why_not, failed=tuple(failed)
    )


def _published_cliffs(keep: Mapping[str, float]) -> list[PublishedCliff]:
    """Of the CLIP score alone: for a distance, the study has no floor to hold it against."""
    if "clip_score" not in keep:
        return []
    rows = sorted(published(), key=lambda row: row.sparsity)
    dense = next(row for row in rows if not row.sparsity).clip_score
    curves: dict[tuple[str, str], list[Published]] = {}
    for row in rows:
        if row.sparsity:
            curves.setdefault((row.component, row.method), []).append(row)
    found = []
    for (component, method), points in curves.items():
        kept = [row.clip_score / dense >= keep["clip_score"] for row in points]
        within = kept.index(False) if False in kept else len(kept)
        found.append(
            PublishedCliff(
                component=component,
                method=method,
                metric="clip_score",
                last_within=points[within - 1].sparsity if within else None,
                first_beyond=points[within].sparsity if within < len(points) else None,
            )
        )
    return found


def table(sweep: Sweep) -> str:
    """results.csv: one row a point; sparsities are fractions, empty cells are not measured."""
    components = [c for c in COMPONENTS if any(c in row.point.parts for row in sweep.points)]
    rows = [_flat(row, components, sweep.settings.metrics) for row in sweep.points]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: Row, components: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    flat: dict[str, Any] = row.curve.model_dump()
    for component in components:
        part = row.point.parts.get(component)  # type: ignore[call-overload]
        flat[f"{component}_pattern"] = part.pattern if part else ""
        flat[f"{component}_asked"] = (
            round(row.accounting.components[component].asked, 6) if part else ""
        )
    together = row.accounting.together
    flat |= {
        "asked": row.sparsity,
        "of_layers_pruned": together.of_layers_pruned,
        "of_components_pruned": together.of_component,
        "of_pipeline": row.accounting.pipeline.of_component,
    }
    for name in metrics:
        result = row.metrics.get(name)
        for key, estimate in (
            (name, result and result.model),
            (f"{name}_dense", result and result.dense),
            (f"{name}_difference", result and result.difference),
            (f"{name}_floor", result and result.floor),
        ):
            for end, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
                flat[key + suffix] = getattr(estimate, end) if estimate else ""
    return {**flat, "failed": row.failed or "", "digest": row.digest}
