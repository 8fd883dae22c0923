"""Quality against sparsity, a row of panels a metric, as SVG and PNG.

Curves differ by colour, line and marker at once, so that they can be told apart in grey and by
those who see few colours (the colours are those of Okabe and Ito 2008). The same data gives the
same bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdcompress.bundle import write_text
from sdcompress.evaluation.metrics import Drift, Score, load_metric
from sdcompress.evaluation.quality import MetricResult
from sdcompress.sweep.grid import Published, published
from sdcompress.sweep.outcome import Row, Sweep
from sdcompress.sweep.points import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SVG, PNG = "plot.svg", "plot.png"
TOGETHER = 6  # curves in one panel; more are split by component
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NAMES = {
    "text_encoder": "text encoder",
    "unet": "UNet",
    "vae": "VAE",
    "both": "text encoder and UNet",
    "clip_score": "CLIP score",
    "clip_distance": "CLIP distance",
    "inception_fid": "FID",
    "prompt_accuracy": "prompt accuracy",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
}
STUDY = "published: Ramesh & Zhao 2024\nSD 2, another model and protocol"
# What of the study goes beside which measured metric: its label and its value.
BESIDE: dict[str, tuple[str, Callable[[Published], float]]] = {
    "clip_score": ("CLIP score, ViT-B/32", lambda row: row.clip_score),
    "clip_distance": ("FID", lambda row: row.fid),
    "inception_fid": ("FID", lambda row: row.fid),
}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "sdcompress",  # ids that do not change from run to run
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


class _Look(NamedTuple):
    colour: str
    line: Any
    marker: str


def draw(sweep: Sweep, out: Path) -> str:
    """Write plot.svg and plot.png into `out`, and return the SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        _fill(figure, sweep)
        text, pixels = io.StringIO(), io.BytesIO()
        nobody: dict[str, Any] = {"Date": None, "Creator": None}
        figure.savefig(text, format="svg", metadata=nobody)
        figure.savefig(pixels, format="png", dpi=150, metadata={"Software": None})
    write_text(out / SVG, text.getvalue())
    partial = out / f".{PNG}.partial"
    partial.write_bytes(pixels.getvalue())
    os.replace(partial, out / PNG)
    return text.getvalue()


