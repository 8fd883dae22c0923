"""Points one after the other, or several at a time in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from sdcompress.bundle import Bundle
from sdcompress.evaluation.quality import QualitySettings
from sdcompress.parallel import limit
from sdcompress.recipe import Recipe
from sdcompress.sweep.points import PointResult, Progress, failed_point, try_point


def run_here(
    recipes: Sequence[Recipe],
    dense: Bundle,
    settings: QualitySettings,
    work: Path,
    *,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Iterator[PointResult]:
    """The answers, as they come in; `progress` counts the pictures of a point where `jobs` is 1.

    Where the system kills a process, mostly for its memory, its point is tried again with half as
    many at a time, and fails if that happens while it is alone.
    """
    if jobs == 1:
        for recipe in recipes:
            yield try_point(dense, recipe, settings, work, progress=progress)
        return
    left = list(recipes)
    while left:
        broken = False
        with _processes(jobs) as pool:
            futures = {
                pool.submit(try_point, dense, recipe, settings, work): recipe for recipe in left
            }
            for future in as_completed(futures):
                try:
                    result = future.result()
                except BrokenProcessPool:
                    broken = True
                    continue
                left.remove(futures[future])
                yield result
        if broken and jobs == 1:
            reason = "its process was killed; the machine may be out of memory"
            yield failed_point(dense, left.pop(0), settings, reason)
        jobs = max(1, jobs // 2)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def _processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end when the block is left by an exception, whatever they do."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(max(1, cores() // jobs),),
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown()


def _start(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

    import torch

    torch.set_num_threads(threads)
    limit(threads)
