"""Neurons, heads and channels that go as a whole: weight bundle → narrower weight bundle.

What a block loses is chosen by a criterion summed over each of its units, or by how well the layer
behind it does without them; how much, by a ratio, or by a budget for the component. What comes out
is a model of the same parts under the same names, with smaller tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as replace_in
from functools import partial
from pathlib import Path
from typing import Any

from sdcompress.bundle import (
    Bundle,
    Manifest,
    TensorRecord,
    link_files,
    refuse_existing,
    seal,
    staging,
    tool_versions,
)
from sdcompress.calibrate import Calibrator, Statistics, Wanted, complete, on_main_process
from sdcompress.calibrate import check as check_calibration
from sdcompress.catalog import Catalog, read_catalog
from sdcompress.errors import UsageError
from sdcompress.latency import LatencyTable, read_table
from sdcompress.macs import Sizes
from sdcompress.plan import SparsityPlan, make_plan
from sdcompress.recipe import Recipe
from sdcompress.shrink._budget import (
    Costs,
    check_budget,
    closest,
    latency_of,
    macs_of,
    params_of,
    spend,
)
from sdcompress.shrink._importance import Removal, wanted
from sdcompress.shrink._judge import Judge
from sdcompress.shrink._plan import Fate, fates, narrowed, structured
from sdcompress.shrink._write import records_of, write_narrow
from sdcompress.structure import RECORD, Block, BlockRecord, ComponentStructure, to_ranges

__all__ = [
    "Fate",
    "asks",
    "check",
    "closest",
    "costs_of",
    "narrowed",
    "needs_tables",
    "refuse_pruned",
    "shrink",
]

Tables = Mapping[str, LatencyTable]  # by component
Left = dict[Block, tuple[int, ...]]  # the units that stay, of blocks that lose some
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


def _silent(what: str, done: int, total: int) -> None:
    pass


def asks(recipe: Recipe) -> bool:
    """Whether the recipe makes any block narrower."""
    return bool(structured(recipe))


def needs_tables(recipe: Recipe) -> list[str]:
    """The components with a budget of latency for which the recipe names no table."""
    return [
        component
        for component, section in structured(recipe).items()
        if section.budget and section.budget.latency and not section.table
    ]


def check(
    recipe: Recipe, catalog: Catalog, tables: Tables | None = None
) -> dict[str, tuple[Fate, ...]]:
    """What becomes of each block, where all that can be refused without weights is.

    A budget of latency is looked at if there is a table.

    Raises:
        UsageError: recipe and model do not fit together, or a budget cannot be met.
        InputError: painting does not use a block that has to be seen at work.
    """
    planned = fates(recipe, catalog)
    check_calibration(_wanted(planned), recipe.calibration)
    for component, section in structured(recipe).items():
        if not (budget := section.budget):
            continue
        if costs := costs_of(component, budget.what, recipe, catalog, tables):
            check_budget(component, budget, costs, planned[component])
    return planned


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
    table = _table(component, recipe, tables)
    return latency_of(component, table) if table else None


def _table(component: str, recipe: Recipe, tables: Tables | None) -> LatencyTable | None:
    file = structured(recipe)[component].table
    return read_table(Path(file)) if file else (tables or {}).get(component)


def shrink(
    source: Bundle,
    recipe: Recipe,
    out: Path,
    *,
    tables: Tables | None = None,
    replace: bool = False,
    progress: Progress = _silent,
) -> Bundle:
    """Make the blocks of a weight bundle narrower, as its recipe's `structure` says, at `out`.

    `tables` are measured latencies, for budgets of latency whose recipe names no file. Where a
    criterion needs statistics the model paints the calibration prompts first; under `accelerate
    launch` all processes paint, and one writes.

    Raises:
        UsageError: the recipe does not fit the model, a budget cannot be met, or a table is
            missing.
        InputError: weights or activations are corrupt or not finite, or `out` exists.
    """
    catalog = read_catalog(source.path)
    planned = check(recipe, catalog, tables)
    refuse_pruned(source, recipe)
    if missing := [c for c in needs_tables(recipe) if c not in (tables or {})]:
        raise UsageError(
            f"{missing[0]}: a budget of latency needs a table of what widths cost; measure one "
            "with `sdcompress latency` and name it as 'table', or take a budget of macs"
        )
    if not replace:
        refuse_existing(out)
    statistics: Statistics = {}
    if needed := _wanted(planned):
        recipe = recipe.model_copy(update={"calibration": complete(source, recipe.calibration)})
        calibrator = Calibrator(source, recipe.calibration)
        statistics = calibrator.record(needed, progress=partial(progress, "calibrating"))
        del calibrator  # a model less in memory

    def write() -> None:
        judge = Judge(catalog, recipe.seed, statistics)
        removals = _judge_all(judge, planned, progress)
        settled = {c: _settle(c, recipe, catalog, tables, removals, f) for c, f in planned.items()}
        with staging(out, replace=replace) as work:
            plan, tensors, structures = _write(
                work, recipe, catalog, tables, judge, removals, settled, progress
            )
            told = {c: structure.model_dump(mode="json") for c, structure in structures.items()}
            linked = link_files(source, work)
            manifest = Manifest(
                stage="pruned",
                parent=source.digest,
                source=source.manifest.source,
                recipe=recipe.model_dump(mode="json", include=_decides(bool(needed))),
                tools=tool_versions(),
                plan=plan,
                tensors=tensors,
                details={RECORD: told},
            )
            seal(work, manifest, linked=linked)

    on_main_process(write)
    return Bundle.open(out)


def refuse_pruned(source: Bundle, recipe: Recipe) -> None:
    """Raise UsageError where zeros that somebody asked for would be forgotten."""
    plan = source.manifest.plan
    for component in structured(recipe):
        if plan and any(layer.pruned for layer in plan.of(component)):
            raise UsageError(
                f"{source.path}: expected a model without pruned weights in its {component}, found "
                "a bundle that has them; put 'structure' and 'rules' into one recipe, for the "
                "dense model"
            )


def _decides(calibrated: bool) -> dict[str, Any]:
    """The parts of a recipe that a narrower bundle depends on."""
    parts: dict[str, Any] = {"name": True, "seed": True, "prune": True}
    parts["sampling"] = {"height", "width"}
    return parts | ({"calibration": True} if calibrated else {})


def _wanted(planned: Mapping[str, Sequence[Fate]]) -> Wanted:
    """What has to be recorded to judge the blocks, and to make up for what they lose."""
    judged = [
        (fate.block, criterion)
        for several in planned.values()
        for fate in several
        if fate.rule and not fate.skipped_because
        for criterion in (fate.rule.criterion, *(["obs"] if fate.rule.refit else []))
    ]
    return wanted(judged)


def _judge_all(
    judge: Judge, planned: Mapping[str, Sequence[Fate]], progress: Progress
) -> dict[Block, Removal]:
    open_to = [f for several in planned.values() for f in several if not f.skipped_because]
    removals = {}
    for number, fate in enumerate(open_to, 1):
        removals[fate.block] = judge.order(fate)
        progress("judging blocks", number, len(open_to))
    return removals


def _settle(
    component: str,
    recipe: Recipe,
    catalog: Catalog,
    tables: Tables | None,
    removals: Mapping[Block, Removal],
    planned: Sequence[Fate],
) -> tuple[Fate, ...]:
    """The same fates, those that a budget decides on decided."""
    if not (budget := structured(recipe)[component].budget):
        return tuple(planned)
    costs = costs_of(component, budget.what, recipe, catalog, tables)
    assert costs
    losses = {block: removal.losses for block, removal in removals.items()}
    kept = spend(costs, budget.share, [f for f in planned if f.kept is None], losses)
    return tuple(replace_in(f, kept=kept.get(f.block, f.kept)) for f in planned)


def _write(
    work: Path,
    recipe: Recipe,
    catalog: Catalog,
    tables: Tables | None,
    judge: Judge,
    removals: Mapping[Block, Removal],
    settled: Mapping[str, Sequence[Fate]],
    progress: Progress,
) -> tuple[SparsityPlan, dict[str, dict[str, TensorRecord]], dict[str, ComponentStructure]]:
    """Write what changes; gives a plan and a record of every tensor, and what became of blocks."""
    narrow = narrowed(catalog, settled)
    total = sum(i.nbytes for hs in catalog.headers.values() for h in hs for i in h.tensors.values())
    done, tensors, structures = 0, {}, {}

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("cutting", done, total)

    for component in catalog.components:
        if not (several := settled.get(component)):
            tensors[component] = records_of(catalog, component, count)
            continue
        losing = [f for f in several if f.kept is not None and f.kept < f.block.units]
        left = {f.block: removals[f.block].kept(f.kept or 0, f.block.units) for f in losing}
        refitted = {
            f.block.consumer: judge.refit(f, left[f.block]) for f in losing if judge.refits(f)
        }
        tensors[component] = write_narrow(catalog, component, narrow, left, refitted, work, count)
        structures[component] = _record(
            component, recipe, catalog, narrow, tables, judge, several, left
        )
    # Single weights are another step's business.
    sections = {c: recipe.prune[c].model_copy(update={"rules": ()}) for c in settled}
    plan = make_plan(recipe.model_copy(update={"prune": sections}), narrow)
    removed = {c: catalog.parameters[c] - narrow.parameters[c] for c in settled}
    return plan.model_copy(update={"removed": removed}), tensors, structures


def _record(
    component: str,
    recipe: Recipe,
    catalog: Catalog,
    narrow: Catalog,
    tables: Tables | None,
    judge: Judge,
    several: Sequence[Fate],
    left: Left,
) -> ComponentStructure:
    section = structured(recipe)[component]
    macs = costs_of(component, "macs", recipe, catalog)
    assert macs
    units = {block: len(kept) for block, kept in left.items()}
    table = _table(component, recipe, tables)
    blocks = {}
    for fate in several:
        block, rule = fate.block, fate.rule
        kept = left.get(block, tuple(range(block.units)))
        blocks[block.name] = BlockRecord(
            kind=block.kind,
            unit=block.unit,
            width=block.width,
            kept=len(kept) * block.unit,
            asked=rule.ratio if rule else None,
            criterion=rule.criterion if rule and not rule.keep else None,
            refit=block in left and judge.refits(fate),
            removed=to_ranges(sorted(set(range(block.units)) - set(kept))),
        )
    return ComponentStructure(
        budget={section.budget.what: section.budget.share} if section.budget else None,
        parameters_dense=catalog.parameters[component],
        parameters=narrow.parameters[component],
        macs_dense=round(macs.total),
        macs=round(macs.total * macs.left(units)),
        latency=latency_of(component, table).left(units) if table else None,
        latency_table=table.sha256 if table else None,
        blocks=blocks,
    )
