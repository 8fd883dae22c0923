"""Time and memory of plan, prune, export and verify on the exact size of Stable Diffusion 2.

    python benchmarks/full_size/make_model.py MODEL
    python benchmarks/full_size/measure.py MODEL --work DIR [--rounds 1] [--recipe sd2-2to4]

Every command is a cold process of its own, in turn with `cp` of the model's files, which is what
anything that reads and writes the whole model cannot beat. Both are warm in the page cache and
followed by `sync`. Peak memory is anonymous memory of the process tree; mapped files do not count.
Writes `results.json` and `results.csv` beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from export.bench import environment
from sdcompress.bundle import write_json
from sdcompress.measure import PeakMemory

CACHE = "cache"
SDCOMPRESS = [sys.executable, "-c", "from sdcompress.commands import main; main()"]


def commands(model: Path, work: Path, recipe: str) -> dict[str, tuple[list[str], list[Path]]]:
    """Name → the command, and what is removed before each round.

    The first export finds no traced graph in the cache, the second finds them all.
    """
    pruned, onnx, copy = work / "pruned", work / "onnx", work / "copy"
    export = [*SDCOMPRESS, "export", str(pruned), "-o", str(onnx), "--json"]
    return {
        "cp": (["cp", "-r", str(model), str(copy)], [copy]),
        "plan": ([*SDCOMPRESS, "plan", recipe, "--model", str(model), "--json"], []),
        "prune": (
            [*SDCOMPRESS, "prune", str(model), "--recipe", recipe, "-o", str(pruned), "--json"],
            [pruned],
        ),
        "export": (export, [onnx, work / CACHE]),
        "export, graph known": (export, [onnx]),
        "verify": (
            [*SDCOMPRESS, "verify", str(onnx), "--against", str(pruned), "--no-parity", "--json"],
            [],
        ),
    }


def measure(command: list[str]) -> dict[str, float]:
    """Run one command; seconds until it and a `sync` have ended, and peak bytes."""
    os.sync()
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        with PeakMemory(process.pid, every=0.1) as memory:
            code = process.wait()
        os.sync()
    seconds = time.perf_counter() - start
    if code != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    return {"seconds": seconds, "peak_bytes": memory.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--recipe", default="sd2-2to4")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    rounds: dict[str, list[dict[str, float]]] = {}
    os.environ["SDCOMPRESS_CACHE"] = str(args.work / CACHE)
    for _ in range(args.rounds):
        for name, (command, gone) in commands(args.model, args.work, args.recipe).items():
            for path in gone:
                shutil.rmtree(path, ignore_errors=True)
            rounds.setdefault(name, []).append(measure(command))
            print(name, json.dumps(rounds[name][-1]), flush=True)
    copy = statistics.median(r["seconds"] for r in rounds["cp"])
    rows = []
    for name, series in rounds.items():
        seconds = sorted(r["seconds"] for r in series)
        median = statistics.median(seconds)
        rows.append(
            {
                "command": name,
                "median_s": round(median, 2),
                "lowest_s": round(seconds[0], 2),
                "highest_s": round(seconds[-1], 2),
                "times_cp": round(median / copy, 2),
                "peak_mb": round(max(r["peak_bytes"] for r in series) / 1e6),
            }
        )
    with (args.out / "results.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    facts = {
        "recipe": args.recipe,
        "rounds": args.rounds,
        "environment": environment().model_dump(mode="json"),
        "commands": rows,
    }
    write_json(args.out / "results.json", facts)


if __name__ == "__main__":
    main()
