"""Every criterion on mini-sd2, side by side, and ModelOpt's 2:4 beside them.

    python benchmarks/criteria/measure.py --work DIR [--jobs N]

1. The dense model paints from two sets of seeds: how far they are apart is the floor.
2. Each criterion records what it needs of both components, once for all its points, and ModelOpt
   (after `pip install nvidia-modelopt==0.47.0`) is calibrated on the same activations.
3. Each criterion × pattern × component set is pruned, paints the same prompts from the same seeds,
   and is measured; the most telling points come first.

Writes results.json, results.csv and quality.svg beside this file and prints the tables. A run that
was killed goes on where it was; to measure something anew, remove its file or folder from DIR.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.criteria import modelopt_peer, one_point, record, report
from benchmarks.criteria.points import (
    COMPONENTS,
    PEERS,
    Layers,
    Point,
    all_points,
    dense_model,
    protocol,
    shared_layers,
)
from sdcompress.bundle import write_json
from sdcompress.catalog import read_catalog
from sdcompress.criteria import for_weights

HERE = Path(__file__).parent
SAMPLES = 400
Task = tuple[Callable[..., Any], tuple[Any, ...]]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    known = for_weights()
    parser.add_argument("--work", type=Path, required=True, help="where answers are kept")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--criteria", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="prompts, at least 2")
    parser.add_argument("--out", type=Path, default=HERE, help="where results are written")
    parser.add_argument("--report", action="store_true", help="measure nothing more")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.samples < 2:
        parser.error("expected --jobs of at least 1 and --samples of at least 2")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    work = args.work.resolve()
    check_protocol(work, args.samples)
    failed = {} if args.report else measure(work, args.jobs, args.criteria, args.samples)
    if not (work / one_point.DENSE).exists():
        sys.exit(f"{work}: nothing is measured yet, the dense model comes first: {failed or ''}")
    report.write(work, wanted(work, args.criteria), failed, args.samples, args.out)
    return 1 if failed else 0


def check_protocol(work: Path, samples: int) -> None:
    """One folder holds the answers of one protocol."""
    work.mkdir(parents=True, exist_ok=True)
    file, ours = work / "protocol.json", {"protocol": protocol(samples)}
    if not file.exists():
        write_json(file, ours)
    if json.loads(file.read_text()) != ours:
        sys.exit(f"{work}: holds answers for other prompts, settings or tools; choose another DIR")


def measure(work: Path, jobs: int, criteria: Sequence[str], samples: int) -> dict[str, str]:
    """Everything that `work` has no answer of; returns what could not be measured, and why."""
    failed: dict[str, str] = {}
    with processes(jobs) as pool:
        run(pool, first_tasks(work, criteria, samples), failed)
        ready = [c for c in criteria if one_point.criterion_folder(work, c).exists()]
        shared = shared_layers(our_layers(), peers(work))
        tasks: dict[str, Task] = {
            str(point): (one_point.measure_point, (point, shared, work, samples))
            for point in wanted(work, ready)
            if not one_point.point_file(work, point).exists()
        }
        if not (work / one_point.DENSE).exists():
            tasks = {"dense": (one_point.measure_dense, (work, samples)), **tasks}
        run(pool, tasks, failed)
    return failed


def first_tasks(work: Path, criteria: Sequence[str], samples: int) -> dict[str, Task]:
    """What points need: pictures of the dense model, statistics, and ModelOpt's weights."""
    tasks: dict[str, Task] = {}
    for which, name in enumerate(("dense pictures", "dense pictures, other seeds")):
        tasks[name] = (one_point.paint_dense, (work, samples, which))
    if find_spec("modelopt"):
        for peer, mode in PEERS.items():
            if not (folder := one_point.peer_folder(work, peer)).exists():
                tasks[peer] = (in_its_own_process, (modelopt_peer.__name__, mode, folder))
    else:
        print("modelopt is left out: it is not installed (pip install nvidia-modelopt==0.47.0)")
    for name in criteria:
        if not (folder := one_point.criterion_folder(work, name)).exists():
            tasks[f"statistics of {name}"] = (in_its_own_process, (record.__name__, name, folder))
    return tasks


def in_its_own_process(module: str, *arguments: object) -> None:
    """For a peak of memory that is nobody else's, and for packages that change others."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"{module} ended by {done.returncode}")[-500:])


def our_layers() -> dict[str, list[str]]:
    catalog = read_catalog(dense_model().path)
    return {
        component: [layer.name for layer in catalog.of(component) if layer.why_not is None]
        for component in COMPONENTS["both"]
    }


def peers(work: Path) -> dict[str, Layers]:
    """The layers that each mode of ModelOpt has pruned, as far as there are answers."""
    found: dict[str, Layers] = {}
    for peer in PEERS:
        file = one_point.peer_folder(work, peer) / modelopt_peer.REPORT
        if file.exists():
            parts = json.loads(file.read_text())["components"]
            found[peer] = {component: part["layers"] for component, part in parts.items()}
    return found


def wanted(work: Path, criteria: Sequence[str]) -> list[Point]:
    return all_points(criteria, our_layers(), peers(work))


def run(pool: Executor, tasks: Mapping[str, Task], failed: dict[str, str]) -> None:
    """All tasks, with a line each; one that fails does not end the others."""
    start = time.monotonic()
    futures = {pool.submit(task, *given): name for name, (task, given) in tasks.items()}
    for done, future in enumerate(as_completed(futures), 1):
        name, text = futures[future], ""
        if isinstance(future.exception(), BrokenProcessPool):
            sys.exit("a process was killed, perhaps for its memory; repeat with fewer --jobs")
        if error := future.exception():
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())
            text = f": FAILED, {failed[name]}"
        elif answer := future.result():
            text = f": {report.in_a_line(answer)}"
        left = (time.monotonic() - start) / done * (len(tasks) - done) / 60
        print(f"[{done}/{len(tasks)}] {name}{text}; {left:.0f} min left", flush=True)


@contextmanager
def processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, however it ends."""
    os.environ["OMP_NUM_THREADS"] = "1"  # theirs, and that of what they start
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_follow
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown()


def _follow() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
