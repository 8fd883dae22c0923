"""From the answers of all parts to results.json, results.csv and the tables of README.md."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.criteria import one_point
from benchmarks.criteria.points import CALIBRATION, TWO_FOUR, settings
from benchmarks.criteria.report import ACCURACY, DISTANCE, floor_figures
from benchmarks.criteria.verdicts import Interval, mean, spread
from benchmarks.structured import speed
from benchmarks.structured.points import MACS, MAIN, TUNE, Point, all_points
from benchmarks.structured.quality import answer_file
from benchmarks.structured.worker import UNET
from sdcompress.bundle import write_json, write_text
from sdcompress.measure import Comparison

LIMIT = 0.77  # of the dense latency, for a budget of 0.75
QUALITY = "quality"
COLUMNS = ("part", "what", "figure", "value", "low", "high")
DIGITS = 4
Rows = Iterator[dict[str, Any]]


class Row(NamedTuple):
    """One point of the quality. `figures`: prompt_accuracy and its difference to dense, psnr,
    clip_distance, and above_floor, which is that less the floor.
    """

    point: Point
    shares: dict[str, float]  # of dense: parameters, macs; latency by the table; zeros of the UNet
    figures: dict[str, Interval]
    cpu_seconds: dict[str, float]


def write(work: Path, samples: int, failed: Mapping[str, str], out: Path) -> None:
    """Everything there is an answer of; prints the tables."""
    parts = {name: speed.results(part, work / name) for name, part in speed.PARTS.items()}
    measured = {name: found for name, found in parts.items() if found}
    rows, dense = read_quality(work / QUALITY)
    found: dict[str, Any] = dict(measured)
    if dense:
        found[QUALITY] = quality_json(rows, dense, samples, failed)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", found)
    write_text(out / "results.csv", as_csv([*speed_rows(measured), *quality_rows(rows)]))
    tables = {name: speed_tables(one) for name, one in measured.items()}
    if dense:
        tables[QUALITY] = quality_tables(rows, dense)
    for name, lines in tables.items():
        print(f"\n{name}\n", *lines, sep="\n")
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}")
    if (readme := out / "README.md").exists():
        write_text(readme, put_in(readme.read_text(encoding="utf-8"), tables))


def put_in(text: str, tables: Mapping[str, Sequence[str]]) -> str:
    """The text with each table between the two comments that bear its name."""
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if found and closed:
            text = "\n".join([f"{before}{begin}", "", *lines, "", f"{end}{after}"])
    return text


# Speed.


def speed_rows(measured: Mapping[str, Mapping[str, Any]]) -> Rows:
    """For the CSV. Times in milliseconds, sizes in bytes, ratios as shares of dense."""
    for part, found in measured.items():
        for what, one in found["budgets"].items():
            name = f"{what} {one['asked']:g}"
            for measure, m in one["measures"].items():
                for contestant in ("dense", "sparse"):
                    figure = f"{measure} {'dense' if contestant == 'dense' else 'narrow'}"
                    rounds = sorted(m[contestant]["rounds"])
                    middle = float(np.median(rounds))
                    yield _row(part, name, figure, Interval(middle, rounds[0], rounds[-1]))
                for figure in ("sparse_to_dense", "control_to_dense"):
                    c = Comparison.model_validate(m[figure])
                    title = f"{measure} {figure.replace('sparse', 'narrow').replace('_', ' ')}"
                    yield _row(part, name, title, Interval(c.ratio, c.low, c.high))
            for figure in ("engine_size", "parameters", "macs", "foretold"):
                yield _row(part, name, figure, one[figure])
            for kind in one["kinds"]:
                which = f"{name} {kind['kind']} level {kind['level']}"
                for figure, value in zip(("macs", "time"), kind["saved"], strict=True):
                    yield _row(part, which, f"{figure} saved", value)


def speed_tables(found: Mapping[str, Any]) -> list[str]:
    """The comparison, then what each kind of block saved with the budget of MACs."""
    budgets = found["budgets"]
    heads = [f"`{what}={one['asked']:g}`" for what, one in budgets.items()]
    lines = [
        f"| | dense | {' | '.join(heads)} | dense again |",
        "|---" * (3 + len(budgets)) + "|",
    ]
    for name, title in (
        (UNET, "one step, ms"),
        ("peak_memory", "peak memory, MB"),
        (speed.OWN, "of that the engine's, MB"),
    ):
        several = [one["measures"].get(name) for one in budgets.values()]
        if None in several:
            continue
        unit = 1.0 if name == UNET else 1e6
        first = several[0]
        series = [first["dense"], *(m["sparse"] for m in several), first["control"]]
        cells = [_middle(one["rounds"], unit) for one in series]
        lines.append(f"| {title} | {' | '.join(cells)} |")
        ratios = [m["sparse_to_dense"] for m in several] + [first["control_to_dense"]]
        cells = [f"**{c['ratio']:.3f}** [{c['low']:.3f}, {c['high']:.3f}]" for c in ratios]
        lines.append(f"| ÷ dense | | {' | '.join(cells)} |")
    megabytes = [found["engine_bytes"][name] / 1e6 for name in ("dense", *budgets)]
    lines.append(f"| engine file, MB | {' | '.join(f'{m:.1f}' for m in megabytes)} | |")
    for figure, title in (
        ("engine_size", "engine file ÷ dense"),
        ("parameters", "parameters ÷ dense"),
        ("macs", "MACs ÷ dense: what they predict for the time"),
        ("foretold", "time ÷ dense, by the table"),
    ):
        lines.append(
            f"| {title} | | {' | '.join(f'{b[figure]:.3f}' for b in budgets.values())} | |"
        )
    lines += ["", verdict(found), ""]
    if not found["control"]["trustworthy"]:
        differs = ", ".join(found["control"]["differs"])
        lines += [f"**The control differs** in {differs}: measure again on a quiet machine.", ""]
    macs = budgets["macs"]
    lines += [
        f"Where the time went at `macs={macs['asked']:g}`, by the table: MACs and milliseconds of "
        "all blocks of a kind on a level (0 is the widest picture), and the share of each that is "
        "gone.",
        "",
        "| | level | blocks | width kept | share of MACs | share of time | MACs gone | time gone |"
        " followed |",
        "|---" * 9 + "|",
    ]
    total = _totals(macs)
    for kind in macs["kinds"]:
        lost, saved = kind["saved"]
        lines.append(
            f"| {kind['kind']} | {kind['level']} | {kind['blocks']} | {kind['kept']:.0%} "
            f"| {kind['macs'][0] / total[0]:.1%} | {kind['milliseconds'][0] / total[1]:.1%} "
            f"| {lost:.1%} | {saved:.1%} | {_followed(kind)} |"
        )
    rest = macs["rest"]
    lines.append(
        f"| all else | | | 100% | {rest['macs'] / total[0]:.1%} "
        f"| {rest['milliseconds'] / total[1]:.1%} | 0.0% | 0.0% | |"
    )
    return lines


def verdict(found: Mapping[str, Any]) -> str:
    """Whether the budget of latency was kept, in a sentence."""
    c = Comparison.model_validate(found["budgets"]["latency"]["measures"][UNET]["sparse_to_dense"])
    sure = "" if c.high <= LIMIT or c.low > LIMIT else ", though the interval leaves it open"
    reached = "Reached" if c.ratio <= LIMIT else "Not reached"
    said = f"{c.ratio:.3f} [{c.low:.3f}, {c.high:.3f}] of the dense time"
    return (
        f"Asked: at most {LIMIT} of the dense time for a budget of 0.75. {reached}: {said}{sure}."
    )


def _totals(one: Mapping[str, Any]) -> tuple[float, float]:
    macs = sum(kind["macs"][0] for kind in one["kinds"]) + one["rest"]["macs"]
    time = sum(kind["milliseconds"][0] for kind in one["kinds"]) + one["rest"]["milliseconds"]
    return macs, time


def _followed(kind: Mapping[str, Any]) -> str:
    if kind["saved"][0] == 0:
        return "–"
    return "yes" if kind["followed"] else "**no**"


def _middle(rounds: Sequence[float], unit: float) -> str:
    """Median and, in brackets, the least and the most of all processes."""
    middle, least, most = np.median(rounds) / unit, min(rounds) / unit, max(rounds) / unit
    digits = 0 if middle >= 1000 else 2
    return f"{middle:.{digits}f} [{least:.{digits}f}, {most:.{digits}f}]"


# Quality.


def read_quality(place: Path) -> tuple[list[Row], dict[str, Any] | None]:
    """What has been measured so far, in the order of the points; None without the dense model."""
    file = place / one_point.DENSE
    if not file.exists():
        return [], None
    dense: dict[str, Any] = json.loads(file.read_text())
    points = [p for p in all_points() if answer_file(place, p).exists()]
    rows = (make_row(p, json.loads(answer_file(place, p).read_text()), dense) for p in points)
    return list(rows), dense


def make_row(point: Point, answer: Mapping[str, Any], dense: Mapping[str, Any]) -> Row:
    figures = {}
    for name, values in answer["scores"].items():
        figures[name] = mean(np.array(values))
        figures[f"{name}_difference"] = mean(np.subtract(values, dense["scores"][name]))
    figures |= {name: mean(np.array(values)) for name, values in answer["drift"].items()}
    distances = np.array(answer["distances"])
    above = distances - np.array(dense["floor"]["distances"])
    figures["clip_distance"], figures[DISTANCE] = spread(distances), spread(above)
    names = ("parameters", "macs", "latency", "zeros")
    shares = {name: answer[name] for name in names if answer[name] is not None}
    return Row(point, shares, figures, answer["cpu_seconds"])


def quality_json(
    rows: Sequence[Row], dense: Mapping[str, Any], samples: int, failed: Mapping[str, str]
) -> dict[str, Any]:
    asked = settings(samples).model_dump(mode="json", exclude={"prompts"}, exclude_none=True)
    done = {row.point for row in rows}
    return {
        "samples": samples,
        "settings": asked,
        "calibration": CALIBRATION,
        "tune": TUNE.model_dump(mode="json", exclude_defaults=True),
        "dense": {name: mean(np.array(v)).as_json() for name, v in dense["scores"].items()},
        "floor": {name: figure.as_json() for name, figure in floor_figures(dense).items()},
        "points": [
            {
                **row.point._asdict(),
                **{name: round(share, DIGITS) for name, share in row.shares.items()},
                "figures": {name: figure.as_json() for name, figure in row.figures.items()},
                "cpu_seconds": row.cpu_seconds,
            }
            for row in rows
        ],
        "missing": [str(point) for point in all_points() if point not in done],
        "failed": dict(failed),
    }


def quality_rows(rows: Sequence[Row]) -> Rows:
    for row in rows:
        figures: dict[str, float | Interval] = {**row.shares, **row.figures}
        for name, figure in figures.items():
            yield _row(QUALITY, str(row.point), name, figure)
        yield _row(QUALITY, str(row.point), "cpu_seconds", sum(row.cpu_seconds.values()))


def quality_tables(rows: Sequence[Row], dense: Mapping[str, Any]) -> list[str]:
    """Criteria by budget of MACs, then what tuning and 2:4 make of the two main budgets."""
    found = {row.point: row for row in rows}
    accuracy, floor = mean(np.array(dense["scores"][ACCURACY])), floor_figures(dense)
    lines = [
        f"Dense: prompt accuracy {accuracy.value:.3f}; from other seeds "
        f"{accuracy.value + floor[f'{ACCURACY}_difference'].value:.3f}, at a Fréchet distance of "
        f"{floor['clip_distance'].value:.3f}, the floor. Prompt accuracy, and Fréchet distance "
        "above the floor:",
        "",
        "| | " + " | ".join(f"`macs={share:g}`" for share in MACS) + " |",
        "|---" * (1 + len(MACS)) + "|",
    ]
    for method in dict.fromkeys(p.method for p in all_points()):
        cells = [_cell(found.get(Point(method, "macs", share))) for share in MACS]
        lines.append(f"| {_quoted(method)} | {' | '.join(cells)} |")
    heads = [f"`{budget}={share:g}`" for budget, share in MAIN]
    lines += ["", f"| | {' | '.join(heads)} |", "|---" * (1 + len(MAIN)) + "|"]
    methods = dict.fromkeys(p.method for p in all_points() if p.tuned)
    for method in methods:
        for pattern in ("", TWO_FOUR):
            for tuned in (False, True):
                cells = [
                    _cell(found.get(Point(method, *b, pattern, tuned)), wide=True) for b in MAIN
                ]
                then = (", then 2:4" if pattern else "") + (", tuned" if tuned else "")
                lines.append(f"| {_quoted(method)}{then} | {' | '.join(cells)} |")
    return lines


def _quoted(method: str) -> str:
    name, comma, rest = method.partition(",")
    return f"`{name}`{comma}{rest}"


def _cell(row: Row | None, *, wide: bool = False) -> str:
    """Accuracy and distance; `wide`: with their intervals."""
    if row is None:
        return ""
    figures = row.figures[ACCURACY], row.figures[DISTANCE]
    if wide:
        return ", ".join(f"{f.value:.3f} [{f.low:.3f}, {f.high:.3f}]" for f in figures)
    return ", ".join(f"{f.value:.3f}" for f in figures)


# Both.


def _row(part: str, what: str, figure: str, value: float | Interval) -> dict[str, Any]:
    ends: dict[str, Any] = {"value": round(value, DIGITS)} if isinstance(value, float) else {}
    if isinstance(value, Interval):
        ends = value.as_json()
    return {"part": part, "what": what, "figure": figure, **ends}


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
