"""SparseGPT: drops what later inputs can make up for, and updates those (arXiv 2301.00774).

Score w_j² / U_jj², with U the upper Cholesky factor of H⁻¹ = Uᵀ U and H = Σ x xᵀ over all inputs,
and the update of optimal brain surgery for the columns to the right (Frantar & Alistarh 2023), in
blocks of 128 columns: see `_obs`. Columns of a Conv run along the channels first, so that N:M
groups are whole.
Linear [out, in], Conv [K, C, R, S] over its C·R·S unfolded inputs. Costs a pass over the
calibration set, columns² fp64 numbers of memory for each layer, and columns³ operations and some
outputs · columns² more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.criteria import Criterion, LayerStats, _obs
from sdcompress.patterns import Select

if TYPE_CHECKING:
    from torch import Tensor


def solve(weight: Tensor, stats: LayerStats, select: Select) -> tuple[Tensor, Tensor]:
    return _obs.solve(weight, stats.hessian, select)


CRITERION = Criterion(needs=frozenset({"hessian"}), solve=solve)
