"""From what may become of each block to what does, and to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdcompress.bundle import TensorRecord
from sdcompress.calibrate import Statistics
from sdcompress.catalog import Catalog
from sdcompress.plan import SparsityPlan, make_plan
from sdcompress.recipe import Recipe
from sdcompress.shrink._budget import Tables, costs_of, latency_of, spend, table_of
from sdcompress.shrink._importance import Removal
from sdcompress.shrink._judge import Judge
from sdcompress.shrink._plan import Fate, narrowed, structured
from sdcompress.shrink._write import records_of, write_narrow
from sdcompress.structure import RECORD, Block, BlockRecord, ComponentStructure, to_ranges

Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much
Fates = Mapping[str, Sequence[Fate]]  # by component
Left = dict[Block, tuple[int, ...]]  # the units that stay, of blocks that lose some


@dataclass(frozen=True)
class Made:
    """For the manifest of what was written."""

    plan: SparsityPlan
    tensors: dict[str, dict[str, TensorRecord]]
    details: dict[str, Any]


class Narrowing:
    """One model, one recipe, and what was recorded of the one for the other."""

    def __init__(
        self,
        recipe: Recipe,
        catalog: Catalog,
        tables: Tables,
        statistics: Statistics,
        progress: Progress,
    ) -> None:
        self._recipe, self._catalog, self._tables = recipe, catalog, tables
        self._judge, self._progress = Judge(catalog, recipe.seed, statistics), progress
        self._removals: dict[Block, Removal] = {}

    def settle(self, planned: Fates) -> dict[str, tuple[Fate, ...]]:
        """Judge every block that may lose something, and decide where a budget has to."""
        open_to = [f for several in planned.values() for f in several if not f.skipped_because]
        for number, fate in enumerate(open_to, 1):
            self._removals[fate.block] = self._judge.order(fate)
            self._progress("judging blocks", number, len(open_to))
        return {component: self._spend(component, fates) for component, fates in planned.items()}

    def _spend(self, component: str, planned: Sequence[Fate]) -> tuple[Fate, ...]:
        if not (budget := structured(self._recipe)[component].budget):
            return tuple(planned)
        costs = costs_of(component, budget.what, self._recipe, self._catalog, self._tables)
        assert costs
        losses = {block: removal.losses for block, removal in self._removals.items()}
        kept = spend(costs, budget.share, [f for f in planned if f.kept is None], losses)
        return tuple(replace(f, kept=kept.get(f.block, f.kept)) for f in planned)

    def write(self, work: Path, settled: Fates) -> Made:
        """Write what changes below `work`."""
        catalog, narrow = self._catalog, narrowed(self._catalog, settled)
        headers = [header for shards in catalog.headers.values() for header in shards]
        total, done = sum(i.nbytes for h in headers for i in h.tensors.values()), 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self._progress("cutting", done, total)

        tensors, records = {}, {}
        for component in catalog.components:
            if not (several := settled.get(component)):
                tensors[component] = records_of(catalog, component, count)
                continue
            losing = [f for f in several if f.kept is not None and f.kept < f.block.units]
            left = {f.block: self._left(f) for f in losing}
            refitted = {
                f.block.consumer: self._judge.refit(f, left[f.block])
                for f in losing
                if self._judge.refits(f)
            }
            tensors[component] = write_narrow(
                catalog, component, narrow, left, refitted, work, count
            )
            record = self._record(component, narrow.parameters[component], several, left)
            records[component] = record.model_dump(mode="json")
        # Single weights are another step's business.
        sections = {c: self._recipe.prune[c].model_copy(update={"rules": ()}) for c in settled}
        plan = make_plan(self._recipe.model_copy(update={"prune": sections}), narrow)
        removed = {c: catalog.parameters[c] - narrow.parameters[c] for c in settled}
        return Made(plan.model_copy(update={"removed": removed}), tensors, {RECORD: records})

    def _left(self, fate: Fate) -> tuple[int, ...]:
        assert fate.kept
        return self._removals[fate.block].kept(fate.kept, fate.block.units)

    def _record(
        self, component: str, parameters: int, several: Sequence[Fate], left: Left
    ) -> ComponentStructure:
        budget = structured(self._recipe)[component].budget
        macs = costs_of(component, "macs", self._recipe, self._catalog)
        table = table_of(component, self._recipe, self._tables)
        units = {block: len(kept) for block, kept in left.items()}
        assert macs
        return ComponentStructure(
            budget={budget.what: budget.share} if budget else None,
            parameters_dense=self._catalog.parameters[component],
            parameters=parameters,
            macs_dense=round(macs.total),
            macs=round(macs.total * macs.left(units)),
            latency=latency_of(component, table).left(units) if table else None,
            latency_table=table.sha256 if table else None,
            blocks={fate.block.name: self._of_block(fate, left) for fate in several},
        )

    def _of_block(self, fate: Fate, left: Left) -> BlockRecord:
        block, rule = fate.block, fate.rule
        stays = left.get(block, tuple(range(block.units)))
        return BlockRecord(
            kind=block.kind,
            unit=block.unit,
            width=block.width,
            kept=len(stays) * block.unit,
            asked=rule.ratio if rule else None,
            criterion=rule.criterion if rule and not rule.keep else None,
            refit=block in left and self._judge.refits(fate),
            removed=to_ranges(unit for unit in range(block.units) if unit not in stays),
        )