def label(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def labels(curves: Collection[Curve]) -> dict[Curve, str]:
    """Each curve in a few words: what is as usual is left out, and what all have in common."""
    return {curve: ", ".join([label(curve.component), *_words(curve, curves)]) for curve in curves}


def common(curves: Collection[Curve]) -> list[str]:
    """What `labels` leave out because all curves have it, and it is not as usual."""
    said = []
    if len(scopes := {curve.scope for curve in curves}) == 1 and "all" not in scopes:
        said.append(f"{scopes.pop()} layers only")
    if len(ways := {curve.allocation for curve in curves}) == 1 and "uniform" not in ways:
        said.append(f"{ways.pop()} allocation")
    return said


def _words(curve: Curve, curves: Collection[Curve]) -> list[str]:
    """What a curve is, its component aside."""
    words = [curve.criterion]
    if curve.pattern != "unstructured":
        words.append(curve.pattern)
    if curve.scope != "all" and len({c.scope for c in curves}) > 1:
        words.append(f"{curve.scope} only")
    if curve.allocation != "uniform" and len({c.allocation for c in curves}) > 1:
        words.append(curve.allocation)
    return words


def _fill(figure: Figure, sweep: Sweep) -> None:
    curves = sweep.curves()
    groups = _groups(sweep, list(curves))
    looks = _looks(groups)
    rows: list[tuple[str, bool]] = []  # metric, and whether the study's figures for it
    for metric in sweep.settings.metrics:
        rows.append((metric, False))
        # FID is laid beside one metric, the one that is most like it.
        if (
            sweep.preset
            and metric in BESIDE
            and not (metric == "clip_distance" and "inception_fid" in sweep.settings.metrics)
        ):
            rows.append((metric, True))
    figure.set_size_inches(1 + 4.2 * max(len(groups), 1.6), 0.6 + 2.6 * len(rows))
    panels = figure.subplots(len(rows), len(groups), squeeze=False, sharex="col", sharey="row")
    for (metric, of_study), line in zip(rows, panels, strict=True):
        for group, axes in zip(groups, line, strict=True):
            if of_study:
                _study(axes, metric, looks, group)
            else:
                _measured(axes, sweep, metric, {c: curves[c] for c in group}, looks)
        name = f"{BESIDE[metric][0]}\n{STUDY}" if of_study else _axis(sweep, metric)
        line[0].set_ylabel(name)
    for axes in panels[-1]:
        axes.set_xlabel("sparsity asked of the components pruned")
    for group, axes in zip(groups, panels[0], strict=True):
        _legend(axes, group, looks, sweep, titled=len(groups) > 1)
        if len(groups) > 1:
            axes.set_title(_title(group))


def _axis(sweep: Sweep, metric: str) -> str:
    result = next((r.metrics[metric] for r in sweep.points if metric in r.metrics), None)
    if result is None:
        return label(metric)
    unit = "" if result.unit in ("1", "") else f" ({result.unit})"
    return f"{label(metric)}{unit}\n{result.better} is better"


def _groups(sweep: Sweep, curves: Sequence[Curve]) -> list[list[Curve]]:
    """The curves of each column of panels."""
    if len(curves) <= TOGETHER and not sweep.preset:
        return [list(curves)]
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(_family(curve.component), []).append(curve)
    return list(groups.values())


def _family(component: str) -> str:
    """The splits of budgets for the whole model share their panels."""
    return "whole model" if component.startswith("whole model") else component


def _title(group: Sequence[Curve]) -> str:
    return label(_family(group[0].component))


def _looks(groups: Sequence[Sequence[Curve]]) -> dict[Curve, _Look]:
    """In panels by component, what differs by its component alone looks alike."""
    kinds: dict[Curve, int] = {}
    found = {}
    for curve in (curve for group in groups for curve in group):
        alone = len(groups) > 1 and _family(curve.component) == curve.component
        kind = curve.model_copy(update={"component": ""}) if alone else curve
        i = kinds.setdefault(kind, len(kinds)) % len(COLOURS)
        found[curve] = _Look(COLOURS[i], LINES[i], MARKERS[i])
    return found


def _measured(
    axes: Axes,
    sweep: Sweep,
    metric: str,
    curves: dict[Curve, list[Row]],
    looks: dict[Curve, _Look],
) -> None:
    results: list[MetricResult] = []
    for curve, rows in curves.items():
        points = [(r.sparsity, r.metrics[metric]) for r in rows if metric in r.metrics]
        if not points:
            continue
        results += [result for _, result in points]
        look = looks[curve]
        x = [sparsity for sparsity, _ in points]
        estimates = [result.model for _, result in points]
        axes.plot(
            x,
            [e.value for e in estimates],
            color=look.colour,
            linestyle=look.line,
            marker=look.marker,
            markersize=4,
        )
        axes.fill_between(
            x,
            [e.low for e in estimates],
            [e.high for e in estimates],
            color=look.colour,
            alpha=0.15,
        )
        axes.errorbar(
            x,
            [e.value for e in estimates],
            yerr=[
                [max(0.0, e.value - e.low) for e in estimates],
                [max(0.0, e.high - e.value) for e in estimates],
            ],
            fmt="none",
            ecolor=look.colour,
            elinewidth=0.8,
            capsize=2,
        )
    for found in sweep.cliffs:
        cliff = found.cliff
        if (
            found.metric == metric
            and cliff
            and found.curve in curves
            and cliff.last_within is not None
        ):
            at = {r.sparsity: r.metrics[metric].model.value for r in curves[found.curve]}
            colour = looks[found.curve].colour
            axes.plot(
                [cliff.last_within],
                [at[cliff.last_within]],
                marker="o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=colour,
                linestyle="none",
            )
            axes.axvspan(
                cliff.first if cliff.low is None else cliff.low,
                cliff.last if cliff.high is None else cliff.high,
                color=colour,
                alpha=0.08,
                linewidth=0,
            )
    if results:
        _levels(axes, results[0], sweep.keep.get(metric))


def _levels(axes: Axes, result: MetricResult, limit: float | None) -> None:
    """Lines across: the dense model's figure, or what chance alone gives, and the tolerance."""
    kind = load_metric(result.metric)
    base = result.dense if isinstance(kind, Score) else result.floor
    levels = {"dense" if isinstance(kind, Score) else "floor": base.value} if base else {}
    if limit is not None:
        scale = 1.0 if isinstance(kind, Drift) or base is None else base.value
        levels["tolerance"] = limit * scale
    for name, level in levels.items():
        _level(axes, name, level)


def _level(axes: Axes, name: str, level: float) -> None:
    axes.axhline(level, color="#555555", linewidth=0.8, linestyle=(0, (2, 2)))
    axes.annotate(
        name,
        (1, level),
        xycoords=("axes fraction", "data"),
        fontsize=7,
        color="#555555",
        ha="right",
        va="top" if name == "tolerance" else "bottom",
    )


def _legend(
    axes: Axes, group: Sequence[Curve], looks: dict[Curve, _Look], sweep: Sweep, *, titled: bool
) -> None:
    """In the uppermost panel, for all below; the title says the component where it is there."""
    from matplotlib.lines import Line2D

    names = labels(sweep.curves())
    handles = []
    for curve in group:
        own = titled and _family(curve.component) == curve.component
        text = names[curve].partition(", ")[2] if own else names[curve]
        look = looks[curve]
        line = Line2D([], [], color=look.colour, linestyle=look.line, marker=look.marker)
        line.set(markersize=4, label=text)
        handles.append(line)
    axes.legend(handles=handles, fontsize=8)


def _study(axes: Axes, metric: str, looks: dict[Curve, _Look], group: Sequence[Curve]) -> None:
    """The published figures of the curves that are measured above."""
    value = BESIDE[metric][1]
    rows = sorted(published(), key=lambda row: row.sparsity)
    for curve in group:
        points = [row for row in rows if row.point and row.point.curve == curve]
        look = looks[curve]
        axes.plot(
            [row.sparsity for row in points],
            [value(row) for row in points],
            color=look.colour,
            linestyle=look.line,
            marker=look.marker,
            markersize=3,
            linewidth=1,
        )
    dense = next(row for row in rows if not row.sparsity)
    _level(axes, "dense", value(dense))
    axes.set_facecolor("#f6f3ea")
