"""The page's charts as SVG: they take the page's colours, and stay sharp in print.

A few rectangles and lines are drawn faster by hand than by a plotting library, in a hundredth of
its bytes, and can be read by a screen reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sdcompress.measure import Comparison
from sdcompress.plan import LayerPlan
from sdcompress.results import Measure
from sdcompress.structure import BlockRecord

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT = 1000, 160


def layers(title: str, plans: Sequence[LayerPlan], parameters: int) -> Markup:
    """Sparsity by layer: width = share of the component's parameters, height = share of zeros.

    So the filled area is the component's sparsity. The blank rest at the right holds what no rule
    can reach: biases, norms, embeddings that are not listed.
    """
    bars = []
    for plan in plans:
        share = (plan.zeros or 0) / plan.numel if plan.pruned else 0.0
        said = f"{plan.name}: " + (f"{100 * share:.1f} % zero" if plan.pruned else "dense")
        bars.append((plan.numel / parameters, share, said))
    pruned = sum(plan.pruned for plan in plans)
    zeros = sum(plan.zeros or 0 for plan in plans)
    summary = (
        f"{title}: {pruned} of {len(plans)} layers pruned; the filled area is "
        f"{100 * zeros / parameters:.1f} % of the component's parameters"
    )
    return _filled("layers", summary, bars)


def blocks(title: str, records: Mapping[str, BlockRecord]) -> Markup:
    """What went of each block: width = its share of all channels, height = the share that went.

    So the filled area is the share of the channels that went.
    """
    channels = sum(block.width for block in records.values())
    gone = sum(block.width - block.kept for block in records.values())
    bars = [
        (
            block.width / channels,
            1 - block.kept / block.width,
            f"{name}: {block.kept} of {block.width} channels stay",
        )
        for name, block in records.items()
    ]
    narrower = sum(block.kept < block.width for block in records.values())
    summary = (
        f"{title}: {narrower} of {len(records)} blocks narrower; the filled area is "
        f"{100 * gone / channels:.1f} % of their channels"
    )
    return _filled("layers blocks", summary, bars)


def _filled(kind: str, summary: str, bars: Sequence[tuple[float, float, str]]) -> Markup:
    """A bar for each (share of the width, share of the height that is filled, what it says)."""
    from markupsafe import Markup

    parts, x = [], 0.0
    for share, filled, said in bars:
        width, height = WIDTH * share, HEIGHT * filled
        for which, y, h in (("room", 0.0, float(HEIGHT)), ("gone", HEIGHT - height, height)):
            if h:
                parts.append(
                    Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}">'
                           "<title>{}</title></rect>").format(
                        which, f"{x:.2f}", f"{y:.1f}", f"{max(width, 0.4):.2f}", f"{h:.1f}", said
                    )
                )  # fmt: skip
        x += width
    return Markup(
        '<svg class="{}" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" '
        'aria-label="{}">{}<path class="half" d="M0 {}H{}"/></svg>'
    ).format(kind, WIDTH, HEIGHT, summary, Markup("").join(parts), HEIGHT // 2, WIDTH)


def forest(measures: Mapping[str, Measure], names: Mapping[str, str]) -> Markup:
    """Every ratio with its interval, sparse above its control, on one logarithmic axis around 1."""
    from markupsafe import Markup

    row, left, right, top = 46, 210, 970, 12
    bounds = [b for m in measures.values() for b in _bounds(m)]
    reach = max([0.02, *(abs(math.log(b)) for b in bounds)]) * 1.08

    def x(value: float) -> float:
        return left + (right - left) * (math.log(value) + reach) / (2 * reach)

    bottom = top + row * len(measures)
    parts = []
    for tick in _ticks(reach):
        kind = "one" if tick == 1 else "tick"
        parts.append(
            Markup(
                '<path class="{}" d="M{x} {}V{}"/><text x="{x}" y="{}" class="mid">{}</text>'
            ).format(kind, top, bottom, bottom + 22, f"{tick:g}", x=f"{x(tick):.1f}")
        )
    for i, (name, measure) in enumerate(measures.items()):
        y = top + row * i
        parts.append(
            Markup('<text x="0" y="{}">{}</text>').format(y + row / 2 + 6, names.get(name, name))
        )
        for kind, c, dy in (
            ("sparse", measure.sparse_to_dense, 15),
            ("control", measure.control_to_dense, 31),
        ):
            parts.append(
                Markup(
                    '<g class="{}"><title>{}</title><path d="M{} {y}H{}"/>'
                    '<circle cx="{}" cy="{y}" r="6"/></g>'
                ).format(
                    kind,
                    f"{kind} to dense {c.ratio:.3f} ({c.low:.3f} to {c.high:.3f}): {c.verdict}",
                    f"{x(c.low):.1f}",
                    f"{x(c.high):.1f}",
                    f"{x(c.ratio):.1f}",
                    y=y + dy,
                )
            )
    return Markup(
        '<svg class="forest" viewBox="0 0 1000 {}" role="img" aria-label="{}">{}</svg>'
    ).format(
        bottom + 30,
        "Ratios to the dense engine with their intervals; the table below gives the numbers",
        Markup("").join(parts),
    )


def _bounds(measure: Measure) -> list[float]:
    both: tuple[Comparison, ...] = (measure.sparse_to_dense, measure.control_to_dense)
    return [b for c in both for b in (c.low, c.high, c.ratio)]


def _ticks(reach: float) -> list[float]:
    """About seven round ratios, 1 among them, evenly spaced enough for the reach of the axis."""
    for choice in (
        (0.98, 0.99, 1, 1.01, 1.02),
        (0.94, 0.96, 0.98, 1, 1.02, 1.04, 1.06),
        (0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15),
        (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5),
        (0.25, 0.5, 1, 2, 4),
        (0.001, 0.01, 0.1, 1, 10, 100, 1000),
    ):
        inside = [tick for tick in choice if abs(math.log(tick)) <= reach]
        if abs(math.log(choice[-1])) >= reach * 0.55 and len(inside) >= 3:
            return [float(tick) for tick in inside]
    return [1.0]
