"""OBS-Diff: SparseGPT with early denoising steps weighing more (arXiv 2510.06751).

Score and update are those of `sparsegpt`; H = Σ α_i x xᵀ, where α falls with the logarithm of the
steps that are left, from 1.2 at the first to 0.8 at the last, since an error at an early step goes
through all the later ones (Zhu et al. 2025). The paper prunes layers in packages, each calibrated
on what became of those before: `calibration: {packages: 4}`. What runs once a picture (text
encoder, VAE) has one weight. Costs and shapes are those of `sparsegpt`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.criteria import Criterion, LayerStats, _obs
from sdcompress.patterns import Select

if TYPE_CHECKING:
    from torch import Tensor


def solve(weight: Tensor, stats: LayerStats, select: Select) -> tuple[Tensor, Tensor]:
    return _obs.solve(weight, stats.step_hessian, select)


CRITERION = Criterion(needs=frozenset({"step_hessian"}), solve=solve)
