"""Which weights compete, and how many of them go: unstructured and N:M sparsity.

This is the only place that knows groups and axes. N:M means at most N non-zero weights among M
consecutive ones *along the reduction axis of the GEMM*: `in` of a Linear weight [out, in], C of a
Conv weight [K, C, R, S] for each kernel position. Flattening a Conv weight to [K, C*R*S] and
grouping there gives the same number of zeros in groups no sparse kernel can use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdcompress.bits import slices
from sdcompress.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from sdcompress.selection import Scores

REDUCTION_AXIS = 1  # of both Linear [out, in] and Conv [K, C, R, S]
MAX_M = 16

Compare = Literal["tensor", "row"]


@dataclass(frozen=True)
class Pattern:
    """`n` of every `m` weights are kept; both are None for unstructured sparsity."""

    n: int | None = None
    m: int | None = None

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros the pattern itself fixes; None if it fixes none."""
        return None if self.n is None or self.m is None else 1 - self.n / self.m

    def __str__(self) -> str:
        return "unstructured" if self.m is None else f"{self.n}:{self.m}"


UNSTRUCTURED = Pattern()


def parse_pattern(text: str) -> Pattern:
    """`"unstructured"` or `"N:M"` with 1 <= N <= M <= 16.

    Raises:
        UsageError: anything else.
    """
    if text == "unstructured":
        return UNSTRUCTURED
    if match := re.fullmatch(r"(\d{1,2}):(\d{1,2})", text):
        n, m = int(match[1]), int(match[2])
        if 1 <= n <= m <= MAX_M:
            return Pattern(n, m)
    raise UsageError(
        f"pattern {text!r}: expected 'unstructured' or N:M (N kept of every M, N <= M <= {MAX_M}) "
        "such as '2:4'"
    )


def zeros_for(sparsity: float, numel: int) -> int:
    """round(s * n), halves up, so that the same request gives the same count everywhere."""
    return int(sparsity * numel + 0.5)


def fits(pattern: Pattern, shape: tuple[int, ...]) -> str | None:
    """Why a weight of this shape cannot take the pattern, or None if it can."""
    if pattern.m is None or shape[REDUCTION_AXIS] % pattern.m == 0:
        return None
    return f"{shape[REDUCTION_AXIS]} input channels are not divisible by {pattern.m}"


def planned_zeros(pattern: Pattern, shape: tuple[int, ...], sparsity: float) -> int:
    """How many zeros `keep_mask` leaves in a weight of this shape."""
    numel = math.prod(shape)
    if pattern.n is not None and pattern.m is not None:
        return numel // pattern.m * (pattern.m - pattern.n)
    return zeros_for(sparsity, numel)


def keep_mask(scores: Tensor, pattern: Pattern, zeros: int, compare: Compare) -> Tensor:
    """The boolean mask of weights to keep, shaped like `scores` ([out, in] or [K, C, R, S]).

    Exactly `zeros` weights go, those with the lowest scores in their comparison group (the whole
    tensor, each output row, or each group of M along the reduction axis). Every row gives the same
    share, to within one weight. Among equal scores the lower index goes first.
    """
    import numpy as np
    import torch

    if pattern.m is None and compare == "row":
        rows = scores.reshape(scores.shape[0], -1)
        each, more = divmod(zeros, len(rows))
        # Where more go in a later round, no row may give less.
        shares = each + (torch.arange(len(rows), device=rows.device) >= len(rows) - more).long()
        return _drop_lowest(rows, shares[:, None]).reshape(scores.shape)
    if scores.device.type != "cpu":
        return _keep_by_sorting(scores, pattern, zeros)
    masks = list(keep_masks(lambda: slices(scores), pattern, zeros))
    return torch.from_numpy(np.concatenate([np.empty(0, bool), *masks])).reshape(scores.shape)


def keep_masks(scores: Scores, pattern: Pattern, zeros: int) -> Iterator[NDArray[np.bool_]]:
    """The same for scores that come in slices of whole rows, on a CPU; masks are flat.

    Rows do not compete among themselves here. What comes of a slice is not looked at again.
    """
    from sdcompress.selection import find_cuts, keep_n_of_m

    if pattern.n is not None and pattern.m is not None:
        n, m = pattern.n, pattern.m
        return (keep_n_of_m(part, n, m) for part in scores())
    (cut,) = find_cuts([scores], zeros)
    return cut.keep(scores())


def _keep_by_sorting(scores: Tensor, pattern: Pattern, zeros: int) -> Tensor:
    """What `keep_mask` gives, by a stable sort; on any device."""
    scores = scores.float()
    if pattern.n is None or pattern.m is None:
        return _drop_lowest(scores.reshape(1, -1), zeros).reshape(scores.shape)
    keep = _drop_lowest(grouped(scores, pattern), pattern.m - pattern.n)
    return ungrouped(keep, scores.shape, pattern)


def grouped(weight: Tensor, pattern: Pattern) -> Tensor:
    """[K, groups, members]: each output row cut into what a pattern counts zeros in.

    That is the groups of M consecutive input channels, or for unstructured sparsity the whole row.
    """
    if pattern.m is None:
        return weight.reshape(weight.shape[0], 1, -1)
    return weight.movedim(REDUCTION_AXIS, -1).reshape(weight.shape[0], -1, pattern.m)


