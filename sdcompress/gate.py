"""Whether results stay within limits: the last question of a release script.

A ratio passes if the upper end of its interval is within the limit: what was measured has to rule
out that the engine is over it. `by_median` asks only that the median is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from sdcompress.errors import UsageError
from sdcompress.recipe import Gates
from sdcompress.results import Check, Measure, Results

LATENCY, MEMORY = "picture", "peak_memory"  # names of measures
# Even the smallest and the largest of fewer figures hold their true median with less than 95 %.
FEWEST_ROUNDS = 6
Twin = Literal["dense", "sparse"]
TWINS: tuple[Twin, Twin] = ("dense", "sparse")


def check_limits(limits: Gates) -> None:
    """Raises UsageError: no limit is set, or one is not a finite number."""
    asked = limits.model_dump(exclude_none=True)
    if not asked:
        raise UsageError(
            "no limits to hold the results against; give --latency, --memory, --size, --psnr or "
            "--sparse-layers, or a recipe with 'gates'"
        )
    for name, limit in asked.items():
        if not math.isfinite(limit):
            raise UsageError(f"{name}: expected a finite limit, found {limit}; correct it")


def gate(results: Results, limits: Gates, *, by_median: bool = False) -> tuple[Check, ...]:
    """One check for each limit that is set; what the results cannot answer has failed.

    Raises:
        UsageError: the limits are none, see `check_limits`.
    """
    check_limits(limits)
    return tuple(_checks(results, limits, by_median))


def _checks(results: Results, limits: Gates, by_median: bool) -> Iterator[Check]:
    if limits.latency is not None:
        yield _latency(results, limits.latency, by_median)
    if limits.memory is not None:
        yield _memory(results, limits.memory, by_median)
    if limits.size is not None:
        dense, sparse = (results.engines[twin].bytes for twin in TWINS)
        yield _plain_ratio("size", "engine files", dense, sparse, limits.size)
    if limits.psnr is not None:
        yield _psnr(results, limits.psnr)
    if limits.sparse_layers is not None:
        yield _sparse_layers(results, limits.sparse_layers)


def _latency(results: Results, limit: float, by_median: bool) -> Check:
    if not results.control.trustworthy:
        differs = ", ".join(name.replace("_", " ") for name in results.control.differs)
        return _failed(
            "latency",
            f"cannot be trusted: the dense engine differed from itself ({differs}); measure again "
            "on a quiet machine",
        )
    if measure := results.measures.get(LATENCY):
        rounds = len(measure.sparse.rounds)
        if rounds < FEWEST_ROUNDS and not by_median:
            return _failed(
                "latency",
                f"{rounds} rounds give no interval to rely on; measure at least {FEWEST_ROUNDS}, "
                "better 10, or let the median pass with --median",
            )
        return _interval("latency", "picture", measure, limit, by_median)
    return _failed(
        "latency", "the results have no time of a whole picture; measure with `sdcompress bench`"
    )


def _memory(results: Results, limit: float, by_median: bool) -> Check:
    """On an accelerator its peak, which has no interval; else the peak of the process."""
    if any(_on_device(results, twin) for twin in TWINS):
        dense, sparse = (_device_peak(results, twin) for twin in TWINS)
        if dense is None or sparse is None:
            return _failed(
                "memory",
                "the peak device memory is unknown: the CUDA runtime could not be asked; measure "
                "again where `sdcompress doctor` finds it",
            )
        if sparse <= 0:
            return _failed(
                "memory",
                "the sparse engine's peak device memory is unknown: it did not rise above the "
                "level before loading; measure again with nothing else on the device",
            )
        return _plain_ratio("memory", "peak device memory", dense, sparse, limit)
    measure = results.measures.get(MEMORY)
    if measure is None:
        return _failed("memory", "the results have no peak memory; measure with `sdcompress bench`")
    if MEMORY in results.control.differs:
        return _failed(
            "memory",
            "cannot be trusted: the dense engine's peak differed from its own; measure again on a "
            "quiet machine",
        )
    return _interval("memory", "peak memory", measure, limit, by_median)


def _on_device(results: Results, twin: Twin) -> bool:
    engine = results.engines[twin]
    return bool(engine.device_memory or engine.device_memory_sequential)


def _device_peak(results: Results, twin: Twin) -> int | None:
    """Bytes, with the components loaded as they were while latency was measured."""
    engine = results.engines[twin]
    in_turn = results.setup.residency == "sequential"
    held = engine.device_memory_sequential if in_turn else engine.device_memory
    return held.peak if held else None


def _psnr(results: Results, limit: float) -> Check:
    found = results.quality.get("psnr")
    if found is None:
        return _failed(
            "psnr",
            "the results have no picture quality; `sdcompress run` with 'pictures' in the recipe "
            "measures it, --quality-from takes it from another results.json",
        )
    passed = found >= limit
    return Check(
        name="psnr",
        passed=passed,
        detail=f"{found:.2f} dB is {'at least' if passed else 'below'} {limit:g}",
    )


def _sparse_layers(results: Results, limit: int) -> Check:
    kernels = results.engines["sparse"].sparse_kernels
    if kernels.used is None:
        return _failed("sparse_layers", f"unknown, {limit} asked ({kernels.how})")
    return Check(
        name="sparse_layers",
        passed=kernels.used >= limit,
        detail=f"{kernels.used} of {kernels.of} use sparse kernels, {limit} asked ({kernels.how})",
    )


def _interval(name: str, what: str, measure: Measure, limit: float, by_median: bool) -> Check:
    ratio = measure.sparse_to_dense
    value = ratio.ratio if by_median else ratio.high
    which = "median" if by_median else "upper end"
    return Check(
        name=name,
        passed=value <= limit,
        detail=f"{what} {ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of the dense "
        f"engine's; the {which} {value:.3f} is {_within(value, limit)} {limit:g}",
    )


def _plain_ratio(name: str, what: str, dense: int, sparse: int, limit: float) -> Check:
    if dense <= 0:
        return _failed(name, f"{what} of the dense engine: {dense} bytes; measure again")
    ratio = sparse / dense
    return Check(
        name=name,
        passed=ratio <= limit,
        detail=f"{what} {ratio:.3f} of the dense engine's is {_within(ratio, limit)} {limit:g}",
    )


def _within(value: float, limit: float) -> str:
    return "within" if value <= limit else "above"


def _failed(name: str, why: str) -> Check:
    return Check(name=name, passed=False, detail=why)
