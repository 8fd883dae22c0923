"""What structured pruning brings: speed at two sizes, and what it costs in the pictures.

    python benchmarks/structured/measure.py --work DIR [--part mini full quality] [--jobs N]

mini, full: one denoising step of the UNet, dense against `--budget latency=0.75` and `--budget
macs=0.7`, in turn, on the CPU; of mini-sd2, and of the exact size of Stable Diffusion 2 with seeded
weights. Nothing else should run meanwhile. quality: criteria, budgets and tuning, on mini-sd2.

Writes results.json and results.csv beside this file and puts the tables into README.md. A run that
was stopped goes on where it was; to measure something anew, remove its file or folder from DIR.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.criteria import one_point
from benchmarks.criteria.measure import SAMPLES, Task, processes, run
from benchmarks.structured import quality, report, speed
from benchmarks.structured.points import all_points, protocol
from sdcompress.bundle import write_json

HERE = Path(__file__).parent
ALL = (*speed.PARTS, "quality")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where answers are kept")
    parser.add_argument("--part", nargs="+", choices=ALL, default=ALL, help="what is measured")
    parser.add_argument("--model", help="the full size, instead of one made with seeded weights")
    parser.add_argument("--rounds", type=int, help="of fresh processes, at least 2")
    parser.add_argument("--jobs", type=int, default=1, help="processes of quality, a thread each")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="prompts, at least 2")
    parser.add_argument("--points", type=int, help="of quality only so many, the first ones")
    parser.add_argument("--out", type=Path, default=HERE, help="where results are written")
    parser.add_argument("--report", action="store_true", help="measure nothing more")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.samples < 2:
        parser.error("expected --jobs of at least 1 and --samples of at least 2")
    if args.rounds is not None and args.rounds < 2:
        parser.error("--rounds: one round has no spread; give at least 2, better 7 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    work, failed = args.work.resolve(), dict[str, str]()
    if not args.report:
        for part in args.part:
            if part in speed.PARTS:
                speed.measure(speed.PARTS[part], work / part, args.model, args.rounds)
            else:
                failed = measure_quality(work, args.jobs, args.samples, args.points)
    report.write(work, args.samples, failed, args.out)
    return 1 if failed else 0


def measure_quality(work: Path, jobs: int, samples: int, points: int | None) -> dict[str, str]:
    """Every point that `work` has no answer of; returns what could not be measured, and why."""
    place, failed = work / "quality", dict[str, str]()
    check_protocol(place, samples)
    speed.measure_table(speed.PARTS["mini"], work / "mini", "mini-sd2")  # before others work
    table = speed.table_of(work / "mini")
    with processes(jobs) as pool:
        painted = {
            name: (one_point.paint_dense, (place, samples, which))
            for which, name in enumerate(("dense pictures", "dense pictures, other seeds"))
        }
        run(pool, painted, failed)
        tasks: dict[str, Task] = {
            str(point): (quality.measure_point, (point, table, place, samples))
            for point in all_points()[:points]
            if not quality.answer_file(place, point).exists()
        }
        if not (place / one_point.DENSE).exists():
            tasks = {"dense": (one_point.measure_dense, (place, samples)), **tasks}
        run(pool, tasks, failed)
    return failed


def check_protocol(place: Path, samples: int) -> None:
    """One folder holds the answers of one protocol."""
    place.mkdir(parents=True, exist_ok=True)
    file, ours = place / "protocol.json", {"protocol": protocol(samples)}
    if not file.exists():
        write_json(file, ours)
    if json.loads(file.read_text()) != ours:
        sys.exit(f"{place}: holds answers for other prompts, settings or tools; choose another DIR")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
