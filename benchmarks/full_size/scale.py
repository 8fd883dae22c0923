"""Time and memory of prune, export, verify and pack against the size of the model.

    python benchmarks/full_size/scale.py --work DIR [--sizes 10M 30M 100M 300M 1G 2G] [--rounds 2]

Every command is a cold process, as in measure.py: 2:4 in every Linear and Conv, the export with its
graph known (and the first, cold one, once), verify of the exported model, pack. One size besides
in four shards. Straight lines `seconds = a + b·parameters` and `peak = a + b·parameters` are fitted
by least relative squares, so that each size counts the same. Writes scale.csv, scale.json and
scale.svg beside this file and puts the table into README.md. A run that was stopped goes on where
it was; models and outputs of a size are removed when it is done.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.criteria.plots import COLOURS, MARKERS
from benchmarks.full_size.contestants import (
    COLD,
    COMPONENTS,
    KNOWN,
    PRUNED,
    SDCOMPRESS,
    Contestant,
    Settings,
    contestants,
)
from benchmarks.full_size.make_model import SIZES
from benchmarks.full_size.measure import (
    answer_file,
    check_protocol,
    discard,
    mark,
    measure,
    parameters,
)
from benchmarks.structured.report import put_in
from export.bench import environment
from sdcompress.bundle import write_json, write_text

HERE = Path(__file__).parent
VERIFY, PACK = "verify, ONNX", "pack"
STEPS = (PRUNED, KNOWN, VERIFY, PACK)
SHARDS = 4
BYTES = 2  # of a parameter in fp16
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "sdcompress",  # ids that do not change from run to run
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


class Line(NamedTuple):
    """`a + b·x`; `worst` is the largest residual, relative to what was measured."""

    a: float
    b: float
    worst: float


def straight(x: Sequence[float], y: Sequence[float]) -> Line:
    """The line with the least sum of squared relative residuals."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    rows = np.stack([1 / ys, xs / ys], axis=1)
    a, b = np.linalg.lstsq(rows, np.ones_like(ys), rcond=None)[0]
    return Line(float(a), float(b), float(np.abs((a + b * xs) / ys - 1).max()))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--sharded", choices=[*SIZES, "none"], default="300M", metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE, help="where results are written")
    parser.add_argument("--report", action="store_true", help="measure nothing more")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds: expected at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    work = args.work.resolve()
    places = [(size, 1) for size in args.sizes]
    if args.sharded in args.sizes:
        places.insert(args.sizes.index(args.sharded) + 1, (args.sharded, SHARDS))
    if not args.report:
        for size, shards in places:
            measure_size(work, size, shards, args.rounds)
    write([row for place in places for row in read_rows(work, *place)], args.out)
    return 0


def place_of(work: Path, size: str, shards: int) -> Path:
    return work / (size if shards == 1 else f"{size}, {shards} shards")


def steps(model: Path, work: Path) -> list[Contestant]:
    """Everything of measure.py, for those that make what others need, and `pack`."""
    packed, pruned = work / "model.sdz", work / "two_four"
    line = (*SDCOMPRESS, "pack", str(pruned), "-o", str(packed), "--json")
    pack = Contestant(PACK, "pack", line, reads=(pruned,), makes=(packed,))
    return [*contestants(model, work, Settings()), pack]


def measure_size(work: Path, size: str, shards: int, rounds: int) -> None:
    """All steps of one size that there is no answer of."""
    place = place_of(work, size, shards)
    model, outputs = place / "model", place / "outputs"
    wanted = dict.fromkeys(STEPS, rounds) | ({COLD: 1} if shards == 1 else {})
    missing = [
        (name, number)
        for number in range(rounds)
        for name in (PRUNED, COLD, KNOWN, VERIFY, PACK)
        if number < wanted.get(name, 0) and not _answer(outputs, name, number).exists()
    ]
    if not missing:
        return
    print(place.name, flush=True)
    if not model.exists():
        make = [sys.executable, str(HERE / "make_model.py"), str(model), "--parameters", size]
        subprocess.run([*make, "--shards", str(shards)], check=True, stdout=subprocess.DEVNULL)
    check_protocol(outputs, model)
    everything = steps(model, outputs)
    by_name = {one.name: one for one in everything}
    share_graphs(place_of(work, size, 1) / "outputs", outputs)
    for name, number in missing:
        measure(by_name[name], number, outputs, everything)
    for path in [model, *(path for one in everything for path in one.makes)]:
        mark(path, outputs).unlink(missing_ok=True)
        if path.name != "cache":  # small, and the one in shards takes it
            discard(path)


def share_graphs(one: Path, other: Path) -> None:
    """The same architecture in shards has the same graphs."""
    if one != other and (one / "cache").exists() and not (other / "cache").exists():
        shutil.copytree(one / "cache", other / "cache")
        mark(other / "cache", other).touch()


def _answer(outputs: Path, name: str, number: int) -> Path:
    return answer_file(outputs, Contestant(name, "", ()), number)


def read_rows(work: Path, size: str, shards: int) -> list[dict[str, Any]]:
    """One a step. Times in seconds, `mb` the weights of UNet and text encoder in 10⁶ bytes."""
    outputs, rows = place_of(work, size, shards) / "outputs", []
    for name in (COLD, *STEPS):
        files = sorted(_answer(outputs, name, 0).parent.glob("*.json"))
        if not files:
            continue
        answers = [json.loads(file.read_text()) for file in files]
        counts = parameters(outputs)
        count = sum(counts[component] for component in COMPONENTS)
        seconds = [a["seconds"] for a in answers]
        rows.append(
            {
                "step": name,
                "size": size,
                "shards": shards,
                "parameters": count,
                "mb": round(count * BYTES / 1e6, 1),
                "rounds": len(answers),
                "seconds": round(median(seconds), 3),
                "lowest": round(min(seconds), 3),
                "highest": round(max(seconds), 3),
                "cpu_seconds": round(median(a["cpu_seconds"] for a in answers), 2),
                "peak_mb": round(max(a["peak_bytes"] for a in answers) / 1e6, 1),
                "read_mb": round(median(a["read_bytes"] for a in answers) / 1e6, 1),
                "written_mb": round(median(a["written_bytes"] for a in answers) / 1e6, 1),
            }
        )
    return rows


