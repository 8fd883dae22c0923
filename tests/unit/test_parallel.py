"""Jobs by several threads: in order, a few at a time, and over when one fails or nobody listens."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from functools import partial

import pytest

from sdcompress.parallel import in_order


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
