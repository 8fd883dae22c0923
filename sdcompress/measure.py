"""Measuring fairly: fresh processes in random turn, intervals over processes, memory of the tree.

A latency depends on things no iteration inside one process can average away: where memory landed,
which core it runs on, what the machine did that minute. So the unit of evidence here is the
process. Each round starts every contestant once, in random order; each process hands back one
figure (the median of its iterations), and intervals are bootstrapped over rounds.

One contestant runs against itself as a control. A difference is only claimed where it is larger
than what the control shows for two runs of the same thing.
"""

from __future__ import annotations

import json
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdcompress.errors import SdcompressError

CONFIDENCE = 0.95
RESAMPLES = 10_000
SAMPLE_EVERY_S = 0.01
ROUNDING = 1e-9  # relative; of figures that were written and read again

Verdict = Literal["no difference", "lower", "higher"]


class Comparison(BaseModel):
    """Ratio of medians over rounds, `measured / reference`, with its bootstrap interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float = Field(gt=0, allow_inf_nan=False)
    low: float = Field(gt=0, allow_inf_nan=False)
    high: float = Field(gt=0, allow_inf_nan=False)
    confidence: float = Field(gt=0, lt=1)
    verdict: Verdict

    @model_validator(mode="after")
    def _possible(self) -> Comparison:
        if not self.low * (1 - ROUNDING) <= self.ratio <= self.high * (1 + ROUNDING):
            raise ValueError(
                f"the ratio {self.ratio:g} lies outside its interval {self.low:g} to {self.high:g}"
            )
        if self.verdict != "no difference" and self.low <= 1 <= self.high:
            raise ValueError(
                f"the verdict is {self.verdict!r}, and 1 lies inside the interval {self.low:g} to "
                f"{self.high:g}"
            )
        return self

    @property
    def within_control(self) -> bool:
        """Whether only the control makes it no difference: its interval does not contain 1."""
        return self.verdict == "no difference" and not self.low <= 1 <= self.high


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), linear between the two nearest order statistics."""
    if not samples:
        raise ValueError("percentile of no samples")
    if not 0 <= q <= 100:
        raise ValueError(f"percentile {q} is outside 0..100")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    below = math.floor(place)
    above = math.ceil(place)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def compare(
    reference: Sequence[float],
    measured: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    control: Comparison | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare two series of one figure a round; element i of both comes from round i.

    Percentile bootstrap of `median(measured) / median(reference)`: rounds are drawn with
    replacement and the two figures of a round stay together, which removes slow drift.

    The verdict is "no difference" when the interval contains 1, and also when the ratio lies inside
    the interval of `control`, the same comparison made between two runs of the same thing.
    """
    if len(reference) != len(measured) or not reference:
        raise ValueError(f"{len(reference)} and {len(measured)} rounds cannot be compared in pairs")
    if min(*reference, *measured) <= 0:
        raise ValueError("ratios need figures greater than zero")
    import numpy as np  # late: whoever only reads results needs none of it

    a, b = np.asarray(reference, float), np.asarray(measured, float)
    draws = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    tail = (1 - confidence) / 2
    with np.errstate(all="ignore"):  # no Comparison is made of what overflows
        ratios = np.median(b[draws], axis=1) / np.median(a[draws], axis=1)
        low, high = (float(x) for x in np.quantile(ratios, [tail, 1 - tail]))
        ratio = float(np.median(b) / np.median(a))
    low, high = min(low, ratio), max(high, ratio)  # resampling may miss what was really seen
    verdict: Verdict = "no difference"
    if not low <= 1 <= high and not (control and control.low <= ratio <= control.high):
        verdict = "lower" if ratio < 1 else "higher"
    return Comparison(ratio=ratio, low=low, high=high, confidence=confidence, verdict=verdict)


def family_confidence(comparisons: int, confidence: float = CONFIDENCE) -> float:
    """The confidence each of several intervals needs so that all hold together (Bonferroni)."""
    return 1 - (1 - confidence) / comparisons


def turns(contestants: Sequence[str], rounds: int, seed: int = 0) -> list[list[str]]:
    """Who runs when: every contestant once a round, in an order shuffled anew for each round."""
    shuffler = random.Random(seed)
    return [shuffler.sample(list(contestants), len(contestants)) for _ in range(rounds)]


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process and all its children now, in bytes. Mapped files do not count.

    A process that has just ended counts as zero.
    """
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            # Its counter; `smaps_rollup` has the same by a walk over all pages, while which the
            # process waits for every new one: pruning a large model took a fifth longer for it.
            for line in Path(f"/proc/{one}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) * 1024
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, ValueError):
            continue
    return total


class PeakMemory:
    """Samples a process tree's anonymous memory `every` so many seconds and keeps the peak.

    `peak` is in bytes, and 0 where the system has no /proc.
    """

    def __init__(self, pid: int, every: float = SAMPLE_EVERY_S) -> None:
        self.peak = 0
        self._every = every
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop sampling; takes one last sample, so that a short life is seen at least once."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        while True:
            stopping = self._stop.is_set()
            self.peak = max(self.peak, anonymous_bytes(self._pid))
            if stopping:
                return
            self._stop.wait(self._every)


QUIET = "memory settled"


class Watch(Protocol):
    """Reads a device beside one process, in ours, while a `with` block lasts."""

    pid: int | None

    def start_timing(self) -> None:
        """Loading is over: clocks, temperature and power count from here on."""

    def summary(self) -> dict[str, float | None]:
        """What was read, in one figure each; None where the device does not tell."""


Watcher = Callable[[], AbstractContextManager[Watch]]

# `python -m` would look for modules first where the user stands, and find their random.py. Our own
# folder comes last: it is needed only where the packages are run without being installed.
_START = """\
import sys
sys.path[:] = [*filter(None, sys.path), sys.argv[1]]
import runpy
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run_worker(
    module: str,
    job: Mapping[str, Any],
    *,
    timeout: float | None = None,
    watch: Watcher | None = None,
) -> dict[str, Any]:
    """Run a module with JOB.json and RESULT.json in a fresh process; return what it wrote.

    Adds `peak_anonymous_bytes` and `process_seconds` to the worker's own answer, and `telemetry`
    where `watch` is given. Memory is sampled until the worker prints the line `QUIET` (from then on
    it only repeats what it has done), so that the sampling does not disturb what it times
    afterwards.

    Raises:
        SdcompressError: the worker failed, was killed, or took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="sdcompress-") as scratch:
        job_path, result_path = Path(scratch, "job.json"), Path(scratch, "result.json")
        errors_path = Path(scratch, "stderr.txt")
        job_path.write_text(json.dumps(job))
        home = str(Path(__file__).parents[1])
        command = [sys.executable, "-c", _START, home, module, str(job_path), str(result_path)]
        started = time.perf_counter()
        with (
            errors_path.open("wb") as errors,
            watch() if watch else nullcontext() as watching,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            if watching:
                watching.pid = process.pid
            expire = threading.Timer(timeout, process.kill) if timeout else None
            if expire:
                expire.start()
            try:
                with PeakMemory(process.pid) as memory:
                    assert process.stdout is not None
                    for line in process.stdout:
                        if line.strip() == QUIET:
                            memory.stop()
                            if watching:
                                watching.start_timing()
                code = process.wait()
            except BaseException:
                process.kill()
                raise
            finally:
                if expire:
                    expire.cancel()
        seconds = time.perf_counter() - started
        if code != 0 or not result_path.exists():
            late = timeout is not None and seconds >= timeout
            raise SdcompressError(
                f"{job.get('name', module)}: {_why(code, timeout if late else None, errors_path)}"
            )
        result: dict[str, Any] = json.loads(result_path.read_text())
    if watching:
        result["telemetry"] = watching.summary()
    return {**result, "peak_anonymous_bytes": memory.peak, "process_seconds": seconds}


def run_rounds(
    module: str,
    jobs: Mapping[str, Mapping[str, Any]],
    *,
    rounds: int,
    seed: int = 0,
    timeout: float | None = None,
    watch: Watcher | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run every job once a round, in random turn; return the answers of each, in round order.

    Each answer gets its `process`, the place in the order of all. `progress(done, total)` is called
    after each process.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    done = 0
    for order in turns(list(jobs), rounds, seed):
        for name in order:
            answer = run_worker(module, jobs[name], timeout=timeout, watch=watch)
            answers[name].append({**answer, "process": done})
            done += 1
            if progress:
                progress(done, rounds * len(jobs))
    return answers


def median_of(answers: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """One figure a round: the value of `key`, or the median where the worker gave a list."""
    values = [answer[key] for answer in answers]
    return [float(statistics.median(v) if isinstance(v, list) else v) for v in values]


def _why(code: int, timeout: float | None, errors: Path) -> str:
    if timeout is not None:
        return f"the measuring process took more than {timeout:g} s and was stopped"
    lines = [line.strip() for line in errors.read_text(errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "it wrote no message")
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
        return f"the measuring process was killed by {name}{hint} ({last})"
    return f"the measuring process failed with exit code {code}: {last}"
