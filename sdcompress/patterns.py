"""Which weights compete, and how many of them go: unstructured and N:M sparsity.

This is the only place that knows groups and axes. N:M means at most N non-zero weights among M
consecutive ones *along the reduction axis of the GEMM*: `in` of a Linear weight [out, in], C of a
Conv weight [K, C, R, S] for each kernel position. Flattening a Conv weight to [K, C*R*S] and
grouping there gives the same number of zeros in groups no sparse kernel can use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdcompress.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

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
    if pattern.n is not None and pattern.m is not None:
        return _keep_n_of_m(scores, pattern.n, pattern.m)
    if compare == "row":
        import torch

        rows = scores.reshape(scores.shape[0], -1)
        each, more = divmod(zeros, len(rows))
        # Where more go in a later round, no row may give less.
        shares = each + (torch.arange(len(rows), device=rows.device) >= len(rows) - more).long()
        return _drop_lowest(rows, shares[:, None]).reshape(scores.shape)
    return Threshold.find([scores], zeros).keep(scores)


def _keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    pattern = Pattern(n, m)
    keep = _drop_lowest(grouped(scores, pattern), m - n)
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


class Threshold:
    """The exact boundary below which weights go, found without sorting and over any number of
    tensors: a radix selection on the scores' bits in two passes of 65,536 bins each.

    Peak memory is a few times the largest tensor handed in, whatever their number.
    """

    def __init__(self, key: int, ties: int) -> None:
        self._key = key
        self._ties = ties  # how many scores equal to the boundary still go, lowest index first

    @classmethod
    def find(cls, scores: Iterable[Tensor], zeros: int) -> Threshold:
        """`scores` is walked twice and must give the same tensors in the same order."""
        if zeros == 0:
            return cls(_LOWEST, 0)
        high, before = cls._bin(scores, zeros, lambda key: (key >> 16) + 32768)
        digit = high - 32768
        low, below = cls._bin(scores, zeros - before, lambda key: key[key >> 16 == digit] & 0xFFFF)
        return cls((digit << 16) | low, zeros - before - below)

    @staticmethod
    def _bin(
        scores: Iterable[Tensor], zeros: int, digit: Callable[[Tensor], Tensor]
    ) -> tuple[int, int]:
        """The bin that holds the `zeros`-th lowest digit, and how many digits lie in lower bins."""
        import torch

        counts = torch.zeros(65536, dtype=torch.int64)
        for s in scores:
            counts += torch.bincount(digit(_ordered_bits(s)), minlength=65536).cpu()
        total = counts.cumsum(0)
        index = int(torch.searchsorted(total, zeros))
        return index, int(total[index] - counts[index])

    def keep(self, scores: Tensor) -> Tensor:
        """The mask of weights to keep. Call it in the order of `find`: ties are used up."""
        key = _ordered_bits(scores)
        keep = key >= self._key
        if self._ties:
            dropped = (key == self._key).nonzero().squeeze(1)[: self._ties]
            keep[dropped] = False
            self._ties -= len(dropped)
        return keep.reshape(scores.shape)


_LOWEST = -(2**31)


def _ordered_bits(scores: Tensor) -> Tensor:
    """fp32 scores as int32 that sort the same way; -0.0 counts as +0.0.

    The bits of a positive float grow with it; those of a negative one must be turned around.
    """
    import torch

    bits = (scores.float() + 0.0).reshape(-1).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def violations(weight: Tensor, pattern: Pattern) -> int:
    """How many groups of M along the reduction axis hold more than N non-zero weights."""
    if pattern.n is None or pattern.m is None:
        return 0
    return int((grouped(weight != 0, pattern).sum(-1) > pattern.n).sum())
