"""Neurons, heads and channels that go as a whole: weight bundle → narrower weight bundle.

What a block loses is chosen by a criterion summed over each of its units, or by how well the layer
behind it does without them; how much, by a ratio, or by a budget for the component. What comes out
is a model of the same parts under the same names, with smaller tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sdcompress.bundle import (
    Bundle,
    Manifest,
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
from sdcompress.recipe import Recipe
from sdcompress.shrink._budget import Tables, check_budget, closest, costs_of
from sdcompress.shrink._importance import wanted
from sdcompress.shrink._narrowing import Narrowing, Progress
from sdcompress.shrink._plan import Fate, fates, narrowed, structured

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
        narrowing = Narrowing(recipe, catalog, tables or {}, statistics, progress)
        settled = narrowing.settle(planned)
        with staging(out, replace=replace) as work:
            made = narrowing.write(work, settled)
            linked = link_files(source, work)
            manifest = Manifest(
                stage="pruned",
                parent=source.digest,
                source=source.manifest.source,
                recipe=recipe.model_dump(mode="json", include=_decides(bool(needed))),
                tools=tool_versions(),
                plan=made.plan,
                tensors=made.tensors,
                details=made.details,
            )
            seal(work, manifest, known=linked)

    on_main_process(write)
    return Bundle.open(out)


def refuse_pruned(source: Bundle, recipe: Recipe) -> None:
    """Raise UsageError where zeros that somebody asked for would be forgotten."""
    plan = source.outline.plan
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
