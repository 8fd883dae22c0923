"""Quality against sparsity: a column a component set, a line a criterion, 2:4 beside them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.criteria.points import COMPONENTS, TWO_FOUR, Point, sparsity
from benchmarks.criteria.verdicts import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = {
    "above_floor": "Fréchet distance to dense,\nabove the floor (lower is better)",
    "prompt_accuracy": "prompt accuracy\n(higher is better)",
}
TITLES = {"unet": "UNet", "text_encoder": "text encoder", "both": "text encoder and UNet"}
# Okabe and Ito 2008, and three more: each method has a colour and a marker of its own.
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f"),
    *("#7570b3", "#8c510a", "#66a61e", "#e7298a", "#1b9e77", "#a6761d", "#4d4d4d", "#b2182b"),
)
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "d", "p", "H", "8", "4")
LEAST = 1e-3  # what is at the floor or below has no logarithm, and stands there
FIRST, LAST = 0.78, 0.96  # where the markers of 2:4 stand, right of the sparsities
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


class Mark(NamedTuple):
    point: Point
    figures: Mapping[str, Interval]


class Look(NamedTuple):
    colour: str
    line: Any
    marker: str


def draw(marks: Sequence[Mark]) -> str:
    """The SVG."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = [mark for mark in marks if not mark.point.shared]
    methods = list(dict.fromkeys(mark.point.method for mark in shown))
    looks = {
        method: Look(COLOURS[i % 16], LINES[i % 4], MARKERS[i % 16])
        for i, method in enumerate(methods)
    }
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(14, 7.5), layout="constrained")
        panels = figure.subplots(len(ROWS), len(COMPONENTS), sharex=True, sharey="row")
        for (name, label), line in zip(ROWS.items(), panels, strict=True):
            for components, axes in zip(COMPONENTS, line, strict=True):
                here = [mark for mark in shown if mark.point.components == components]
                _panel(axes, here, name, looks)
            line[0].set_ylabel(label)
        for components, axes in zip(COMPONENTS, panels[0], strict=True):
            axes.set_title(TITLES[components])
            axes.set_yscale("log")
            axes.set_ylim(bottom=LEAST / 1.5)
            place = {"ha": "right", "fontsize": 7, "transform": axes.transAxes}
            axes.text(0.99, 0.01, "hollow: not above the floor", **place)
        for axes in panels[-1]:
            ticks = [0.3, 0.4, 0.5, 0.6, 0.7, (FIRST + LAST) / 2]
            axes.set_xticks(ticks, ["30%", "40%", "50%", "60%", "70%", TWO_FOUR])
            axes.set_xlabel("sparsity of the layers")
        handles = [
            Line2D([], [], color=k.colour, linestyle=k.line, marker=k.marker, label=method)
            for method, k in looks.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=6)
        text = io.StringIO()
        nobody: dict[str, Any] = {"Date": None, "Creator": None}
        figure.savefig(text, format="svg", metadata=nobody)
    return text.getvalue()


def _panel(axes: Axes, marks: Sequence[Mark], name: str, looks: Mapping[str, Look]) -> None:
    step = (LAST - FIRST) / max(1, len(looks) - 1)
    for i, (method, look) in enumerate(looks.items()):
        mine = [mark for mark in marks if mark.point.method == method]
        curve = sorted(
            (sparsity(m.point.pattern), m.figures[name])
            for m in mine
            if m.point.pattern != TWO_FOUR
        )
        apart = [(FIRST + i * step, m.figures[name]) for m in mine if m.point.pattern == TWO_FOUR]
        for points, line in ((curve, look.line), (apart, "none")):
            if points:
                _line(axes, points, look, line, least=LEAST if name == "above_floor" else None)
    axes.axvline((0.7 + FIRST) / 2, color="#999999", linewidth=0.8)


def _line(
    axes: Axes,
    points: Sequence[tuple[float, Interval]],
    look: Look,
    line: Any,
    *,
    least: float | None,
) -> None:
    """What is not above `least` stands there, hollow."""

    def shown(value: float) -> float:
        return value if least is None else max(value, least)

    x = [place for place, _ in points]
    middle = [shown(figure.value) for _, figure in points]
    ends = [
        [m - shown(f.low) for m, (_, f) in zip(middle, points, strict=True)],
        [shown(f.high) - m for m, (_, f) in zip(middle, points, strict=True)],
    ]
    axes.errorbar(
        x,
        middle,
        yerr=ends,
        color=look.colour,
        linestyle=line,
        marker=look.marker,
        markersize=4.5,
        linewidth=1.3,
        elinewidth=0.8,
        capsize=2,
    )
    hollow = [(a, m) for a, m in zip(x, middle, strict=True) if m == least]
    for place, value in hollow:
        axes.plot(
            place, value, look.marker, color="white", markeredgecolor=look.colour, ms=4.5, zorder=3
        )
