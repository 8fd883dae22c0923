"""From the answers of every process to results.json, results.csv and the table of README.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.full_size.cold import OK
from benchmarks.full_size.contestants import CP, HASHLIB, PARTS, SHA256SUM, Contestant
from benchmarks.structured.report import put_in
from export.bench import environment
from sdcompress.bundle import write_json, write_text

Answers = Mapping[str, Sequence[Mapping[str, Any]]]
TABLE = "table"


def write(
    answers: Answers,
    everything: Sequence[Contestant],
    parameters: Mapping[str, int],
    out: Path,
) -> None:
    """Everything there is an answer of; prints the table."""
    rows = make_rows(answers, everything)
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "parameters": dict(parameters),
        "commands": rows,
        "environment": environment().model_dump(mode="json"),
    }
    write_json(out / "results.json", results)
    write_text(out / "results.csv", as_csv(rows))
    table = as_table(rows, everything)
    print("", *table, sep="\n")
    if (readme := out / "README.md").exists():
        write_text(readme, put_in(readme.read_text(encoding="utf-8"), {TABLE: table}))


def make_rows(answers: Answers, everything: Sequence[Contestant]) -> list[dict[str, Any]]:
    """One a command that was measured. Times in seconds, sizes in MB (10⁶ bytes).

    `ratio` is of the medians, this command's and that of `of`, which ended well; `reached` says
    whether everything that was asked holds.
    """
    middles = {
        name: median(a["seconds"] for a in rounds)
        for name, rounds in answers.items()
        if all(a["outcome"] == OK for a in rounds)
    }
    rows = []
    for one in (c for c in everything if c.name in answers):
        rounds = answers[one.name]
        seconds = [a["seconds"] for a in rounds]
        bad = sorted({a["outcome"] for a in rounds} - {OK})
        row: dict[str, Any] = {
            "command": one.name,
            "part": one.part,
            "peer": one.peer,
            "outcome": "; ".join(bad) or OK,
            "rounds": len(rounds),
            "seconds": round(median(seconds), 3),
            "lowest": round(min(seconds), 3),
            "highest": round(max(seconds), 3),
            "cpu_seconds": round(median(a["cpu_seconds"] for a in rounds), 2),
            "peak_mb": round(max(a["peak_bytes"] for a in rounds) / 1e6, 1),
            "read_mb": round(median(a["read_bytes"] for a in rounds) / 1e6),
            "written_mb": round(median(a["written_bytes"] for a in rounds) / 1e6),
            "busy_cores": round(max(a["busy_cores"] for a in rounds), 2),
            "times_cp": _ratio(one.name, CP, middles),
            "times_hashlib": _ratio(one.name, HASHLIB, middles),
            "asked": None,
            "of": None,
            "ratio": None,
            "reached": None,
            "said": _told(rounds[-1]["said"]) if one.peer else {},
        }
        if one.asked:
            row |= {"of": one.asked.of, "asked": one.asked.times}
            row["ratio"] = _ratio(one.name, one.asked.of, middles)
            if row["ratio"] is not None:
                peak = one.asked.peak_bytes
                small = peak is None or row["peak_mb"] * 1e6 <= peak
                row["reached"] = row["ratio"] <= one.asked.times and small
        rows.append(row)
    return rows


def _ratio(name: str, of: str, middles: Mapping[str, float]) -> float | None:
    if name not in middles or of not in middles:
        return None
    return round(middles[name] / middles[of], 3)


def _told(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a peer counted."""
    return {name: value for name, value in said.items() if isinstance(value, (int, float))}


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    names = [name for name in rows[0] if name != "said"] if rows else []
    writer = csv.DictWriter(text, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_table(rows: Sequence[Mapping[str, Any]], everything: Sequence[Contestant]) -> list[str]:
    """In Markdown, the parts under each other. Peers in italics."""
    limits = {one.name: one.asked for one in everything}
    lines = [
        "| | seconds | CPU s | ÷ `cp` | peak MB | read MB | written MB | rounds | asked |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for part, title in PARTS.items():
        here = [row for row in rows if row["part"] == part]
        if here:
            lines.append(f"| **{title}** | | | | | | | | |")
        for row in here:
            name = f"*{row['command']}*" if row["peer"] else row["command"]
            seconds = f"{row['seconds']:.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]"
            if row["outcome"] != OK:
                seconds = f"{row['outcome']}, after {row['seconds']:.0f} s"
                if row["outcome"].startswith("stopped"):
                    seconds = row["outcome"]
            ratio = "" if row["times_cp"] is None else f"{row['times_cp']:.2f}"
            cells = [
                name,
                seconds + _counted(row["said"]),
                f"{row['cpu_seconds']:.1f}",
                ratio,
                f"{row['peak_mb']:.0f}",
                f"{row['read_mb']}",
                f"{row['written_mb']}",
                f"{row['rounds']}",
                _asked(row, limits[row["command"]]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _counted(said: Mapping[str, Any]) -> str:
    return f": {said['done']} of {said['tensors']} tensors" if "tensors" in said else ""


def _asked(row: Mapping[str, Any], limit: Any) -> str:
    if limit is None:
        return ""
    peak = "" if limit.peak_bytes is None else f", {limit.peak_bytes / 1e9:g} GB"
    asked = f"≤ {limit.times:g} × {limit.of}{peak}"
    if row["ratio"] is None:
        return f"{asked}: no figure of {limit.of}"
    verdict = "reached" if row["reached"] else "**not reached**"
    beside = ""
    if limit.of == SHA256SUM and row["times_hashlib"] is not None:
        beside = f"; {row['times_hashlib']:.2f} × {HASHLIB}"
    return f"{asked}: {row['ratio']:.2f}, {verdict}{beside}"


def in_a_line(answer: Mapping[str, Any]) -> str:
    return (
        f"{answer['seconds']:.2f} s, {answer['cpu_seconds']:.1f} CPU s, "
        f"{answer['peak_bytes'] / 1e6:.0f} MB"
        + ("" if answer["outcome"] == OK else f", {answer['outcome']}")
    )
