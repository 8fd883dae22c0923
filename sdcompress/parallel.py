"""Work on many tensors by several threads, with the results in order.

Reading, hashing and the loops of numpy and torch leave the interpreter's lock, so that threads do.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def cores() -> int:
    """How many threads are of use: the processors this process may run on, at most 8."""
    return min(len(os.sched_getaffinity(0)), 8)


def in_order(
    jobs: Iterable[Callable[[], T]],
    threads: int | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """The results of `jobs`, run by several threads, in order; each thread calls `prepare` first.

    No more than `threads` + 2 results are in memory, the one that was given out last included.
    Close it to leave early: what runs is waited for, what waits is not begun.
    """
    threads = threads or cores()
    with ThreadPoolExecutor(threads, initializer=prepare) as pool:
        running: deque[Future[T]] = deque()
        try:
            for job in jobs:
                running.append(pool.submit(job))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