def ungrouped(groups: Tensor, shape: tuple[int, ...], pattern: Pattern) -> Tensor:
    """What `grouped` gave, in the weight's own shape again."""
    if pattern.m is None:
        return groups.reshape(shape)
    rows, channels, *kernel = shape
    return groups.reshape(rows, *kernel, channels).movedim(-1, REDUCTION_AXIS)


def as_columns(weight: Tensor) -> Tensor:
    """[K, columns]: what multiplies one output, in the order of the groups.

    The columns of a Conv [K, C, R, S] run along C first, then along the kernel's positions.
    """
    return weight.movedim(REDUCTION_AXIS, -1).reshape(weight.shape[0], -1)


def from_columns(columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `as_columns` gave, in the weight's own shape again."""
    rows, channels, *kernel = shape
    return columns.reshape(rows, *kernel, channels).movedim(-1, REDUCTION_AXIS)


def _drop_lowest(scores: Tensor, zeros: int | Tensor) -> Tensor:
    """Drop the `zeros` lowest along the last axis of `scores`: one number, or one for each line."""
    import torch

    order = torch.argsort(scores, dim=-1, stable=True)
    if isinstance(zeros, int):
        keep = torch.ones_like(scores, dtype=torch.bool)
        return keep.scatter_(-1, order[..., :zeros], False)
    stays = torch.arange(scores.shape[-1], device=scores.device) >= zeros
    return torch.empty_like(stays).scatter_(-1, order, stays)


class Select:
    """Chooses what goes a few columns at a time, for methods that change later columns meanwhile.

    Columns are those of `as_columns`; `width` of them are chosen together. `zeros` weights go in
    all, or as many as N:M says. `gone` (boolean, of the weight's shape) was pruned in an earlier
    round: it goes whatever its score, and counts.

    For N:M, `width` is M. Without a pattern it is 128, as SparseGPT has it, and every block gives
    the same share; or `plan` finds out beforehand how many go in each column, since the same share
    forces out what matters where it is most, and `width` is 8.
    """

    def __init__(
        self, pattern: Pattern, shape: tuple[int, ...], zeros: int, gone: Tensor | None = None
    ) -> None:
        self.width = 128 if pattern.m is None else pattern.m
        self._pattern = pattern
        self._shape = (shape[0], math.prod(shape[1:]))
        self._zeros = zeros
        self._gone = None if gone is None else as_columns(gone)
        self._before: list[int] = []  # how many zeros there are to be in the columns before each

    def plan(self, scores: Tensor) -> None:
        """Share out the zeros over all columns, by first scores [K, columns] of every weight."""
        if self._pattern.m is None:
            self._share_out(scores)
            self.width = 8

    def __call__(self, scores: Tensor, first: int) -> Tensor:
        """The mask of weights to keep among the columns from `first` on, shaped like `scores`.

        `scores` [K, columns], a multiple of `width` of them unless they are the last. Without a
        pattern all rows and columns compete, for as many zeros as `plan` says, or for an even share
        where it was not called.
        """
        scores = self._without_gone(scores, first)
        zeros = 0
        if self._pattern.m is None:
            if not self._before:
                self._share_evenly()
            zeros = self._before[first + scores.shape[1]] - self._before[first]
        # What is gone stays so even where there were to be fewer zeros.
        return keep_mask(scores, self._pattern, zeros, "tensor") & (scores > -math.inf)

    def _share_out(self, scores: Tensor) -> None:
        dropped = ~keep_mask(self._without_gone(scores, 0), UNSTRUCTURED, self._zeros, "tensor")
        self._before = [0, *dropped.sum(0).cumsum(0).tolist()]

    def _share_evenly(self) -> None:
        import torch

        count = self._shape[1]
        before = torch.arange(count + 1) * self._zeros // count
        if self._gone is not None:
            gone = torch.cat([torch.zeros(1, dtype=torch.int64), self._gone.sum(0).cumsum(0).cpu()])
            # Where more than its share is gone, the columns to its right give less for it.
            before = gone + (before - gone).cummax(0).values.clamp(max=self._zeros - int(gone[-1]))
        self._before = before.tolist()

    def _without_gone(self, scores: Tensor, first: int) -> Tensor:
        if self._gone is None:
            return scores
        gone = self._gone[:, first : first + scores.shape[1]].to(scores.device)
        return scores.float().masked_fill(gone, -math.inf)


def violations(weight: Tensor, pattern: Pattern) -> int:
    """How many groups of M along the reduction axis hold more than N non-zero weights.

    Raises:
        ValueError: M does not divide that axis.
    """
    from sdcompress.selection import groups_above

    if pattern.n is None or pattern.m is None:
        return 0
    if why_not := fits(pattern, tuple(weight.shape)):
        raise ValueError(why_not)
    if weight.device.type != "cpu":
        return int((grouped(weight != 0, pattern).sum(-1) > pattern.n).sum())
    return sum(groups_above(part, pattern.n, pattern.m) for part in slices(weight))
