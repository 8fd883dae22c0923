"""A sweep as one page: no script, no request, the plot and the pictures inside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdcompress.evaluation.quality import Estimate
from sdcompress.sweep.outcome import CurveCliff, PublishedCliff, Row, Sweep
from sdcompress.sweep.plot import common, label, labels
from sdcompress.sweep.points import SHOWN, Curve

SENTENCES = 6
READABLE = 0.75  # how small the plot may become before it scrolls
STRIPS = 8  # how many points of a curve are shown in pictures


def render(sweep: Sweep, svg: str, pictures: Mapping[str, str], dense: str) -> str:
    """The page as text. `pictures`: digest of a point → its strip as a data URI; `dense` likewise.

    `svg` is the plot as a file.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    curves = sweep.curves()
    names = labels(curves)
    environment.filters.update(
        percent=percent, name=label, curve=names.__getitem__, figure=figure, within=within
    )
    strips = {curve: _some(rows) for curve, rows in curves.items() if rows}
    return environment.get_template("page.html.jinja").render(
        sweep=sweep,
        headline=headline(sweep, names),
        common=common(curves),
        plot=Markup(_inline(svg)),
        cliffs=[(found, _published(sweep, found)) for found in sweep.cliffs],
        strips=strips,
        pictures=pictures,
        dense=dense,
        prompts=sweep.settings.prompts[:SHOWN],
        failed=[row for row in sweep.points if row.failed],
        warnings=_warnings(sweep, names),
    )


def headline(sweep: Sweep, names: Mapping[Curve, str]) -> list[str]:
    """Where curves fall off, in a sentence each; the table has them all."""
    said: list[str] = []
    for found in sweep.cliffs:
        if len(said) == SENTENCES:
            return [*said, "The table below has the other curves."]
        cliff = found.cliff
        if cliff is None:
            continue
        name = names[found.curve]
        name = name[:1].upper() + name[1:]
        tolerance = f"{label(found.metric)} within its tolerance ({cliff.limit:g})"
        if cliff.last_within is None:
            said.append(f"{name}: not even {percent(cliff.first)} keeps the {tolerance}.")
        elif cliff.first_beyond is None:
            said.append(f"{name}: all of it, to {percent(cliff.last)}, keeps the {tolerance}.")
        else:
            said.append(
                f"{name}: {percent(cliff.last_within)} keeps the {tolerance}, "
                f"{percent(cliff.first_beyond)} does not."
            )
    return said


def percent(fraction: float) -> str:
    """0.475 → "47.5 %"."""
    return f"{100 * fraction:.3g}\N{NO-BREAK SPACE}%"


def figure(estimate: Estimate | None) -> str:
    """A value and its interval, to four digits."""
    if estimate is None:
        return "–"
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"


def within(found: CurveCliff) -> str:
    """The interval of a cliff in words."""
    cliff = found.cliff
    if cliff is None:
        return "–"
    low = f"below {percent(cliff.first)}" if cliff.low is None else percent(cliff.low)
    high = f"beyond {percent(cliff.last)}" if cliff.high is None else percent(cliff.high)
    return f"{low} to {high}"


def _published(sweep: Sweep, found: CurveCliff) -> PublishedCliff | None:
    """The study's cliff of the same curve and metric."""
    curve = found.curve
    method = curve.criterion if curve.allocation == "uniform" else ""
    return next(
        (
            p
            for p in sweep.published
            if (p.component, p.method, p.metric) == (curve.component, method, found.metric)
        ),
        None,
    )


def _some(rows: Sequence[Row]) -> list[Row]:
    """At most `STRIPS` of them, evenly chosen, the first and the last among them."""
    if len(rows) <= STRIPS:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (STRIPS - 1))] for i in range(STRIPS)]


def _warnings(sweep: Sweep, names: Mapping[Curve, str]) -> list[str]:
    found: dict[str, None] = {}
    for row in sweep.points:
        point = f"{names.get(row.curve, row.curve.component)}, {percent(row.sparsity)}"
        found |= dict.fromkeys(f"{point}: {warning}" for warning in row.warnings)
        for name, result in row.metrics.items():
            found |= dict.fromkeys(f"{label(name)}: {warning}" for warning in result.warnings)
    return list(found)


def _inline(svg: str) -> str:
    """The plot as part of a page: without the prolog of a file, and as wide as there is room."""
    drawing = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    wide = re.search(r'<svg[^>]*? width="([\d.]+)pt"', drawing)
    least = READABLE * float(wide[1]) if wide else 0
    drawing = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawing, count=1)
    said = "Quality against sparsity; the tables of this page give the numbers"
    about = f'class="plot" role="img" aria-label="{said}" style="min-width: {least:.0f}pt"'
    return drawing.replace("<svg", f"<svg {about}", 1)
