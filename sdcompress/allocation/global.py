"""Global: one threshold over all layers of a rule; layers of small weights give up more.

With limits, a layer that the threshold takes beyond them stops there, and the others share another
threshold. That one is found by walking over all scores anew: nothing but a layer is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from sdcompress.allocation import Evidence, Group
from sdcompress.allocation._budget import Budget
from sdcompress.bits import tensors_in_order
from sdcompress.plan import LayerPlan

if TYPE_CHECKING:
    from sdcompress.recipe import ComponentRecipe, Rule
    from sdcompress.selection import Cut, Scores

NEEDS: frozenset[str] = frozenset()


def allocate(
    layers: Sequence[LayerPlan], rule: Rule, section: ComponentRecipe, evidence: Evidence
) -> list[Group]:
    budget = Budget.of(layers, rule, evidence)
    if rule.min_sparsity == 0 and rule.max_sparsity == 1:
        return [Group(tuple(layers), budget.total)]
    least = {layer.name: n for layer, n in zip(layers, budget.least, strict=True)}
    most = {layer.name: n for layer, n in zip(layers, budget.most, strict=True)}
    free, total, stopped = list(layers), budget.total, list[Group]()
    while free:
        counts = _counts(free, total, evidence)
        within = {name: min(max(n, least[name]), most[name]) for name, n in counts.items()}
        if within == counts:
            break
        # Within the limits, do too many go or too few? The threshold has to fall or to rise, and
        # what is beyond the limits on that side of it stays there, wherever it comes to lie.
        surplus = sum(within.values()) - total
        stop = {
            name
            for name, n in counts.items()
            if (n < within[name] and surplus >= 0) or (n > within[name] and surplus <= 0)
        }
        stopped += [Group((layer,), within[layer.name]) for layer in free if layer.name in stop]
        total -= sum(within[name] for name in stop)
        free = [layer for layer in free if layer.name not in stop]
    return [*stopped, Group(tuple(free), total)] if free else stopped


def _counts(layers: Sequence[LayerPlan], total: int, evidence: Evidence) -> dict[str, int]:
    """How many weights of each layer, by its name, one threshold over all takes."""
    from sdcompress.selection import find_cuts

    scores = [partial(evidence.scores, layer) for layer in layers]
    cuts = find_cuts(scores, total)
    jobs = (partial(_kept, cut, one) for cut, one in zip(cuts, scores, strict=True))
    with closing(tensors_in_order(jobs)) as kept:
        return {layer.name: layer.numel - n for layer, n in zip(layers, kept, strict=True)}


def _kept(cut: Cut, scores: Scores) -> int:
    return sum(int(mask.sum()) for mask in cut.keep(scores()))
