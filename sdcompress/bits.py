"""The numbers of a tensor as bits, a slice in the cache at a time.

On a CPU torch compares, masks and checks numbers ten to fifty times as slowly as memory gives them,
and every temporary of a large tensor's size is paid for in page faults. numpy's loops over integers
are at the memory's speed, and a slice stays in the cache for all that is done with it.

All of it takes numpy's arrays as well as torch's tensors, whose import alone takes as long as a
large model takes to be hashed. An array has the type that torch would give it; those that numpy
has not got are of `ml_dtypes`.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sdcompress.parallel import T, in_order

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

A = TypeVar("A", bound="Tensor | Array")
S = TypeVar("S")
Array: TypeAlias = "NDArray[Any]"
Job = tuple[int, Callable[[Array], T]]  # the bytes it needs, and what it does with them
SLICE = 1 << 18  # numbers: so few that they stay in the cache, so many that calls cost little
_SAMPLE = 1 << 12  # numbers that are read at once
_ONE_IN, _SPOTS = 256, 4
GROUP = 1 << 22  # bytes of small tensors that are worth being handed to a thread
_LARGEST = 2  # how often the largest job has room: the next one is at work while it is written
_LINE = 64  # bytes of the cache
# Of each type of floats: the bits of the lowest magnitude that is no finite number.
_NOT_FINITE = {
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7C,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
}


def tensors_in_order(
    jobs: Iterable[Callable[[], T]],
    threads: int | None = None,
    sizes: Iterable[int] | None = None,
    ahead: int = 1,
) -> Generator[T, None, None]:
    """`parallel.in_order` for work on tensors: several threads have one core each, and torch starts
    no more of its own in them; a single one has them all.

    With the `sizes` of the tensors in bytes, small ones are done together: one by one, threads
    would wait for each other longer than they work. Close it to leave early.
    """
    sized = zip(sizes, jobs, strict=True) if sizes is not None else ((GROUP, job) for job in jobs)
    groups = (partial(_each, group) for group in _grouped(sized))
    with (
        _one_core_each(threads) as prepare,
        closing(in_order(groups, threads, prepare, ahead)) as done,
    ):
        for results in done:
            yield from results


def in_memory(jobs: Iterable[Job[T]], threads: int | None = None) -> Generator[T, None, None]:
    """`tensors_in_order` for jobs that are given as much memory as they say, in bytes.

    What they leave there is gone when the next result is asked for. All of it is `_LARGEST` times
    what the largest takes, with small ones done together with it. As many jobs are begun as there
    is room for, so that threads have work while whoever takes the results writes a large one.
    """
    groups = [(room(nbytes for nbytes, _ in group), group) for group in _grouped(jobs)]
    ring = Ring(_LARGEST * max((nbytes for nbytes, _ in groups), default=0))

    def with_memory() -> Iterator[Callable[[], list[T]] | None]:
        for nbytes, group in groups:
            while (memory := ring.take(nbytes)) is None:
                yield None
            yield partial(_together, group, memory)

    with (
        _one_core_each(threads) as prepare,
        closing(in_order(with_memory(), threads, prepare, ahead=len(groups))) as done,
    ):
        for results in done:
            yield from results
            ring.give_back()


def _grouped(jobs: Iterable[tuple[int, S]]) -> Iterator[list[tuple[int, S]]]:
    """Jobs and their bytes, in lists of at least a `GROUP` of bytes."""
    group: list[tuple[int, S]] = []
    held = 0
    for job in jobs:
        group.append(job)
        held += job[0]
        if held >= GROUP:
            yield group
            group, held = [], 0
    if group:
        yield group


def _each(jobs: Sequence[tuple[int, Callable[[], T]]]) -> list[T]:
    return [job() for _, job in jobs]


def _together(jobs: Sequence[Job[T]], memory: Array) -> list[T]:
    parts = pieces(memory, [nbytes for nbytes, _ in jobs])
    return [job(part) for (_, job), part in zip(jobs, parts, strict=True)]


def room(sizes: Iterable[int]) -> int:
    """The bytes that `pieces` of these sizes take."""
    return sum(-(-nbytes // _LINE) * _LINE for nbytes in sizes)


def pieces(memory: Array, sizes: Sequence[int]) -> list[Array]:
    """Memory in pieces of so many bytes, each from where numbers of all types may begin."""
    firsts = (room(sizes[:i]) for i in range(len(sizes)))
    return [memory[first : first + nbytes] for first, nbytes in zip(firsts, sizes, strict=True)]


def _nothing() -> None:
    pass


@contextmanager
def _one_core_each(threads: int | None) -> Iterator[Callable[[], None]]:
    """What each of several threads has to call so that torch starts no others in it."""
    # Without torch there is nothing that starts threads of its own.
    if threads == 1 or "torch" not in sys.modules:
        yield _nothing
        return
    import torch

    before = torch.get_num_threads()
    try:
        yield partial(torch.set_num_threads, 1)
    finally:
        torch.set_num_threads(before)  # for threads to come; it was set in those alone that ended


class Buffers:
    """Memory that is used again: fresh memory costs a fault for every page of it, which takes
    longer than to read a file into it.

    There are never more than were in use at once. Threads may share them.
    """

    def __init__(self) -> None:
        self._free: list[Array] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Array:
        """At least so many bytes, with whatever was in them."""
        with self._lock:
            self._free.sort(key=len)
            if self._free and len(largest := self._free.pop()) >= nbytes:
                return largest
        return _fresh(nbytes)

    def give_back(self, buffer: Array) -> None:
        """Nobody may look at it any more."""
        with self._lock:
            self._free.append(buffer)

    @contextmanager
    def lent(self, nbytes: int) -> Iterator[Array]:
        buffer = self.take(nbytes)
        try:
            yield buffer
        finally:
            self.give_back(buffer)


class Ring:
    """Memory of so many bytes, of which pieces are given back in the order they were taken."""

    def __init__(self, nbytes: int) -> None:
        self._memory = _fresh(nbytes)
        self._taken: deque[range] = deque()

    def take(self, nbytes: int) -> Array | None:
        """So many bytes in one piece, with whatever was in them; None while there are not."""
        size = room([max(nbytes, 1)])
        place = self._next(size)
        if place is None:
            return None
        self._taken.append(range(place, place + size))
        return self._memory[place : place + nbytes]

    def _next(self, nbytes: int) -> int | None:
        if not self._taken:
            return 0
        first, end, last = self._taken[0].start, self._taken[-1].stop, len(self._memory)
        if end <= first:  # it has come round
            return end if end + nbytes <= first else None
        if end + nbytes <= last:
            return end
        return 0 if nbytes <= first else None

    def give_back(self) -> None:
        """The piece that was taken first; nobody may look at it any more."""
        self._taken.popleft()


def _fresh(nbytes: int) -> Array:
    """Memory right from the system, to which it goes back when nobody has it any more: what malloc
    has given a thread it keeps, and a model of many sizes leaves it in pieces.
    """
    import numpy as np

    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # not every kernel has large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes)


def slices(tensor: A) -> Iterator[A]:
    """The tensor in parts of whole rows (along the first axis), as many as make a slice.

    A vector is cut anywhere, and a row is never cut, however long.
    """
    rows: Any = tensor.reshape(-1) if tensor.ndim < 2 else tensor
    for part in slices_of(tuple(tensor.shape)):
        yield rows[part.start : part.stop]


def slices_of(shape: tuple[int, ...]) -> Iterator[range]:
    """The rows of each of the `slices` of a tensor of this shape."""
    return _rows(shape, SLICE, 1)


def samples_of(shape: tuple[int, ...]) -> Iterator[range]:
    """Rows from all over a tensor: one number in `_ONE_IN`, but from `_SPOTS` places at least."""
    return _rows(shape, _SAMPLE, _ONE_IN)


def _rows(shape: tuple[int, ...], numbers: int, one_in: int) -> Iterator[range]:
    """As many rows as have so many numbers, again and again: about one row in `one_in` of all."""
    numel = math.prod(shape)
    if not numel:
        return
    rows = shape[0] if len(shape) > 1 else numel
    step = max(1, numbers * rows // numel)
    for first in range(0, rows, min(step * one_in, max(step, rows // _SPOTS))):
        yield range(first, min(first + step, rows))


def bits(tensor: Tensor | Array) -> Array:
    """The numbers of a CPU tensor as signed integers of their width, flat; a view if it can be."""
    import numpy as np

    if isinstance(tensor, np.ndarray):
        return tensor.reshape(-1).view(f"i{tensor.itemsize}")
    import torch

    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().reshape(-1)
    array: Array = flat.view(integers[tensor.element_size()]).numpy()
    return array


def magnitudes(tensor: Tensor | Array) -> Array:
    """The bits of |x| of a float tensor, flat: integers that grow with it."""
    numbers = bits(tensor)
    low: Array = numbers & numbers.dtype.type((1 << 8 * numbers.itemsize - 1) - 1)
    return low


def is_zero(tensor: Tensor | Array) -> NDArray[np.bool_]:
    """Where a float tensor is +0.0 or -0.0, flat."""
    mask: NDArray[np.bool_] = magnitudes(tensor) == 0
    return mask


def zero_out(tensor: Tensor | Array, keep: NDArray[np.bool_]) -> None:
    """Make +0.0, in place, of every number of a contiguous tensor that is not kept; `keep` is flat.

    As integers, because a negative number times 0 is -0.0.
    """
    numbers = bits(tensor)
    numbers *= keep


def all_finite(tensor: Tensor | Array) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    limit = _NOT_FINITE.get(type_name(tensor))
    return limit is None or all(int(magnitudes(p).max()) < limit for p in slices(tensor))


def type_name(tensor: Tensor | Array) -> str:
    """Of its numbers: the same for torch and numpy."""
    return _name(tensor.dtype)


@lru_cache(maxsize=32)  # numpy takes as long to spell it as to look at a thousand numbers
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
