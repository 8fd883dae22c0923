"""Jobs by several threads: in order, a few at a time, and over when one fails or nobody listens."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import pytest

from sdcompress import parallel
from sdcompress.parallel import beside, in_order, leaving


def test_results_are_in_order_whoever_is_faster() -> None:
    def job(i: int) -> int:
        time.sleep(0.02 if i % 3 == 0 else 0)
        return i

    assert list(in_order((partial(job, i) for i in range(20)), threads=4)) == list(range(20))


def test_few_are_begun_before_they_are_asked_for() -> None:
    begun: list[int] = []
    results = in_order((partial(begun.append, i) for i in range(100)), threads=2)
    with closing(results):
        next(results)
        time.sleep(0.05)
        assert len(begun) <= 3  # the one given out, and one for each thread


def test_short_jobs_may_run_further_ahead() -> None:
    begun: list[int] = []
    results = in_order((partial(begun.append, i) for i in range(100)), threads=2, ahead=10)
    with closing(results):
        next(results)
        time.sleep(0.05)
        assert len(begun) == 12


def test_where_there_is_no_job_a_result_is_given_first() -> None:
    given: list[int] = []
    ready: list[int | None] = [0, 1, None, 2, None, None, 3]

    def jobs() -> Iterator[partial[int] | None]:
        for i in ready:
            yield None if i is None else partial(int, i)
            if i is None:
                asked.append(list(given))

    asked: list[list[int]] = []
    for result in in_order(jobs(), threads=2, ahead=100):
        given.append(result)
    assert given == [0, 1, 2, 3]
    assert asked == [[0], [0, 1], [0, 1, 2]]


def test_a_failure_is_raised_where_its_result_would_be() -> None:
    def job(i: int) -> int:
        if i == 2:
            raise ValueError("the third")
        return i

    results = in_order((partial(job, i) for i in range(9)), threads=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(results)


def test_every_thread_is_prepared_once() -> None:
    prepared: list[int] = []

    def prepare() -> None:
        prepared.append(threading.get_ident())

    def job() -> int:
        time.sleep(0.01)
        return threading.get_ident()

    used = set(in_order([job] * 8, threads=2, prepare=prepare))
    assert used == set(prepared)
    assert len(prepared) == 2


@pytest.fixture
def _limit() -> Iterator[None]:
    yield
    parallel.limit(parallel.MOST)


@pytest.mark.usefixtures("_limit")
def test_a_process_may_be_told_to_use_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert parallel.cores() == 8
    parallel.limit(3)
    assert parallel.cores() == 3
    parallel.limit(0)
    assert parallel.cores() == 1


def long_job(begun: threading.Event) -> str:
    begun.set()
    for _ in range(2000):
        time.sleep(0.01)
        if leaving():
            return "left"
    return "done"


def test_a_long_job_hears_that_nobody_waits_for_it() -> None:
    """Also one that a job of somebody else's has asked for."""
    begun = threading.Event()
    results: list[str] = []

    def job() -> None:
        results.extend(in_order([partial(long_job, begun)]))

    with pytest.raises(KeyboardInterrupt), beside(job):
        begun.wait(10)
        raise KeyboardInterrupt
    assert results == ["left"]
    assert not leaving()


def test_a_job_beside_gives_its_result_or_its_error() -> None:
    with beside(lambda: 7) as done:
        assert done.result() == 7
    with pytest.raises(ZeroDivisionError), beside(lambda: 1 // 0) as failed:
        failed.result()
