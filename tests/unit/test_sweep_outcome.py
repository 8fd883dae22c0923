"""What is written of a sweep: the document, the table, the plot and the page."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from sdcompress.bundle import Bundle, Manifest, SourceRecord
from sdcompress.evaluation.quality import Estimate, MetricResult, Quality, QualitySettings
from sdcompress.plan import Accounting, ComponentSparsity
from sdcompress.sweep.grid import RAMESH_ZHAO, grid, preset
from sdcompress.sweep.outcome import Sweep, gather, table
from sdcompress.sweep.page import render
from sdcompress.sweep.plot import common, draw, labels
from sdcompress.sweep.points import Curve, Point, PointResult

PROMPTS = ("a <b>red</b> cat", "a cat", "a rat", "red")
SIZES = {"text_encoder": 100, "unet": 300, "vae": 100}
STRIP = "data:image/png;base64,AAAA"
DENSE = Bundle(
    Path("model"),
    Manifest(
        stage="source", parent=None, source=SourceRecord(id="a <i>", kind="directory"), tools={}
    ),
    "d" * 64,
)


def _settings(*metrics: str) -> QualitySettings:
    return QualitySettings(prompts=PROMPTS, steps=2, guidance=2, metrics=metrics)


def _accounting(point: Point) -> Accounting:
    def sparsity(*components: str) -> ComponentSparsity:
        parameters = sum(SIZES[c] for c in components)
        asked = sum(_asked(point, c) * SIZES[c] for c in components)
        return ComponentSparsity(
            parameters=parameters,
            parameters_pruned=parameters // 2,
            zeros=round(asked / 2),
            asked=asked / parameters,
            of_layers_pruned=asked / parameters,
            of_component=asked / 2 / parameters,
        )

    return Accounting(
        components={c: sparsity(c) for c in SIZES},
        together=sparsity(*point.parts),
        pipeline=sparsity(*SIZES),
    )


def _asked(point: Point, component: str) -> float:
    part = point.parts.get(component)  # type: ignore[call-overload]
    return 0.0 if part is None else part.sparsity if part.sparsity is not None else 0.5


def _estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value * 0.97, high=value * 1.03)


def _result(metric: str, sparsity: float) -> MetricResult:
    """Good to 0.5, and gone by 0.7."""
    good = 1.0 if sparsity <= 0.5 else max(0.2, 1 - 4 * (sparsity - 0.5))
    if metric == "clip_distance":
        return MetricResult(metric=metric, unit="1", better="lower", samples=4,
                            model=_estimate(3 - 2 * good), floor=_estimate(1))  # fmt: skip
    unit, scale = ("cosine", 0.3) if metric == "clip_score" else ("dB", 40)
    dense: dict[str, Any] = {}
    if metric == "clip_score":
        dense = {"dense": _estimate(0.3), "dense_values": (0.3,) * 4,
                 "difference": _estimate(0.3 * good - 0.3)}  # fmt: skip
    return MetricResult(metric=metric, unit=unit, better="higher", samples=4,
                        model=_estimate(scale * good), values=(scale * good,) * 4,
                        **dense)  # fmt: skip


def _answers(
    points: list[Point], settings: QualitySettings, failed: frozenset[int] = frozenset()
) -> list[tuple[Point, PointResult]]:
    answers = []
    for i, point in enumerate(points):
        accounting = _accounting(point)
        quality = Quality(
            model=f"{i:064}",
            dense=DENSE.digest,
            settings=settings,
            metrics={m: _result(m, accounting.together.asked) for m in settings.metrics},
        )
        answer = PointResult(
            digest=f"{i:064}",
            dense=DENSE.digest,
            recipe={},
            accounting=accounting,
            quality=None if i in failed else quality,
            failed="the <i>weights</i> are NaN" if i in failed else None,
            pictures="" if i in failed else STRIP,
        )
        answers.append((point, answer))
    return answers


def _sweep(
    points: list[Point],
    *metrics: str,
    keep: dict[str, float],
    failed: frozenset[int] = frozenset(),
    name: str | None = None,
) -> Sweep:
    settings = _settings(*metrics)
    return gather(DENSE, _answers(points, settings, failed), settings, keep, name)


POINTS = grid(["unet"], ["magnitude"], ["unstructured"], [0.7, 0.3, 0.4, 0.5, 0.6])
KEEP = {"clip_score": 0.9}


def test_a_cliff_for_each_curve_and_tolerance() -> None:
    points = POINTS + grid(["text_encoder"], ["magnitude"], ["2:4"], [])
    found = _sweep(points, "psnr", "clip_score", keep={"clip_score": 0.9, "psnr": 23})
    assert [(c.curve.component, c.metric) for c in found.cliffs] == [
        ("unet", "clip_score"),
        ("unet", "psnr"),
        ("text_encoder", "clip_score"),
        ("text_encoder", "psnr"),
    ]
    cliffs = [c.cliff for c in found.cliffs]
    assert [str(cliff) for cliff in cliffs] == ["0.5", "0.6", "beyond 0.5", "beyond 0.5"]


def test_a_failed_point_is_in_no_curve_and_is_named() -> None:
    found = _sweep(POINTS, "clip_score", keep=KEEP, failed=frozenset({3}))  # 0.5
    (cliff,) = found.cliffs
    assert cliff.failed == (0.5,)
    assert cliff.cliff
    assert (cliff.cliff.last_within, cliff.cliff.first_beyond) == (0.4, 0.6)
    (curve,) = found.curves().values()
    assert [row.sparsity for row in curve] == [0.3, 0.4, 0.6, 0.7]
    everything = _sweep(POINTS, "clip_score", keep=KEEP, failed=frozenset(range(5)))
    assert everything.cliffs[0].cliff is None
    assert everything.cliffs[0].why_not == "all its points failed"


def test_the_table() -> None:
    found = _sweep(POINTS[:1], "psnr", "clip_score", keep=KEEP)
    (row,) = csv.DictReader(io.StringIO(table(found)))
    assert (row["component"], row["criterion"], row["pattern"]) == (
        "unet", "magnitude", "unstructured")  # fmt: skip
    assert (row["asked"], row["of_layers_pruned"]) == ("0.7", "0.7")
    assert (row["of_components_pruned"], row["of_pipeline"]) == ("0.35", "0.21")
    assert float(row["clip_score"]) == pytest.approx(0.3 * 0.2)
    assert float(row["clip_score_low"]) == pytest.approx(0.3 * 0.2 * 0.97)
    assert (row["clip_score_dense"], row["psnr_dense"]) == ("0.3", "")
    assert float(row["clip_score_difference"]) == pytest.approx(0.3 * 0.2 - 0.3)


def test_the_published_cliffs_lie_beside_the_measured() -> None:
    found = _sweep(preset(RAMESH_ZHAO), "clip_score", keep={"clip_score": 0.98}, name=RAMESH_ZHAO)
    cliffs = {
        (p.component, p.method): (p.last_within, p.first_beyond)
        for p in found.published
        if p.component in ("text_encoder", "unet")
    }
    # 0.98 · 0.314 = 0.30772: by the study's own table.
    assert cliffs["text_encoder", "magnitude"] == (0.5, 0.55)
    assert cliffs["text_encoder", "wanda"] == (0.5, 0.525)
    assert cliffs["unet", "magnitude"] == (0.425, 0.45)


def test_labels_leave_out_what_all_have_in_common() -> None:
    def words(*curves: tuple[str, str]) -> list[str]:
        made = [
            Curve(
                component="unet", criterion=c, pattern="unstructured", scope=s, allocation="global"
            )
            for c, s in curves
        ]
        return [*labels(made).values(), *common(made)]

    assert words(("magnitude", "linear"), ("random", "linear")) == [
        "UNet, magnitude",
        "UNet, random",
        "linear layers only",
        "global allocation",
    ]
    assert words(("magnitude", "all"), ("magnitude", "conv")) == [
        "UNet, magnitude",
        "UNet, magnitude, conv only",
        "global allocation",
    ]


def test_the_plot_is_the_same_every_time(tmp_path: Path) -> None:
    found = _sweep(POINTS, "psnr", "clip_score", keep=KEEP)
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert draw(found, tmp_path / name) == (tmp_path / name / "plot.svg").read_text()
        files.append([(tmp_path / name / f).read_bytes() for f in ("plot.svg", "plot.png")])
    assert files[0] == files[1]
    svg = (tmp_path / "one" / "plot.svg").read_text()
    assert ">tolerance<" in svg
    assert ">PSNR (dB)<" in svg
    assert not re.search(r"\d{4}-\d\d-\d\d", svg)


def _page(found: Sweep, tmp_path: Path) -> str:
    strips = {row.digest: STRIP for row in found.points}
    return render(found, draw(found, tmp_path), strips, STRIP)


def test_the_page_asks_nobody_and_runs_nothing(tmp_path: Path) -> None:
    page = _page(_sweep(POINTS, "clip_score", keep=KEEP, failed=frozenset({0})), tmp_path)
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.startswith("<!doctype html>")
    assert "<?xml" not in page
    # What people wrote is text.
    assert "a &lt;b&gt;red&lt;/b&gt; cat" in page
    assert "a &lt;i&gt;: quality" in page
    assert "the &lt;i&gt;weights&lt;/i&gt; are NaN" in page
    assert page.count(f'src="{STRIP}"') == 1 + 4


def test_the_page_says_where_quality_falls_off(tmp_path: Path) -> None:
    page = _page(_sweep(POINTS, "clip_score", keep=KEEP), tmp_path).replace(
        "\N{NO-BREAK SPACE}", " "
    )
    assert (
        "UNet, magnitude: 50 % keeps the CLIP score within its tolerance (0.9), 60 % does not."
    ) in page
    without = _page(_sweep(POINTS, "psnr", keep={}), tmp_path)
    assert "No tolerance was given" in without


def test_the_page_says_which_points_have_bad_pictures(tmp_path: Path) -> None:
    settings = _settings("psnr")
    answers = _answers(POINTS, settings)
    point, answer = answers[0]
    assert answer.quality
    black = answer.quality.model_copy(update={"warnings": ("4 of 4 pictures are black",)})
    answers[0] = (point, answer.model_copy(update={"quality": black}))
    found = gather(DENSE, answers, settings, {"psnr": 23}, None)
    assert [row.warnings for row in found.points] == [("4 of 4 pictures are black",), *[()] * 4]
    page = _page(found, tmp_path).replace("\N{NO-BREAK SPACE}", " ")
    assert "UNet, magnitude, 70 %: 4 of 4 pictures are black" in page


def test_the_preset_says_whose_figures_are_whose(tmp_path: Path) -> None:
    metrics = ("clip_score", "clip_distance")
    found = _sweep(preset(RAMESH_ZHAO), *metrics, keep={"clip_score": 0.98}, name=RAMESH_ZHAO)
    page = _page(found, tmp_path).replace("\N{NO-BREAK SPACE}", " ")
    svg = (tmp_path / "plot.svg").read_text()
    assert svg.count(">published: Ramesh &amp; Zhao 2024<") == 2
    assert svg.count(">SD 2, another model and protocol<") == 2
    for text in ("FID", "CLIP score, ViT-B/32", "CLIP score (cosine)", "whole model", "UNet"):
        assert f">{text}<" in svg
    assert "linear layers only · preset ramesh-zhao-2024" in page
    assert "arXiv 2411.15113" in page
    assert "compare shapes, not numbers" in page
    assert '<td class="n">50 %, 55 %</td>' in page
    assert "The table below has the other curves." in page
