"""A budget for a component, spent over its blocks where it costs least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdcompress.catalog import Catalog, read_config
from sdcompress.errors import UsageError
from sdcompress.latency import LatencyTable, read_table
from sdcompress.macs import Sizes, block_macs, component_macs
from sdcompress.recipe import Budget, Recipe
from sdcompress.shrink._plan import Fate, structured
from sdcompress.structure import Block

Tables = Mapping[str, LatencyTable]  # by component
_STEPS = 1 << 15  # in which costs are counted


@dataclass(frozen=True)
class Costs:
    """What a component costs dense, and what a block costs with so many units left."""

    what: str
    total: float
    of: Callable[[Block, int], float]

    def left(self, kept: Mapping[Block, int]) -> float:
        """What the component costs then, as a share of dense; blocks not named stay whole."""
        saved = sum(self.of(b, b.units) - self.of(b, units) for b, units in kept.items())
        return (self.total - saved) / self.total


def costs_of(
    component: str, what: str, recipe: Recipe, catalog: Catalog, tables: Tables | None = None
) -> Costs | None:
    """What counts as a component's macs, params or latency; None for a latency without a table."""
    if what == "params":
        return params_of(component, catalog)
    if what == "macs":
        model = catalog.folder(component).parent
        sizes = Sizes.of_model(model, recipe.sampling.height, recipe.sampling.width)
        return macs_of(component, catalog, sizes)
    table = table_of(component, recipe, tables)
    return latency_of(component, table) if table else None


def table_of(component: str, recipe: Recipe, tables: Tables | None) -> LatencyTable | None:
    file = structured(recipe)[component].table
    return read_table(Path(file)) if file else (tables or {}).get(component)


def macs_of(component: str, catalog: Catalog, sizes: Sizes) -> Costs:
    """MACs of one sample in one step."""
    config = read_config(catalog.folder(component))
    macs = component_macs(component, catalog.shapes(component), config, sizes)
    return Costs(
        "macs", sum(macs.values()), lambda block, kept: block_macs(block, macs) * kept / block.units
    )


def params_of(component: str, catalog: Catalog) -> Costs:
    """Numbers in the component's files."""
    shapes = catalog.shapes(component)

    def of(block: Block, kept: int) -> float:
        return sum(math.prod(shapes[part.tensor]) for part in block.parts) * kept / block.units

    return Costs("params", sum(map(math.prod, shapes.values())), of)


def latency_of(component: str, table: LatencyTable) -> Costs:
    """Seconds of one run.

    Raises:
        UsageError: the table is another component's, or, once it is asked, another model's.
    """
    if table.component != component:
        raise UsageError(
            f"{component}: expected a latency table of it, found one of {table.component}; measure "
            f"one with `sdcompress latency --component {component}`"
        )

    def of(block: Block, kept: int) -> float:
        if (widest := max(table.blocks.get(block.name, {0: 0}))) != block.width:
            raise UsageError(
                f"{component}: expected a latency table of a model whose {block.name} has "
                f"{block.width} channels, found {widest or 'no such block'}; measure one of this "
                "model with `sdcompress latency`"
            )
        return table.seconds(block.name, kept * block.unit)

    return Costs("latency", table.total, of)


def closest(costs: Costs, fates: Sequence[Fate]) -> float:
    """What is left of dense with all gone that the rules allow."""
    return costs.left({f.block: min(f.choices(), key=partial(costs.of, f.block)) for f in fates})


def check_budget(component: str, budget: Budget, costs: Costs, fates: Sequence[Fate]) -> None:
    """Raise UsageError, with the closest that can be reached, where a budget cannot be met."""
    if (least := closest(costs, fates)) > budget.share:
        raise UsageError(
            f"{component}: a budget of {budget.what} {budget.share:g} cannot be met: with all that "
            f"the rules allow gone, {math.ceil(least * 1000) / 1000:g} of it is left; ask for "
            "that or more, raise max_ratio, or keep fewer blocks dense"
        )


def spend(
    costs: Costs, share: float, fates: Sequence[Fate], losses: Mapping[Block, Sequence[float]]
) -> dict[Block, int]:
    """The units of each block that stay, so that the component costs no more than `share` of dense
    and the sum of losses is the least.

    `losses[block][n]` is what n units less in a block lose. Each block takes one of its widths: the
    multiple-choice knapsack problem, solved by dynamic programming; exactly, but that each block's
    cost is rounded up to 1/32768 of dense, so that the budget holds. `share` is one that
    `check_budget` lets pass.
    """
    import numpy as np

    grain = costs.total / _STEPS
    cheapest = {f.block: min(costs.of(f.block, n) for n in f.choices()) for f in fates}

    def cost(fate: Fate, units: int) -> int:
        """Above what the block costs at the least."""
        above = costs.of(fate.block, units) - cheapest[fate.block]
        return math.ceil(above / grain - 1e-9)

    room = math.floor((share - closest(costs, fates)) * costs.total / grain + 1e-9)
    if room < 0:
        raise ValueError("expected a share that `check_budget` lets pass")
    best = np.zeros(room + 1)  # the least loss of the blocks so far, for every cost they may have
    taken = []
    for fate in fates:
        now, choice = np.full_like(best, np.inf), np.zeros(len(best), np.int16)
        for number, units in enumerate(fate.choices()):
            if (price := cost(fate, units)) > room:
                continue
            lost = losses[fate.block][fate.block.units - units]
            reached = best[: len(best) - price] + lost
            better = reached < now[price:]
            now[price:][better], choice[price:][better] = reached[better], number
        best = now
        taken.append(choice)
    kept = {}
    for fate, choice in zip(reversed(fates), reversed(taken), strict=True):
        kept[fate.block] = fate.choices()[choice[room]]
        room -= cost(fate, kept[fate.block])
    return kept
