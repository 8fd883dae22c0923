"""From the answers of all points to results.json, results.csv, the plot and the tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.criteria import modelopt_peer, one_point, plots, record
from benchmarks.criteria.points import (
    CALIBRATION,
    COMPONENTS,
    JUDGED,
    PACKAGES,
    PEERS,
    SPARSITIES,
    TWO_FOUR,
    Point,
    settings,
)
from benchmarks.criteria.verdicts import (
    ENOUGH,
    Interval,
    Measured,
    at_least_as_good,
    closest,
    mean,
    overall,
    spread,
)
from export.bench import environment
from sdcompress.bundle import write_json, write_text

# What is held against every other method; and of those, the refit that is our own.
JUDGED_METHODS = ("obs_diff", f"obs_diff, {PACKAGES} packages", "obs_refit")
OWN = ("obs_refit", f"obs_refit, {PACKAGES} packages")
ACCURACY, DISTANCE = "prompt_accuracy", "above_floor"
TITLES = {ACCURACY: "Prompt accuracy", DISTANCE: "Fréchet distance to dense above the floor"}


class Row(NamedTuple):
    """One point. `figures`: prompt_accuracy, clip_score and psnr with their differences to dense,
    clip_distance, and above_floor, which is that less the floor.
    """

    point: Point
    sparsity: dict[str, float]
    figures: dict[str, Interval]
    measured: Measured
    cpu_seconds: dict[str, float]


def write(
    work: Path, points: Sequence[Point], failed: Mapping[str, str], samples: int, out: Path
) -> None:
    """Everything there is an answer of; prints what people read."""
    dense = json.loads((work / one_point.DENSE).read_text())
    rows = list(read_rows(work, points, dense))
    found = verdicts(rows)
    asked = settings(samples).model_dump(mode="json", exclude={"prompts"}, exclude_none=True)
    results = {
        "samples": samples,
        "settings": asked,
        "calibration": CALIBRATION,
        "dense": {name: _plain(mean(np.array(v))) for name, v in dense["scores"].items()},
        "floor": {n: _plain(figure) for n, figure in floor_figures(dense).items()},
        "criteria": _costs(work, points),
        "modelopt": _modelopt(work),
        "points": [_as_json(row) for row in rows],
        "verdicts": _plain(found),
        "wide": too_wide(rows, found),
        "missing": [str(p) for p in points if not one_point.point_file(work, p).exists()],
        "failed": dict(failed),
        "environment": environment().model_dump(mode="json"),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results)
    write_text(out / "results.csv", as_csv(rows))
    write_text(out / "quality.svg", plots.draw([plots.Mark(r.point, r.figures) for r in rows]))
    print(in_words(rows, found, results))


def read_rows(work: Path, points: Sequence[Point], dense: Mapping[str, Any]) -> Iterator[Row]:
    for point in points:
        file = one_point.point_file(work, point)
        if file.exists():
            yield make_row(point, json.loads(file.read_text()), dense)


def make_row(point: Point, answer: Mapping[str, Any], dense: Mapping[str, Any]) -> Row:
    figures = {}
    for name, values in answer["scores"].items():
        figures[name] = mean(np.array(values))
        figures[f"{name}_difference"] = mean(np.subtract(values, dense["scores"][name]))
    figures |= {name: mean(np.array(values)) for name, values in answer["drift"].items()}
    distances = np.array(answer["distances"])
    above = distances - np.array(dense["floor"]["distances"])
    figures["clip_distance"], figures[DISTANCE] = spread(distances), spread(above)
    measured = Measured(np.array(answer["scores"][ACCURACY]), above)
    return Row(point, answer["sparsity"], figures, measured, answer["cpu_seconds"])


def floor_figures(dense: Mapping[str, Any]) -> dict[str, Interval]:
    """What other seeds change: differences of scores, drifts and the distance."""
    floor = dense["floor"]
    found = {
        f"{name}_difference": mean(np.subtract(values, dense["scores"][name]))
        for name, values in floor["scores"].items()
    }
    found |= {name: mean(np.array(values)) for name, values in floor["drift"].items()}
    return {**found, "clip_distance": spread(np.array(floor["distances"]))}


def verdicts(rows: Sequence[Row]) -> dict[str, Any]:
    """Of 2:4 and 60 % in each component set; `shared`: 2:4 in the layers that ModelOpt prunes too.

    A mode of ModelOpt that prunes just those layers is itself there, as it is.
    """
    found: dict[str, Any] = {}
    for components in COMPONENTS:
        for pattern in JUDGED:
            here = [r for r in rows if r.point[1:3] == (components, pattern)]
            whole = {r.point.method: r.measured for r in here if not r.point.shared}
            shared = {r.point.method: r.measured for r in here if r.point.shared}
            shared |= {n: m for n, m in whole.items() if shared and n in PEERS and n not in shared}
            entry: dict[str, Any] = {}
            for where, there in (("", whole), (", shared layers", shared)):
                for ours in JUDGED_METHODS:
                    if len(there) > 1 and ours in there:
                        entry[f"{ours}{where}"] = _duels(there, ours)
            criteria = {n: m for n, m in whole.items() if n not in PEERS}
            if "magnitude" in criteria:
                entry["closest"] = closest(criteria)
            if entry:
                found[f"{components} {pattern}"] = entry
    return found


def _duels(measured: Mapping[str, Measured], ours: str) -> dict[str, Any]:
    others = {n: at_least_as_good(measured[ours], m) for n, m in measured.items() if n != ours}
    published = {n: duel for n, duel in others.items() if n not in OWN}
    own = {n: duel for n, duel in others.items() if n in OWN}
    return {
        "at_least_as_good": overall(published),
        **({"as_our_refit": overall(own)} if own else {}),
        "than": others,
    }


def too_wide(rows: Sequence[Row], found: Mapping[str, Any]) -> list[str]:
    """Every interval of an accuracy whose half-width is more than 5 points."""
    intervals = {
        f"{row.point}: {name}": row.figures[name]
        for row in rows
        for name in (ACCURACY, f"{ACCURACY}_difference")
    }
    for where, entry in found.items():
        for ours, duels in entry.items():
            for other, duel in duels.get("than", {}).items():
                intervals[f"{where}: {ours} less {other}"] = duel["accuracy_difference"]
    return [f"{n}: ±{i.half_width:.4f}" for n, i in intervals.items() if i.half_width > ENOUGH]


def _costs(work: Path, points: Sequence[Point]) -> dict[str, Any]:
    files = {
        p.method: one_point.criterion_folder(work, p.method) / record.COST
        for p in points
        if p.method not in PEERS
    }
    return {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}


def _modelopt(work: Path) -> dict[str, Any]:
    files = {n: one_point.peer_folder(work, n) / modelopt_peer.REPORT for n in PEERS}
    return {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}


def _plain(found: Any) -> Any:
    """For JSON."""
    if isinstance(found, Interval):
        return found.as_json()
    if isinstance(found, Mapping):
        return {name: _plain(entry) for name, entry in found.items()}
    return found


def _as_json(row: Row) -> dict[str, Any]:
    return {
        **row.point._asdict(),
        "sparsity": {name: round(x, 4) for name, x in row.sparsity.items()},
        "figures": _plain(row.figures),
        "cpu_seconds": row.cpu_seconds,
    }


def as_csv(rows: Sequence[Row]) -> str:
    """One row a point; sparsities are fractions."""
    table = []
    for row in rows:
        flat: dict[str, Any] = {**row.point._asdict(), "shared": int(row.point.shared)}
        flat |= {name: round(x, 4) for name, x in row.sparsity.items()}
        for name, figure in row.figures.items():
            ends = figure.as_json()
            flat |= {name: ends["value"], f"{name}_low": ends["low"], f"{name}_high": ends["high"]}
        table.append({**flat, "cpu_seconds": round(sum(row.cpu_seconds.values()), 1)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def in_a_line(answer: Mapping[str, Any]) -> str:
    seconds = answer.get("cpu_seconds", {})
    took = f", {sum(seconds.values()):.0f} CPU s" if seconds else ""
    distance = f", distance {answer['distances'][0]:.3f}" if "distances" in answer else ""
    return f"accuracy {np.mean(answer['scores'][ACCURACY]):.3f}{distance}{took}"


def in_words(rows: Sequence[Row], found: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Tables in Markdown, then the verdicts, then all that is not as it should be."""
    lines = []
    for components in COMPONENTS:
        for name, title in TITLES.items():
            lines += ["", f"{title}, {components}", "", *as_table(rows, components, name)]
    lines.append("")
    for where, entry in found.items():
        for ours, duels in entry.items():
            if "than" in duels:
                refit = duels.get("as_our_refit", "not measured")
                lines.append(
                    f"{where}: {ours} at least as good as every published method: "
                    f"{duels['at_least_as_good']}; as our refit: {refit}"
                )
                lines += [f"  {_duel(other, duel)}" for other, duel in duels["than"].items()]
        if best := entry.get("closest"):
            lines.append(
                f"{where}: closest is {best['method']}, {_figure(best['times'], 1)} times as close "
                f"as magnitude; at least twice: {best['twice']}"
            )
    for title in ("wide", "missing"):
        lines += [f"{title}: {entry}" for entry in results[title]]
    lines += [f"FAILED {name}: {reason}" for name, reason in results["failed"].items()]
    return "\n".join(lines)


def as_table(rows: Sequence[Row], components: str, figure: str) -> list[str]:
    """A line a method, a column a pattern."""
    patterns = (*sorted(SPARSITIES), TWO_FOUR)
    cells: dict[str, dict[str, str]] = {}
    for row in (r for r in rows if r.point.components == components):
        name = f"{row.point.method}, shared layers" if row.point.shared else row.point.method
        cells.setdefault(name, {})[row.point.pattern] = _figure(row.figures[figure], 3)
    return [
        "| | " + " | ".join(patterns) + " |",
        "|---" * (1 + len(patterns)) + "|",
        *(
            f"| {name} | " + " | ".join(found.get(p, "") for p in patterns) + " |"
            for name, found in cells.items()
        ),
    ]


def _duel(other: str, duel: Mapping[str, Any]) -> str:
    return (
        f"{other}: accuracy {duel['accuracy']} ({_figure(duel['accuracy_difference'], 3)}), "
        f"distance {duel['distance']} (the other is {_figure(duel['times'], 2)} times as far)"
    )


def _figure(interval: Interval, digits: int) -> str:
    value, low, high = (f"{x:.{digits}f}" for x in interval)
    return f"{value} [{low}, {high}]"