def fits(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Line]]:
    """By step, the lines of `seconds`, `cpu_seconds` and `peak_mb` over 10⁹ parameters."""
    found = {}
    for step in (*STEPS, COLD):
        here = [row for row in rows if row["step"] == step and row["shards"] == 1]
        if len(here) > 2:
            x = [row["parameters"] / 1e9 for row in here]
            found[step] = {
                figure: straight(x, [row[figure] for row in here])
                for figure in ("seconds", "cpu_seconds", "peak_mb")
            }
    return found


def write(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Everything there is an answer of; prints the tables."""
    out.mkdir(parents=True, exist_ok=True)
    lines = fits(rows)
    document = {
        "rows": [*rows],
        "lines": {
            step: {figure: line._asdict() for figure, line in found.items()}
            for step, found in lines.items()
        },
        "environment": environment().model_dump(mode="json"),
    }
    write_json(out / "scale.json", document)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0]] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "scale.csv", text.getvalue())
    write_text(out / "scale.svg", draw(rows, lines))
    tables = {"scale": as_table(rows), "lines": as_lines(lines)}
    for table in tables.values():
        print("", *table, sep="\n")
    if (readme := out / "README.md").exists():
        write_text(readme, put_in(readme.read_text(encoding="utf-8"), tables))


def as_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a size, a column a step: seconds, and the peak of its memory."""
    names = [s for s in (*STEPS, COLD) if any(row["step"] == s for row in rows)]
    lines = [
        f"| | weights, MB | {' | '.join(names)} |",
        "|---" * (2 + len(names)) + "|",
    ]
    for size, shards in dict.fromkeys((row["size"], row["shards"]) for row in rows):
        here = {r["step"]: r for r in rows if (r["size"], r["shards"]) == (size, shards)}
        title = size if shards == 1 else f"{size}, {shards} shards"
        cells = [
            f"{here[n]['seconds']:.2f} s, {here[n]['peak_mb']:.0f} MB" if n in here else ""
            for n in names
        ]
        weights = next(iter(here.values()))["mb"]
        lines.append(f"| {title} | {weights:.0f} | {' | '.join(cells)} |")
    return lines


def as_lines(lines: Mapping[str, Mapping[str, Line]]) -> list[str]:
    """What the straight lines say."""
    table = [
        "| | start, s | s per 10⁹ parameters | farthest from the line | start, MB "
        "| bytes a parameter | farthest from the line |",
        "|---|---|---|---|---|---|---|",
    ]
    for step, found in lines.items():
        time, peak = found["seconds"], found["peak_mb"]
        table.append(
            f"| {step} | {time.a:.2f} | {time.b:.2f} | {time.worst:.0%} | {peak.a:.0f} "
            f"| {peak.b / 1e3:.2f} of {BYTES} | {peak.worst:.0%} |"
        )
    return table


def draw(rows: Sequence[Mapping[str, Any]], lines: Mapping[str, Mapping[str, Line]]) -> str:
    """The SVG: seconds, nanoseconds a parameter, and peak memory, over the number of parameters."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 4.5), layout="constrained")
        panels = figure.subplots(1, 3)
        for i, step in enumerate((*STEPS, COLD)):
            here = [row for row in rows if row["step"] == step and row["shards"] == 1]
            x = np.array([row["parameters"] for row in here])
            seconds = np.array([row["seconds"] for row in here])
            look = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": "none"}
            panels[0].plot(x, seconds, label=step, **look)
            panels[1].plot(x, seconds / x * 1e9, **{**look, "linestyle": "-"})
            panels[2].plot(x, [row["peak_mb"] for row in here], **look)
            if step in lines:
                wide = np.geomspace(x.min(), x.max())
                for axes, name in ((panels[0], "seconds"), (panels[2], "peak_mb")):
                    line = lines[step][name]
                    axes.plot(wide, line.a + line.b * wide / 1e9, color=COLOURS[i], linewidth=0.9)
        for row in (row for row in rows if row["shards"] > 1):
            for axes, name in ((panels[0], "seconds"), (panels[2], "peak_mb")):
                axes.plot(row["parameters"], row[name], "+", color="black", markersize=9)
        if rows:
            ends = np.array(
                [min(r["parameters"] for r in rows), max(r["parameters"] for r in rows)]
            )
            panels[2].plot(ends, ends * BYTES / 1e6, color="#999999", linestyle=":")
            place = {"color": "#777777", "ha": "right", "va": "bottom", "fontsize": 8}
            panels[2].text(ends[1], ends[1] * BYTES / 1e6, "the weights themselves", **place)
        titles = (
            "seconds, and straight lines (+: in shards)",
            "nanoseconds a parameter",
            "peak memory, MB, and straight lines",
        )
        for axes, title in zip(panels, titles, strict=True):
            axes.set(xscale="log", yscale="log", xlabel="parameters of UNet and text encoder")
            axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=5)
        text = io.StringIO()
        nobody: dict[str, Any] = {"Date": None, "Creator": None}
        figure.savefig(text, format="svg", metadata=nobody)
    return text.getvalue()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or what is measured would live on
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
