"""Sensitivity: the loss of pruning each layer alone is measured; weights go where it grows least.

Every layer is pruned by magnitude (within the criterion's comparison group) to a few sparsities
around the one asked for, with all others as they are, and the error of the model's prediction is
measured on a few denoising steps (`calibrate._losses`). Of a layer's points (zeros, loss) the lower
convex hull is taken; its pieces, each with a loss per weight that grows from piece to piece, are
spent over all layers from the cheapest on, until as many weights go as are asked for. That is the
least sum of losses if losses add up and lie on the hulls. It does not see how layers' errors meet
(in the spirit of Molchanov et al. 2016, arXiv 1611.06440, and of layer-wise sensitivity scans since
Han et al. 2015, arXiv 1506.02626). Costs four evaluations a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from sdcompress.allocation import LOSS, Evidence, Group
from sdcompress.allocation._budget import Budget
from sdcompress.criteria import load_criterion
from sdcompress.patterns import UNSTRUCTURED, keep_mask
from sdcompress.plan import LayerPlan

if TYPE_CHECKING:
    from sdcompress.recipe import ComponentRecipe, Rule

NEEDS = frozenset({LOSS})

Point = tuple[int, float]  # zeros, loss


def allocate(
    layers: Sequence[LayerPlan], rule: Rule, section: ComponentRecipe, evidence: Evidence
) -> list[Group]:
    budget = Budget.of(layers, rule, evidence)
    levels = [
        _levels(layer, least, most)
        for layer, least, most in zip(layers, budget.least, budget.most, strict=True)
    ]
    done, total = 0, sum(map(len, levels))
    compare = load_criterion(rule.criterion).compare
    curves: list[list[Point]] = []
    for layer, counts in zip(layers, levels, strict=True):
        weight, gone, curve = evidence.weight(layer), evidence.gone(layer), []
        magnitude = weight.abs()
        for zeros in counts:
            loss = 0.0
            if zeros > gone:
                keep = keep_mask(magnitude, UNSTRUCTURED, zeros, compare)
                loss = evidence.loss(layer, weight.masked_fill(~keep, 0.0))
            curve.append((zeros, loss))
            done += 1
            evidence.progress(done, total)
        curves.append(curve)
    return budget.settle(cheapest(curves, budget.total))


def _levels(layer: LayerPlan, least: int, most: int) -> list[int]:
    """Where to measure: the fewest zeros; half the sparsity asked for, and all of it; half of the
    way from there to a layer of nothing but zeros, and three quarters, which is the most.
    """
    asked = layer.asked or 0.0
    sparsities = [asked / 2, asked, (asked + 1) / 2, (asked + 3) / 4]
    counts = {round(s * layer.numel) for s in sparsities}
    return sorted({least, *(min(max(count, least), most) for count in counts)})


def cheapest(curves: Sequence[Sequence[Point]], total: int) -> list[int]:
    """How many zeros each layer gets, for the least sum of losses.

    `curves` are the points of each layer in the order of their zeros; the first is what it loses
    at the least. `total` is at most the sum of their ends.
    """
    zeros = [curve[0][0] for curve in curves]
    pieces = [
        ((end[1] - start[1]) / (end[0] - start[0]), index, end[0] - start[0])
        for index, curve in enumerate(curves)
        for start, end in pairwise(lower_hull(curve))
    ]
    rest = total - sum(zeros)
    # A hull's slopes grow, so that sorting keeps the pieces of one layer in their order.
    for _, index, length in sorted(pieces, key=lambda piece: piece[:2]):
        zeros[index] += min(length, rest)
        rest -= min(length, rest)
    return zeros


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The points on the lower convex hull of points in the order of their zeros."""
    hull: list[Point] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):  # it bends upward at hull[-1]
                break
            hull.pop()
        hull.append((x, y))
    return hull
