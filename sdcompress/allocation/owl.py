"""OWL: layers with more outliers among |w| times the norm of its input are pruned less.

An outlier is a weight whose |w| * ||x||_2 is more than 5 times the mean of its layer's. The share
of outliers, stretched to 0..1 over the layers of a rule, lowers a layer's sparsity by up to twice
`spread`; then all are shifted together, and held within the sparsity asked for plus and minus
`spread`, so that as many weights go as are asked for. (Yin et al. 2023, arXiv 2310.05175; there a
layer is a whole block of the language model, here it is one weight.) Costs a pass over the weights,
besides the norms of the inputs that Wanda needs, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdcompress.allocation import Evidence, Group
from sdcompress.allocation._budget import Budget
from sdcompress.plan import LayerPlan

if TYPE_CHECKING:
    from torch import Tensor

    from sdcompress.recipe import ComponentRecipe, Rule

NEEDS = frozenset({"input_sq_norm"})
OUTLIER = 5.0  # times the layer's mean


def allocate(
    layers: Sequence[LayerPlan], rule: Rule, section: ComponentRecipe, evidence: Evidence
) -> list[Group]:
    shares = [
        outlier_share(evidence.weight(layer), evidence.statistic(layer, "input_sq_norm"))
        for layer in layers
    ]
    low, high = min(shares), max(shares)
    stretched = [(share - low) / (high - low) if high > low else 0.5 for share in shares]
    asked, spread = layers[0].asked or 0.0, section.spread

    def at(x: float) -> list[float]:
        shift = (4 * x - 1) * spread  # from where all are at the lower bound to the upper
        middle = [asked + shift - 2 * spread * s for s in stretched]
        return [min(max(s, asked - spread), asked + spread) for s in middle]

    return Budget.of(layers, rule, evidence).spread(at)


def outlier_share(weight: Tensor, input_sq_norm: Tensor) -> float:
    """Which fraction of |w| * ||x|| is more than 5 times its mean.

    `weight` is [out, in] or [K, C, R, S]; `input_sq_norm` broadcasts to it.
    """
    import torch

    scores = weight.abs() * input_sq_norm.sqrt().float()
    outliers = scores > OUTLIER * scores.mean(dtype=torch.float64)
    return int(outliers.sum()) / scores.numel()
