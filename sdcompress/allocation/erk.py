"""ERK: density by the shape alone; small layers and narrow ones keep more of their weights.

The density of a layer is proportional to (n_in + n_out + k_h + k_w) / (n_in * n_out * k_h * k_w),
for a Linear (n_in + n_out) / (n_in * n_out): a random graph in which every channel keeps about as
many connections, whatever the size of the layer. A layer that would be more than dense is dense,
and the others share what that spares. (Evci et al. 2020, "Rigging the Lottery", arXiv 1911.11134,
after Mocanu et al. 2018, arXiv 1707.04780.) Costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdcompress.allocation import Evidence, Group
from sdcompress.allocation._budget import Budget
from sdcompress.plan import LayerPlan

if TYPE_CHECKING:
    from sdcompress.recipe import ComponentRecipe, Rule

NEEDS: frozenset[str] = frozenset()


def allocate(
    layers: Sequence[LayerPlan], rule: Rule, section: ComponentRecipe, evidence: Evidence
) -> list[Group]:
    # Both sums and products are of the shape: [out, in] or [K, C, R, S].
    density = [sum(layer.shape) / layer.numel for layer in layers]
    scale = 1 / min(density)  # at which all are dense

    def at(x: float) -> list[float]:
        return [1 - min((1 - x) * scale * d, 1.0) for d in density]

    return Budget.of(layers, rule, evidence).spread(at)
