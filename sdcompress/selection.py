"""The lowest of many scores, exactly: on all cores, without sorting, a slice at a time.

Scores are compared as integers that sort as they do. This is for a CPU; `patterns` has the same by
a stable sort, for devices, and a test holds both equal.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdcompress.bits import Array, bits, is_zero, tensors_in_order, type_name

if TYPE_CHECKING:
    from torch import Tensor

Scored = Iterable["Tensor | Array"]  # the scores of one weight, in slices
Scores = Callable[[], Scored]  # anew at every call
Sample = tuple[int, Scores]  # how many scores a weight has, and some of them, from all over it
Keys = NDArray[Any]
Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]
_BINS, _HALF = 1 << 16, 1 << 15
_LOWEST = -(1 << 31)
_EVERY = 61  # a prime, so that a sample is not of a few of a weight's columns only
_MARGIN = 0.01  # of all scores: how far the rank of a cut may be from what samples say
_AHEAD = 16  # tables of counts, which are small, so that no thread waits for a large weight's


@dataclass(frozen=True)
class Cut:
    """What goes of one weight: the scores below a boundary, and the first `ties` that equal it.

    `boundary` is a key of fp32, as `find_cuts` has it.
    """

    boundary: int
    ties: int

    def keep(self, scores: Scored) -> Iterator[Mask]:
        """The masks of what stays of each slice, flat; slices in the weight's own order."""
        ties = self.ties
        for part in scores:
            keys = _keys(part)
            lowest, exact = _lowest_kept(self.boundary, type_name(part))
            keep = keys >= lowest
            if ties and exact:
                gone = np.flatnonzero(keys == lowest)[:ties]
                keep[gone] = False
                ties -= len(gone)
            yield keep


def find_cuts(
    scores: Sequence[Scores], zeros: int, samples: Sequence[Sample] | None = None
) -> list[Cut]:
    """Where to cut each of several weights so that `zeros` go in all, those of the lowest scores.

    Among equal scores the earlier one goes first, in the order of `scores` and of their elements.
    Each weight is walked over once or twice, seldom more, a slice for each thread at a time: faster
    with `samples` of them, from which the cut may be guessed.
    """
    if zeros == 0:
        return [Cut(_LOWEST, 0)] * len(scores)
    if len(scores) == 1 and (cut := _cut_near_sampled(scores[0], zeros)):
        return [cut]
    return _cuts_by_digits(scores, zeros, _guess(samples, zeros) if samples else None)


def _cut_near_sampled(scores: Scores, zeros: int) -> Cut | None:
    """The cut of one weight: a sample says about where it is, and only the scores around are
    collected, all others compared, which takes half as long as to count every digit.

    Around are four standard deviations of the rank in a sample. None if the cut is not there.
    """
    samples, total, dtype = [], 0, ""
    for part in scores():
        keys, dtype = _keys(part), type_name(part)
        samples.append(keys[::_EVERY].copy())
        total += len(keys)
    sample = np.sort(np.concatenate(samples))
    place, margin = zeros * len(sample) // total, 2 * math.isqrt(len(sample)) + 1
    lowest = sample[max(0, place - margin)]
    highest = sample[min(place + margin, len(sample) - 1)]
    below, around = 0, []
    for part in scores():
        keys = _keys(part)
        under, up_to = keys < lowest, keys <= highest
        below += int(np.count_nonzero(under))
        around.append(keys[np.flatnonzero(under ^ up_to)])  # faster than by the mask: they are few
    near, rank = np.concatenate(around), zeros - below
    if not 0 < rank <= len(near):
        return None
    near.partition(rank - 1)
    key = int(near[rank - 1])
    boundary = int(_as_wide(dtype)[key + _HALF]) if _narrow(dtype) else key
    return Cut(boundary, rank - int(np.count_nonzero(near < key)))


