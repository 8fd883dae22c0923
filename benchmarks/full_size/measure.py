"""Time and memory of everything that does not run the network, at the size of the real model.

    python benchmarks/full_size/make_model.py MODEL
    python benchmarks/full_size/measure.py MODEL --work DIR [--rounds 5] [--slow-rounds 1]
        [--part prune export ...] [--no-peers] [--modelopt SITE]

Every command, ours and the peers', is a cold process of its own, followed by `sync`, its input warm
in the page cache; all of them once a round, in turn, those that write first, and what takes minutes
after all rounds. Nothing else should run meanwhile. Writes results.json and results.csv beside this
file and puts the table into README.md. A run that was stopped goes on where it was; to measure
something anew, remove its folder from DIR/answers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.full_size import report
from benchmarks.full_size.cold import OK, claim, run_cold, warm
from benchmarks.full_size.contestants import PARTS, Contestant, Settings, contestants
from export.bench import busy_cores
from sdcompress import __version__
from sdcompress.bundle import write_json
from sdcompress.catalog import read_catalog

HERE = Path(__file__).parent


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a diffusers directory")
    parser.add_argument("--work", type=Path, required=True, help="where answers and outputs go")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of what takes minutes")
    parser.add_argument("--no-peers", action="store_true", help="only ours, cp and the digests")
    parser.add_argument("--modelopt", type=Path, help="the folder nvidia-modelopt is installed in")
    defaults = Settings()
    parser.add_argument(
        "--limit-gb", type=float, default=defaults.limit_gb, help="of torch's global pruning"
    )
    parser.add_argument(
        "--cut-off", type=float, default=defaults.cut_off, help="seconds, for polygraphy"
    )
    parser.add_argument("--peer-timeout", type=float, default=defaults.peer_timeout, help="seconds")
    parser.add_argument("--out", type=Path, default=HERE, help="where results are written")
    parser.add_argument("--report", action="store_true", help="measure nothing more")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.slow_rounds < 1:
        parser.error("expected --rounds and --slow-rounds of at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    work = args.work.resolve()
    settings = Settings(
        args.modelopt and args.modelopt.resolve(), args.limit_gb, args.cut_off, args.peer_timeout
    )
    everything = contestants(args.model.resolve(), work, settings)
    if not args.report:
        check_protocol(work, args.model)
        chosen = in_turn(
            c for c in everything if c.part in args.part and not (args.no_peers and c.peer)
        )
        quick, slow = ([c for c in chosen if c.slow is of] for of in (False, True))
        measure_all(quick, args.rounds, work, everything)
        measure_all(slow, args.slow_rounds, work, everything)
        remove_all(everything, work)
    report.write(read_answers(work, everything), everything, parameters(work), args.out)
    return 0


def in_turn(chosen: Iterable[Contestant]) -> list[Contestant]:
    """What writes gigabytes first, one right after the other: each finds memory that the last one
    has left.
    """
    return sorted(chosen, key=lambda one: not one.makes)


def measure_all(
    chosen: Sequence[Contestant], rounds: int, work: Path, everything: Sequence[Contestant]
) -> None:
    """All of them once a round, but for what is known."""
    for number in range(rounds):
        todo = [one for one in chosen if not answer_file(work, one, number).exists()]
        if todo:
            claim()
        for one in todo:
            measure(one, number, work, everything)


def check_protocol(work: Path, model: Path) -> None:
    """One folder holds the answers of one model and one version of ours."""
    work.mkdir(parents=True, exist_ok=True)
    counts = read_catalog(model).parameters
    file, ours = work / "protocol.json", {"version": __version__, "parameters": counts}
    if not file.exists():
        write_json(file, ours)
    if json.loads(file.read_text()) != ours:
        sys.exit(f"{work}: holds answers of another model or version; choose another DIR")


def parameters(work: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((work / "protocol.json").read_text())["parameters"]
    return found


def measure(one: Contestant, number: int, work: Path, everything: Sequence[Contestant]) -> None:
    """Run it and keep the answer, unless it is one of ours and fails."""
    for path in one.reads:
        provide(path, work, everything)
    warm(one.reads)
    busy = busy_cores(0.3)
    remove_all(everything, work)  # only now, so that all find the memory that it frees
    answer = {**run(one, work), "busy_cores": busy}
    if answer["outcome"] != OK and not one.peer:
        sys.exit(f"{one.name}: {answer['outcome']}")
    file = answer_file(work, one, number)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, answer)
    print(f"round {number + 1}: {one.name}: {report.in_a_line(answer)}", flush=True)


def provide(path: Path, work: Path, everything: Sequence[Contestant]) -> None:
    """Make what an earlier, stopped run or another part of the measurements has not left."""
    makers = [c for c in everything if path in c.makes and c.kept]
    if not makers or (path.exists() and mark(path, work).exists()):
        return
    maker = makers[-1]  # the fastest way is the last
    for needed in maker.reads:
        provide(needed, work, everything)
    print(f"making {path.name}: {maker.name}", flush=True)
    if (outcome := run(maker, work)["outcome"]) != OK:
        sys.exit(f"{maker.name}: {outcome}")


def run(one: Contestant, work: Path) -> dict[str, Any]:
    remove(one, work)
    answer = run_cold(one.command, environment=one.environment, timeout=one.timeout)
    if answer["outcome"] == OK:
        for path in one.makes:
            mark(path, work).touch()
    return answer


def remove_all(everything: Iterable[Contestant], work: Path) -> None:
    """What the last one has made and nobody needs."""
    for one in everything:
        if not one.kept:
            remove(one, work)


def remove(one: Contestant, work: Path) -> None:
    for path in one.makes:
        mark(path, work).unlink(missing_ok=True)
        discard(path)


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def mark(path: Path, work: Path) -> Path:
    """Says that a path is complete, which a killed process leaves open."""
    return work / f".{path.name}.complete"


def answer_file(work: Path, one: Contestant, number: int) -> Path:
    return work / "answers" / one.name / f"{number:02}.json"


def read_answers(work: Path, everything: Sequence[Contestant]) -> dict[str, list[dict[str, Any]]]:
    """By contestant, what has been measured so far."""
    found = {}
    for one in everything:
        files = sorted((work / "answers" / one.name).glob("*.json"))
        if files:
            found[one.name] = [json.loads(file.read_text()) for file in files]
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or what is measured would live on
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
