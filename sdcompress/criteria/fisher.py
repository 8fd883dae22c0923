"""Fisher: ½·E[g²]·w², the loss's second order with the diagonal of the empirical Fisher as Hessian.

At a minimum the loss grows by ½·h·w² where a weight goes that has curvature h (LeCun et al. 1989,
"Optimal Brain Damage"); the mean squared gradient of single samples stands in for h (Theis et al.
2018, arXiv 1801.05787).

Weight [out, in] or [K, C, R, S], gradients likewise; the scores compete in the whole tensor. Costs
a forward and a backward pass a sample, and an fp64 sum of the weight's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.criteria import Criterion, LayerStats

if TYPE_CHECKING:
    from torch import Tensor


def score(weight: Tensor, stats: LayerStats) -> Tensor:
    return 0.5 * stats.grad_sq * weight.double() ** 2  # fp16 would lose the small ones


CRITERION = Criterion(needs=frozenset({"grad_sq"}), score=score)
