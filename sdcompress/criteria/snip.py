"""SNIP: |w·E g|, what the loss says of a mask's entries at 1 (Lee et al. 2018, arXiv 1810.02340).

With c = m⊙w the gradient by a mask is ∂L/∂m = w·∂L/∂c at m = 1, where all the calibration samples
are one mini-batch: gradients that point against each other cancel. The paper divides by the sum of
all scores, which changes no order and is left out.

Weight [out, in] or [K, C, R, S], gradients likewise; the scores compete in the whole tensor. Costs
a forward and a backward pass a sample, and an fp64 sum of the weight's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.criteria import Criterion, LayerStats

if TYPE_CHECKING:
    from torch import Tensor


def score(weight: Tensor, stats: LayerStats) -> Tensor:
    return (weight * stats.grad_mean).abs()


CRITERION = Criterion(needs=frozenset({"grad_mean"}), score=score)