def _cuts_by_digits(scores: Sequence[Scores], zeros: int, guess: range | None) -> list[Cut]:
    """`find_cuts` by a radix selection in digits of 16 bits: each weight is walked over once, and a
    second time if its scores have more than 16 bits. In memory is how often each digit occurs in
    each of them, at first of those in `guess` alone: to compare the others takes less time.
    """
    tables = _counted(scores, None, guess)
    below = sum(table.below for table in tables)
    if not 0 < zeros - below <= sum(int(table.counts.sum()) for table in tables):
        tables, below = _counted(scores, None), 0
    high, under = _digit(tables, None, zeros - below)
    below += under
    if any(not _narrow(table.dtype) for table in tables):
        tables = _counted(scores, high)
    low, before = _digit(tables, high, zeros - below)
    boundary, ties = high << 16 | low + _HALF, zeros - below - before
    cuts = []
    for table in tables:
        lowest, exact = _lowest_kept(boundary, table.dtype)
        equal = table.of(lowest if _narrow(table.dtype) else low) if exact else 0
        # Where all that equal it go, they need not be looked for.
        cuts.append(Cut(boundary + 1, 0) if equal <= ties else Cut(boundary, ties))
        ties -= min(equal, ties)
    return cuts


def keep_n_of_m(scores: Tensor | Array, n: int, m: int) -> Mask:
    """The mask, flat, of the `n` highest of every `m` along axis 1; of equal ones the later stay.

    A score's rank is how many of its group lie below it. The members of a group are one kernel
    apart in memory, so that all groups are compared at once by shifting the whole slice.
    """
    keys = _keys(scores)
    step = math.prod(scores.shape[2:])
    rank = np.zeros(len(keys), np.uint8)
    for gap in range(step, m * step, step):
        later = _later((len(keys) - 1).bit_length(), m * step, gap)[: len(keys) - gap]
        above = keys[gap:] >= keys[:-gap]
        rank[gap:] += later & above
        rank[:-gap] += later > above
    mask: Mask = rank >= m - n
    return mask


@lru_cache(maxsize=64)  # slices of most weights are about as long: few lengths in powers of two
def _later(length_bits: int, group: int, gap: int) -> Mask:
    """Of 2^`length_bits` numbers, from `gap` on: is the one `gap` before it of the same group?"""
    mask: Mask = np.arange(gap, 1 << length_bits) % group >= gap
    return mask


def groups_above(weight: Tensor | Array, n: int, m: int) -> int:
    """How many groups of `m` along axis 1 hold more than `n` weights that are not zero."""
    nonzero = ~is_zero(weight)
    step = math.prod(weight.shape[2:])
    count = nonzero.astype(np.uint8)
    for gap in range(step, m * step, step):
        count[:-gap] += nonzero[gap:]
    return int(np.count_nonzero(count.reshape(-1, m, step)[:, 0] > n))


# Keys: integers that sort as scores do.


def _keys(scores: Tensor | Array) -> Keys:
    """Flat: of 16-bit floats int16, of all others int32, by way of fp32. -0.0 counts as +0.0."""
    if not _narrow(type_name(scores)):
        scores = (
            scores.astype(np.float32, copy=False)
            if isinstance(scores, np.ndarray)
            else scores.float()
        )
    numbers = bits(scores)
    if numbers.min(initial=0) >= 0:
        return numbers
    numbers = numbers.copy()  # they are the scores' own bits
    top = 8 * numbers.itemsize - 1
    # The bits of a positive float grow with it; those of a negative one must be turned around.
    numbers ^= numbers >> top & (1 << top) - 1
    numbers += numbers == -1
    return numbers


def _narrow(dtype: str) -> bool:
    return dtype in ("float16", "bfloat16")


@lru_cache(maxsize=2)
def _as_wide(dtype: str) -> Keys:
    """The key in fp32 of every key of a 16-bit type, lowest first."""
    keys = np.arange(-_HALF, _HALF, dtype=np.int32)
    raw = (keys ^ (keys >> 15 & 0x7FFF)).astype(np.int16)
    if dtype == "float16":
        with np.errstate(invalid="ignore"):  # NaN, which no score is
            wide = _keys(raw.view(np.float16).astype(np.float32))
    else:  # the upper half of fp32
        wide = _keys((raw.astype(np.int32) << 16).view(np.float32))
    wide[_HALF - 1] = -1  # that of -0.0, which no score has; it must not pass for that of +0.0
    return wide


