"""The numbers of a tensor as bits, a slice in the cache at a time.

On a CPU torch compares, masks and checks numbers ten to fifty times as slowly as memory gives them,
and every temporary of a large tensor's size is paid for in page faults. numpy's loops over integers
are at the memory's speed, and a slice stays in the cache for all that is done with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from sdcompress.parallel import T, in_order

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

SLICE = 1 << 17  # numbers: so few that they stay in the cache, so many that calls cost little
GROUP = 1 << 22  # bytes of small tensors that are worth being handed to a thread


def tensors_in_order(
    jobs: Iterable[Callable[[], T]],
    threads: int | None = None,
    sizes: Iterable[int] | None = None,
) -> Generator[T, None, None]:
    """`parallel.in_order` for work on tensors: several threads have one core each, and torch starts
    no more of its own in them; a single one has them all.

    With the `sizes` of the tensors in bytes, small ones are done together: one by one, threads
    would wait for each other longer than they work. Close it to leave early.
    """
    import torch

    groups = _grouped(jobs, sizes) if sizes is not None else ([job] for job in jobs)
    before = torch.get_num_threads()
    prepare = (lambda: None) if threads == 1 else partial(torch.set_num_threads, 1)
    try:
        with closing(in_order((partial(_each, g) for g in groups), threads, prepare)) as done:
            for results in done:
                yield from results
    finally:
        if threads != 1:  # for threads to come; it was set in those alone that ended
            torch.set_num_threads(before)


def _each(jobs: list[Callable[[], T]]) -> list[T]:
    return [job() for job in jobs]


def _grouped(
    jobs: Iterable[Callable[[], T]], sizes: Iterable[int]
) -> Iterator[list[Callable[[], T]]]:
    group: list[Callable[[], T]] = []
    held = 0
    for job, size in zip(jobs, sizes, strict=True):
        group.append(job)
        held += size
        if held >= GROUP:
            yield group
            group, held = [], 0
    if group:
        yield group


def slices(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in parts of whole rows (along the first axis), as many as make a slice.

    A vector is cut anywhere, and a row is never cut, however long.
    """
    if not tensor.numel():
        return
    rows = tensor.reshape(-1) if tensor.ndim < 2 else tensor
    step = max(1, SLICE * len(rows) // tensor.numel())
    for first in range(0, len(rows), step):
        yield rows[first : first + step]


def bits(tensor: Tensor) -> NDArray[Any]:
    """The numbers of a CPU tensor as signed integers of their width, flat; a view if it can be."""
    import torch

    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().reshape(-1)
    array: NDArray[Any] = flat.view(integers[tensor.element_size()]).numpy()
    return array


def is_zero(tensor: Tensor) -> NDArray[np.bool_]:
    """Where a float tensor is +0.0 or -0.0, flat."""
    mask: NDArray[np.bool_] = bits(tensor) << 1 == 0  # all but the sign
    return mask


def zero_out(tensor: Tensor, keep: NDArray[np.bool_]) -> None:
    """Make +0.0, in place, of every number of a contiguous tensor that is not kept; `keep` is flat.

    As integers, because a negative number times 0 is -0.0.
    """
    numbers = bits(tensor)
    numbers *= keep


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    for part in slices(tensor):
        low, high = part.aminmax() if part.element_size() > 1 else part.float().aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):  # NaN becomes both
            return False
    return True
