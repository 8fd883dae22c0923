"""RIA: a weight's share of its row and of its column, times √‖x‖ (Zhang et al. 2024, ICLR).

(|w| / Σ_row |w| + |w| / Σ_column |w|) · ‖x‖₂^½, the relative importance of "Plug-and-Play: An
Efficient Post-training Pruning Method for Large Language Models" with its exponent a = ½; a row is
all that makes one output, a column all that one input goes to, and x that input. Rows and columns
that are zero throughout score zero.

Weight [out, in], ‖x‖² [1, in]; of a Conv weight [K, C, R, S] a row is [C, R, S] and a column the K
outputs at one (c, r, s), with ‖x‖² [1, C, R, S]. Shares make rows comparable, so the whole layer
competes. Costs what wanda costs: one pass of the calibration prompts, and a sum of the size of one
row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.criteria import Criterion, LayerStats

if TYPE_CHECKING:
    from torch import Tensor

EXPONENT = 0.5  # of the norm: a of the paper


def score(weight: Tensor, stats: LayerStats) -> Tensor:
    size = weight.double().abs()
    rows = size.flatten(1).sum(1).reshape(-1, *[1] * (size.ndim - 1))
    columns = size.sum(0, keepdim=True)
    share = size / _nonzero(rows) + size / _nonzero(columns)
    return share * stats.input_sq_norm ** (EXPONENT / 2)


def _nonzero(total: Tensor) -> Tensor:
    """What is zero is a total of zeros: whatever they are divided by, they stay zero."""
    return total.masked_fill(total == 0, 1)


CRITERION = Criterion(needs=frozenset({"input_sq_norm"}), score=score)