@lru_cache(maxsize=64)
def _lowest_kept(boundary: int, dtype: str) -> tuple[int, bool]:
    """The lowest key of this type that is not below the boundary, and whether it equals it."""
    if not _narrow(dtype):
        return boundary, True
    known = _as_wide(dtype)
    index = int(np.searchsorted(known, boundary))
    return index - _HALF, index < _BINS and int(known[index]) == boundary


# Counting them.


def _guess(samples: Sequence[Sample], zeros: int) -> range | None:
    """Of which digits, as `_digits` has them, the `zeros`-th lowest score is likely to be one.

    None if they do not compare, being of several types.
    """
    tables = _counted([scores for _, scores in samples], None)
    if len({table.dtype for table in tables}) > 1:
        return None
    total = np.zeros(_BINS)
    for (numel, _), table in zip(samples, tables, strict=True):
        first, each = table.first + _HALF, numel / max(1, table.counts.sum())
        total[first : first + len(table.counts)] += table.counts * each
    ends = total.cumsum()
    margin = _MARGIN * ends[-1]
    first, last = np.searchsorted(ends, [zeros - margin, zeros + margin]) - _HALF
    return range(int(first), int(last) + 1)


@dataclass(frozen=True)
class _Table:
    """How often each digit occurs among the scores of one weight: `counts` from `first` on.

    Of those `below` it was not counted which they are, nor how many there are above.
    """

    dtype: str
    below: int
    first: int
    counts: NDArray[np.int32]

    def of(self, digit: int) -> int:
        place = digit - self.first
        return int(self.counts[place]) if 0 <= place < len(self.counts) else 0


def _counted(
    scores: Sequence[Scores], high: int | None, within: range | None = None
) -> list[_Table]:
    if len(scores) == 1:  # which some thread may be at work on, beside others
        return [_count(high, within, scores[0])]
    jobs = (partial(_count, high, within, one) for one in scores)
    return list(tensors_in_order(jobs, ahead=_AHEAD))


def _count(high: int | None, within: range | None, scores: Scores) -> _Table:
    """The table of the digits of `_digits`, or of those `within` alone."""
    table, below, dtype = np.zeros(_BINS, np.int32), 0, "float32"
    for part in scores():
        dtype = type_name(part) if _narrow(type_name(part)) else dtype
        digits = _digits(_keys(part), high)
        if within is not None:
            under, up_to = digits < within.start, digits < within.stop
            below += int(np.count_nonzero(under))
            digits = digits[np.flatnonzero(under ^ up_to)]
        lowest = int(digits.min(initial=0))  # of which numpy counts none below zero
        counts = np.bincount(digits if lowest == 0 else digits.astype(np.int32) - lowest)
        first = _HALF + lowest
        table[first : first + len(counts)] += counts.astype(np.int32)
    used = np.flatnonzero(table)
    first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
    return _Table(dtype, below, first - _HALF, table[first:end].copy())


def _digits(keys: Keys, high: int | None) -> Keys:
    """Of keys of 16 bits they themselves; of others the high digit, or with `high` the low one,
    from -32768 on, of those that have this high one."""
    if keys.itemsize == 2:
        return keys
    if high is None:
        return (keys >> 16).astype(np.int16)
    low: Keys = (keys[keys >> 16 == high] & 0xFFFF) - _HALF
    return low.astype(np.int16)


def _digit(tables: Sequence[_Table], high: int | None, zeros: int) -> tuple[int, int]:
    """The digit, as `_digits` has it, of the `zeros`-th lowest score; how many have lower ones."""
    totals: defaultdict[str, Counts] = defaultdict(lambda: np.zeros(_BINS, np.int64))
    for table in tables:
        first = table.first + _HALF
        totals[table.dtype][first : first + len(table.counts)] += table.counts
    total = np.zeros(_BINS, np.int64)
    for dtype, counts in totals.items():
        if not _narrow(dtype):
            total += counts
            continue
        known = _as_wide(dtype)
        of = np.flatnonzero(known >> 16 == high) if high is not None else slice(None)
        np.add.at(total, _digits(known, high).astype(np.int64) + _HALF, counts[of])
    ends = total.cumsum()
    index = int(np.searchsorted(ends, zeros))
    return index - _HALF, int(ends[index] - total[index])
