"""Which points a sweep has: a product of options, a file that lists them, or a published study."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdcompress.errors import UsageError
from sdcompress.patterns import parse_pattern
from sdcompress.recipe import describe_first, read_yaml
from sdcompress.registry import names
from sdcompress.sweep.points import Point

BOTH = ("text_encoder", "unet")
RAMESH_ZHAO = "ramesh-zhao-2024"
PRESETS = (RAMESH_ZHAO,)
MOST = 1000  # sparsities in a range


def parse_sparsities(text: str) -> tuple[float, ...]:
    """`"0.3:0.7:0.1"` (from, to and including, step) or `"0.3,0.45,0.5"`.

    Raises:
        UsageError: it is neither, or holds a number outside 0 to 1.
    """
    try:
        if ":" in text:
            first, last, step = (Decimal(part) for part in text.split(":"))
            if not (step > 0 and first <= last and (last - first) / step < MOST):
                raise ValueError
            found = [first + i * step for i in range(int((last - first) / step) + 1)]
        else:
            found = [Decimal(part) for part in text.split(",")]
        if not all(0 <= sparsity <= 1 for sparsity in found):
            raise ValueError
    except (ValueError, InvalidOperation) as e:
        raise UsageError(
            f"--sparsity {text!r}: expected FIRST:LAST:STEP such as 0.3:0.7:0.1, or a list such as "
            "0.3,0.5, of fractions between 0 and 1"
        ) from e
    return tuple(float(sparsity) for sparsity in found)


def grid(
    components: Sequence[str],
    criteria: Sequence[str],
    patterns: Sequence[str],
    sparsities: Sequence[float],
    scope: str = "all",
    allocation: str = "uniform",
) -> list[Point]:
    """Every combination, once. "both" prunes text encoder and UNet alike; an N:M pattern has its
    own sparsity.

    Raises:
        UsageError: a name is unknown, or an unstructured pattern has no sparsities.
    """
    points: list[Point] = []
    for component, criterion, pattern in product(components, criteria, patterns):
        fixed = parse_pattern(pattern).sparsity is not None
        if not fixed and not sparsities:
            raise UsageError(
                "an unstructured sweep needs sparsities; give them with --sparsity, such as "
                "0.3:0.7:0.1"
            )
        for sparsity in (None,) if fixed else sparsities:
            part = {
                "criterion": criterion,
                "pattern": pattern,
                "sparsity": sparsity,
                "scope": scope,
                "allocation": allocation,
            }
            parts = dict.fromkeys(BOTH if component == "both" else (component,), part)
            points.append(_point({"parts": parts}))
    return _once(points)


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    points: tuple[Point, ...] = Field(min_length=1)


def read_points(file: Path) -> list[Point]:
    """The points of a YAML file; each has `parts` (component → how it is pruned) and may have a
    `name`, under which the points of one curve belong together.

    Raises:
        UsageError: the file cannot be read or is not valid; the message names the key.
    """
    try:
        listed = _File.model_validate(read_yaml(file, "'points'"))
    except ValidationError as e:
        raise UsageError(f"{file}: {describe_first(e, 'points')}") from e
    return _once(listed.points)


class Published(NamedTuple):
    """A result of a study. `point` None: the dense model, or a method this version does not have.

    `sparsity` is what was asked of the components pruned, over all their parameters.
    """

    component: str
    method: str
    sparsity: float
    fid: float
    clip_score: float
    point: Point | None


_SIZES = {"text_encoder": 340_387_840, "unet": 865_910_724}  # parameters of Stable Diffusion 2
_STUDY = Path(__file__).parent / "data" / "ramesh_zhao_2024.csv"


def published() -> list[Published]:
    """All results of Ramesh and Zhao 2024, in the order of their file."""
    with _STUDY.open(encoding="utf-8", newline="") as file:
        return [_published(row) for row in csv.DictReader(file)]


def preset(name: str) -> list[Point]:
    """The settings of a study that can be run with what this version has.

    Raises:
        UsageError: there is no such preset.
    """
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}: expected one of {', '.join(PRESETS)}")
    points = [row.point for row in published() if row.point]
    return sorted(points, key=lambda point: _ORDER.index(point.curve.component))


_ORDER = ("text_encoder", "unet", "both", *(f"whole model {r}" for r in ("6:7", "5:2", "8:1")))


def _published(row: dict[str, str]) -> Published:
    asked = {c: float(row[f"{c}_sparsity"]) for c in BOTH}
    pruned = [c for c in BOTH if asked[c]]
    methods = [row[f"{c}_method"] for c in pruned]
    parts = {c: _part(m, asked[c]) for c, m in zip(pruned, methods, strict=True)}
    component = _component(*asked.values())
    known = bool(parts) and all(parts.values())
    parameters = sum(_SIZES[c] for c in pruned)
    return Published(
        component=component,
        method=" + ".join(dict.fromkeys(methods)),
        sparsity=sum(asked[c] * _SIZES[c] for c in pruned) / parameters if pruned else 0.0,
        fid=float(row["fid"]),
        clip_score=float(row["clip_score"]),
        point=_point({"parts": parts, "name": component if len(parts) > 1 else None})
        if known
        else None,
    )


def _part(method: str, sparsity: float) -> dict[str, Any] | None:
    """How the study's method is called here; None where it is not there."""
    allocation, _, criterion = method.rpartition("_")
    allocation = allocation or "uniform"
    if criterion not in names("criteria") or allocation not in names("allocation"):
        return None
    return {
        "criterion": criterion,
        "sparsity": sparsity,
        "scope": "linear",
        "allocation": allocation,
    }


def _component(text_encoder: float, unet: float) -> str:
    """What a setting of the study varies: one component, both along its diagonal, or how a budget
    for the whole model is split, as the ratio of the two sparsities.
    """
    if not text_encoder or not unet:
        return "unet" if unet else "text_encoder"
    if abs(text_encoder - unet - 0.125) < 1e-9:
        return "both"
    ratio = text_encoder / unet
    return "whole model 6:7" if ratio < 1 else "whole model 5:2" if ratio < 4 else "whole model 8:1"


def _once(points: Sequence[Point]) -> list[Point]:
    return [point for i, point in enumerate(points) if point not in points[:i]]


def _point(data: dict[str, Any]) -> Point:
    try:
        return Point.model_validate(data)
    except ValidationError as e:
        raise UsageError(describe_first(e, "points")) from e
