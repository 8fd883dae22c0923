"""Taylor: |w|·E|g|, how far the loss moves where the weight goes (Molchanov et al. 2017).

g is the gradient of the denoising loss on one sample: to first order the loss changes by -g·w when
the weight becomes zero, and the score is the mean of its size over the samples (arXiv 1611.06440,
equation 7, there for whole channels). Signs do not cancel between samples; in `snip` they do.

Weight [out, in] or [K, C, R, S], gradients likewise; the scores compete in the whole tensor. Costs
a forward and a backward pass a sample, and an fp64 sum of the weight's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.criteria import Criterion, LayerStats

if TYPE_CHECKING:
    from torch import Tensor


def score(weight: Tensor, stats: LayerStats) -> Tensor:
    return weight.abs() * stats.grad_abs


CRITERION = Criterion(needs=frozenset({"grad_abs"}), score=score)
