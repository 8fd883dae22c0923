"""What each unit of a block is worth, by criteria that score single weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdcompress.calibrate import Wanted
from sdcompress.criteria import STATISTICS, LayerStats, load_criterion
from sdcompress.registry import names
from sdcompress.structure import Block, Part

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Removal:
    """The units of a block in the order in which they go, and what is lost on the way.

    `losses[n]` is what goes with `order[:n]`, so there is one more of them; `losses[0]` is 0.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]

    def kept(self, units: int, of: int) -> tuple[int, ...]:
        """The units that stay, rising, where `units` of all `of` do."""
        return tuple(sorted(set(range(of)) - set(self.order[: of - units])))


def refuse(criterion: str) -> str | None:
    """Why a criterion cannot judge groups, or None if it can."""
    if load_criterion(criterion).solve is None:
        return None
    known = [name for name in names("criteria") if load_criterion(name).solve is None]
    return (
        f"{criterion} gives no score that could be summed over a group; use obs, which does for "
        f"groups what it does for single weights, or another of {', '.join(known)}"
    )


def wanted(judged: Iterable[tuple[Block, str]]) -> Wanted:
    """The statistics that blocks are judged by, each by the criterion beside it."""
    found: dict[str, dict[str, frozenset[str]]] = defaultdict(lambda: defaultdict(frozenset))
    for block, name in judged:
        criterion = load_criterion(name)
        layers = [block.consumer] if criterion.group else [p.tensor for p in scored_parts(block)]
        for layer in layers:
            if asked := criterion.needs & STATISTICS:
                found[block.component][layer] |= asked
    return {component: dict(layers) for component, layers in found.items()}


def scored_parts(block: Block) -> list[Part]:
    """The weights of Linear and Conv layers: no biases, and nothing of a GroupNorm."""
    return [p for p in block.parts if p.tensor.endswith(".weight") and ".norm" not in p.tensor]


def unit_scores(
    block: Block, criterion: str, weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats]
) -> Tensor:
    """[units] in fp64: the scores of all weights that would go with each unit, summed up.

    That is the rows of its producers, in every copy, and the columns of its consumer; `weights` and
    `stats` hold each of `scored_parts` by its name. Sums rather than means: a unit is worth what
    all of its weights are, as with "Pruning Filters for Efficient ConvNets" (Li et al. 2017, arXiv
    1608.08710), there by magnitude and for filters.
    """
    import torch

    score = load_criterion(criterion).score
    assert score, "`refuse` comes first"
    total = torch.zeros(block.units, dtype=torch.float64)
    for part in scored_parts(block):
        scores = score(weights[part.tensor], stats[part.tensor]).double()
        along = scores.movedim(part.axis, 0).reshape(part.copies, block.units, -1)
        total += along.sum((0, 2)).cpu()
    return total


def order_by_score(scores: Tensor) -> Removal:
    """The lowest go first, of equals the one with the lower index; losses are sums of scores."""
    import torch

    ordered, order = torch.sort(scores, stable=True)
    return Removal(tuple(order.tolist()), (0.0, *ordered.cumsum(0).tolist()))
