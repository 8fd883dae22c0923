"""Work on many tensors or files by several threads, with the results in order.

Reading, hashing and the loops of numpy and torch leave the interpreter's lock, so that threads do.
Whoever is interrupted has to wait for the jobs that run: long ones ask `leaving` now and then.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
MOST = 8  # threads: each holds a tensor, and more of them than this wait for the memory
_SHORT = 2e-4  # seconds
_here = threading.local()  # `leaving`: of the thread's own jobs
_limit = MOST


def limit(threads: int) -> None:
    """Have this process use no more than so many threads, because others work beside it."""
    global _limit  # a fact about the process
    _limit = max(1, min(threads, MOST))


def cores() -> int:
    """How many threads are of use: the processors this process may run on, up to its limit."""
    return min(len(os.sched_getaffinity(0)), _limit)


def leaving() -> bool:
    """Whether whoever asked for the job at hand has given up waiting for it."""
    asked: Callable[[], bool] = getattr(_here, "leaving", bool)
    return asked()


def in_order(
    jobs: Iterable[Callable[[], T] | None],
    threads: int | None = None,
    prepare: Callable[[], None] = lambda: None,
    ahead: int = 1,
) -> Generator[T, None, None]:
    """The results of `jobs`, run by several threads, in order; each thread calls `prepare` first.

    `ahead` jobs more than there are threads may be done or waiting: one for large tensors, more for
    jobs so short that threads would wait for whoever takes the results. No more than `threads` +
    `ahead` + 1 results are in memory, the one that was given out last included. Close it to leave
    early: what runs is told and waited for, what waits is not begun.

    `jobs` may give None where there can be no other job before one more result was given out.
    """
    threads = threads or cores()
    with _pool(threads, prepare) as pool:
        running: deque[Future[T]] = deque()
        try:
            for job in jobs:
                if job is not None:
                    running.append(pool.submit(job))
                if job is None or len(running) >= threads + ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


@contextmanager
def beside(job: Callable[[], T]) -> Iterator[Future[T]]:
    """One job in a thread of its own, while the block does something else.

    A block of pure Python, such as a large import, gives the interpreter's lock away every 5 ms at
    most, and a job that needs it for a moment after every MB would be four times as slow.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SHORT)
    with _pool(1, lambda: None) as pool:
        done = pool.submit(job)
        done.add_done_callback(lambda _: sys.setswitchinterval(interval))
        yield done


@contextmanager
def _pool(threads: int, prepare: Callable[[], None]) -> Iterator[ThreadPoolExecutor]:
    """Threads whose jobs are `leaving` when the block fails, or when the job it is part of is."""
    over, outer = threading.Event(), getattr(_here, "leaving", bool)

    def enter() -> None:
        _here.leaving = lambda: over.is_set() or outer()
        prepare()

    with ThreadPoolExecutor(threads, initializer=enter) as pool:
        try:
            yield pool
        except BaseException:  # an interruption, too, and a generator that is closed
            over.set()
            raise
