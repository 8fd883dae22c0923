"""Percentiles, intervals and verdicts on literal figures; worker processes that misbehave."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sdcompress.errors import SdcompressError
from sdcompress.measure import (
    QUIET,
    anonymous_bytes,
    compare,
    family_confidence,
    median_of,
    percentile,
    run_rounds,
    run_worker,
    turns,
)

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system has no /proc"
)
NOISE = (1.0, 1.02, 0.98, 1.01, 0.99, 1.03, 0.97, 1.0, 1.01, 0.99)
OTHER_NOISE = (0.99, 1.01, 1.0, 0.98, 1.02, 0.99, 1.0, 1.03, 0.97, 1.01)


@pytest.mark.parametrize(
    ("samples", "q", "expected"),
    [
        ([5.0], 99, 5.0),
        ([1.0, 2.0, 3.0, 4.0], 50, 2.5),
        ([4.0, 1.0, 3.0, 2.0], 0, 1.0),
        ([4.0, 1.0, 3.0, 2.0], 100, 4.0),
        (list(range(101)), 95, 95.0),
        ([0.0, 10.0], 99, 9.9),
    ],
)
def test_percentile(samples: list[float], q: float, expected: float) -> None:
    assert percentile(samples, q) == pytest.approx(expected)


@pytest.mark.parametrize(("samples", "q"), [([], 50), ([1.0], 101), ([1.0], -1)])
def test_percentile_refuses(samples: list[float], q: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(samples, q)


def test_the_same_figures_are_no_difference() -> None:
    result = compare(NOISE, NOISE)
    assert (result.ratio, result.low, result.high) == (1.0, 1.0, 1.0)
    assert result.verdict == "no difference"


def test_an_interval_that_contains_one_is_no_difference() -> None:
    result = compare(NOISE, OTHER_NOISE)
    assert result.low <= 1 <= result.high
    assert result.verdict == "no difference"


@pytest.mark.parametrize(("factor", "verdict"), [(0.8, "lower"), (2.0, "higher")])
def test_a_real_difference_is_found(factor: float, verdict: str) -> None:
    result = compare(NOISE, [factor * x for x in OTHER_NOISE])
    assert result.ratio == pytest.approx(factor, rel=0.02)
    assert result.low < factor < result.high
    assert result.verdict == verdict


def test_a_difference_within_what_the_control_shows_is_none() -> None:
    slower = [1.04 * x for x in NOISE]
    noisy_control = compare(NOISE, [x * (1.1 if i % 2 else 0.95) for i, x in enumerate(NOISE)])
    assert compare(NOISE, slower).verdict == "higher"
    assert noisy_control.low < 1.04 < noisy_control.high
    assert compare(NOISE, slower, control=noisy_control).verdict == "no difference"


def test_rounds_stay_together_so_that_drift_cancels() -> None:
    drift = [2.0**i for i in range(10)]
    result = compare(drift, [1.1 * x for x in drift])
    assert (result.low, result.high) == (pytest.approx(1.1), pytest.approx(1.1))


def test_more_confidence_is_a_wider_interval() -> None:
    narrow, wide = (compare(NOISE, OTHER_NOISE, confidence=c) for c in (0.8, 0.99))
    assert wide.low <= narrow.low <= narrow.high <= wide.high


def test_the_same_seed_gives_the_same_interval() -> None:
    assert compare(NOISE, OTHER_NOISE, seed=3) == compare(NOISE, OTHER_NOISE, seed=3)


def test_intervals_rarely_miss_between_equals() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    missed = sum(
        compare(*rng.lognormal(0, 0.05, (2, 10)).tolist()).verdict != "no difference"
        for _ in range(100)
    )
    assert missed <= 10


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([0.0, 1.0], [1.0, 1.0]), ([1.0], [-1.0])]
)
def test_compare_refuses(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"rounds|greater than zero"):
        compare(a, b)


def test_family_confidence() -> None:
    assert family_confidence(1) == pytest.approx(0.95)
    assert family_confidence(5) == pytest.approx(0.99)


def test_turns_are_shuffled_and_complete() -> None:
    orders = turns(["a", "b", "c"], 50, seed=1)
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert {order[0] for order in orders} == {"a", "b", "c"}
    assert orders == turns(["a", "b", "c"], 50, seed=1)
    assert orders != turns(["a", "b", "c"], 50, seed=2)


def test_median_of_takes_lists_and_numbers() -> None:
    answers = [{"x": [3.0, 1.0, 2.0], "y": 7}, {"x": [10.0], "y": 8}]
    assert median_of(answers, "x") == [2.0, 10.0]
    assert median_of(answers, "y") == [7.0, 8.0]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A worker module that executes the Python its job brings, and answers with `answer`."""
    (tmp_path / "acting_worker.py").write_text(
        "import json, sys\n"
        "job = json.load(open(sys.argv[1]))\n"
        "space = {}\n"
        "exec(job['code'], space)\n"
        "if 'answer' in space:\n"
        "    json.dump(space['answer'], open(sys.argv[2], 'w'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "acting_worker"


def test_a_worker_answers(worker: str) -> None:
    answer = run_worker(worker, {"code": "answer = {'x': [1.0]}"})
    assert answer["x"] == [1.0]
    assert answer["process_seconds"] > 0


class Watching:
    """Notes what it is told, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._pid: int | None = None

    @property
    def pid(self) -> int | None:
        return self._pid

    @pid.setter
    def pid(self, value: int | None) -> None:
        self._pid = value
        self.log.append("pid")

    def __enter__(self) -> Watching:
        self.log.append("enter")
        return self

    def __exit__(self, *exc: object) -> None:
        self.log.append("exit")

    def start_timing(self) -> None:
        self.log.append("timing")

    def summary(self) -> dict[str, float | None]:
        return {"power_w": 70.0}


def test_a_device_is_watched_beside_the_worker(worker: str) -> None:
    watching = Watching()
    code = f"import os; print({QUIET!r}, flush=True); answer = {{'pid': os.getpid()}}"
    answer = run_worker(worker, {"code": code}, watch=lambda: watching)
    assert answer["telemetry"] == {"power_w": 70.0}
    assert answer["pid"] == watching.pid
    assert watching.log == ["enter", "pid", "timing", "exit"]
    assert "telemetry" not in run_worker(worker, {"code": code})


def test_a_worker_is_deaf_to_modules_that_lie_around(
    worker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("random", "runpy", "export", "sdcompress"):
        (here / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    monkeypatch.chdir(here)
    code = "import random, export.bench_worker, sdcompress; answer = {'file': random.__file__}"
    assert not run_worker(worker, {"code": code})["file"].startswith(str(here))


@needs_proc
def test_memory_counts_what_is_allocated_and_not_what_is_mapped(
    worker: str, tmp_path: Path
) -> None:
    big = 64_000_000
    file = tmp_path / "mapped"
    file.write_bytes(b"x" * big)
    allocate = f"held = bytearray(b'x') * {big}"
    map_it = (
        "import mmap\n"
        f"file = open({str(file)!r}, 'rb')\n"
        "held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "read = sum(held[::4096])"
    )
    wait = f"\nimport time; time.sleep(0.3); print({QUIET!r}, flush=True); answer = {{}}"
    allocated, mapped = (
        run_worker(worker, {"code": code + wait})["peak_anonymous_bytes"]
        for code in (allocate, map_it)
    )
    assert allocated > big
    assert mapped < big


@needs_proc
def test_memory_includes_children(worker: str) -> None:
    code = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', "
        "'import time; held = bytearray(b\"x\") * 64_000_000; time.sleep(0.3)'], check=True)\n"
        "answer = {}"
    )
    assert run_worker(worker, {"code": code})["peak_anonymous_bytes"] > 64_000_000


def test_memory_of_a_process_that_is_gone_is_zero() -> None:
    assert anonymous_bytes(2**30) == 0


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise ValueError('broken engine')", "exit code 1: ValueError: broken engine"),
        ("import sys; sys.exit('no such file')", "exit code 1: no such file"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL; the machine may be"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("pass", "exit code 0: it wrote no message"),
    ],
)
def test_a_worker_that_fails_is_one_clear_line(worker: str, code: str, expected: str) -> None:
    with pytest.raises(SdcompressError) as caught:
        run_worker(worker, {"code": code, "name": "sparse"})
    message = str(caught.value)
    assert message.startswith("sparse: the measuring process")
    assert expected in message
    assert "\n" not in message


def test_a_worker_that_hangs_is_stopped(worker: str) -> None:
    code = "import time; time.sleep(600)"
    with pytest.raises(SdcompressError, match=r"took more than 0\.5 s and was stopped"):
        run_worker(worker, {"code": code}, timeout=0.5)


def test_rounds_find_a_worker_of_half_the_speed(worker: str) -> None:
    code = "import random; answer = {{'ms': [{} * random.uniform(0.95, 1.05) for _ in range(5)]}}"
    jobs = {"dense": {"code": code.format(10)}, "sparse": {"code": code.format(20)}}
    seen: list[tuple[int, int]] = []
    answers = run_rounds(worker, jobs, rounds=4, progress=lambda *step: seen.append(step))
    places = [answer["process"] for some in answers.values() for answer in some]
    assert sorted(places) == list(range(len(jobs) * 4))
    assert seen == [(i, 8) for i in range(1, 9)]
    result = compare(median_of(answers["dense"], "ms"), median_of(answers["sparse"], "ms"))
    assert result.verdict == "higher"
    assert result.ratio == pytest.approx(2, rel=0.1)


def test_measuring_needs_no_onnx_and_no_torch() -> None:
    import subprocess

    code = (
        "import sys, sdcompress.measure, sdcompress.results;"
        "print({'torch', 'onnx', 'onnxruntime', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_interval_always_holds_its_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numpy.quantile", lambda *_: (2.0, 3.0))
    found = compare([1.0, 1.0], [1.5, 1.5])
    assert (found.low, found.ratio, found.high, found.verdict) == (1.5, 1.5, 3.0, "higher")
