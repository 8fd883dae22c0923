"""SparseGPT's choice over whole layers, then every weight that stays refitted by least squares.

Score, H and update are those of `sparsegpt`, with two changes of our own: where there is no pattern
the weights of the whole layer compete, not those of 128 columns, and what stays ends at the optimum
for its mask, argmin tr((W - W') H (W - W')ᵀ), which a pass from left to right cannot reach; it is
approached by conjugate gradients (Hestenes & Stiefel 1952). See `_obs`.
Costs and shapes are those of `sparsegpt`, and twenty times outputs · columns² operations more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.criteria import Criterion, LayerStats, _obs
from sdcompress.patterns import Select

if TYPE_CHECKING:
    from torch import Tensor


def solve(weight: Tensor, stats: LayerStats, select: Select) -> tuple[Tensor, Tensor]:
    return _obs.solve(weight, stats.hessian, select, refit=True)


CRITERION = Criterion(needs=frozenset({"hessian"}), solve=solve)
