"""`sdcompress plan`: what a recipe would do to a model, layer by layer; no weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from export.targets.fit import SparseCandidates
from sdcompress.commands._common import emit, json_option, model_options
from sdcompress.commands._structure import budget_options
from sdcompress.plan import Accounting, SparsityPlan
from sdcompress.recipe import Gates

if TYPE_CHECKING:
    from rich.console import Console

    from sdcompress.catalog import Catalog
    from sdcompress.latency import LatencyTable
    from sdcompress.recipe import Recipe


class PlannedBlock(BaseModel):
    """What becomes of one block; `width` and `kept` count channels, which go `unit` at a time.

    `asked` is the share that the rule wants gone, `kept` what stays of it, a multiple of
    `multiple`. Either is null where a budget decides; `skipped_because` says why all of it stays.
    With `refit` what is behind the block is fitted anew.
    """

    name: str
    kind: str
    unit: int
    width: int
    multiple: int | None
    criterion: str | None
    refit: bool
    asked: float | None
    kept: int | None
    skipped_because: str | None


class PlannedStructure(BaseModel):
    """What becomes of a component's blocks; `macs` are of one sample in one step.

    What is left is null where a `budget` decides; `closest` is how far that could go, null where it
    takes a latency table to tell.
    """

    budget: dict[str, float] | None
    closest: float | None
    parameters_dense: int
    parameters: int | None
    macs_dense: int
    macs: int | None
    blocks: list[PlannedBlock]


class Output(BaseModel):
    """`plan --json`; `sparse_candidates` and `warnings` speak of the target, if there is one.

    `gates` is null where the recipe sets no limits. `rounds` is what each of several rounds asks
    of the components pruned, as a fraction of all their parameters. `structure` is what becomes of
    the blocks of each component, before its single weights are pruned.
    """

    recipe: str
    model: str
    target: str | None = None
    warnings: tuple[str, ...] = ()
    sparse_candidates: SparseCandidates | None = None
    gates: Gates | None = None
    rounds: list[float] = []
    structure: dict[str, PlannedStructure] = {}
    accounting: Accounting
    plan: SparsityPlan


@click.command()
@click.argument("recipe")
@click.option("--model", help="Instead of the recipe's model: mini-sd2, a directory, a hub id, ….")
@click.option(
    "--target", help="Instead of the recipe's target: a name from `list targets` or a YAML file."
)
@budget_options
@model_options
@click.option("--all", "show_all", is_flag=True, help="List biases and norms too.")
@json_option
def command(
    recipe: str,
    model: str | None,
    target: str | None,
    budgets: tuple[str, ...],
    tables: tuple[str, ...],
    show_all: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Show what RECIPE prunes, how far, and what it skips and why.

    Of blocks that are made narrower: what is asked, what that comes to, and what it saves. For a
    target, also what will not be there as the recipe hopes.

    \b
    Examples:
      sdcompress plan sd2-2to4 --model mini-sd2
      sdcompress plan sd2-2to4 --model mini-sd2 --target jetson-orin-nano
      sdcompress plan sd2-2to4 --model mini-sd2 --budget macs=0.7
    """
    from export.pipeline import Geometry
    from export.targets import load_target
    from export.targets.fit import check_backend, sparse_candidates, warnings
    from sdcompress.allocation import foresee
    from sdcompress.catalog import read_catalog
    from sdcompress.commands._structure import with_budgets, with_tables
    from sdcompress.models.sources import resolve
    from sdcompress.plan import account
    from sdcompress.recipe import load_recipe, model_of
    from sdcompress.rounds import asked_in_rounds, check_recipe

    loaded, given = with_tables(with_budgets(load_recipe(recipe), budgets), tables)
    name = model_of(loaded, model)
    wanted = target or loaded.target
    device = load_target(wanted) if wanted else None
    if device:
        check_backend(device, loaded.engine.backend)
    directory = resolve(name, **how).directory
    catalog = read_catalog(directory)
    made = foresee(check_recipe(loaded, catalog, given), loaded)
    output = Output(
        recipe=loaded.name,
        model=name,
        gates=loaded.gates if loaded.gates != Gates() else None,
        rounds=asked_in_rounds(loaded, catalog),
        structure=_structure(loaded, catalog, given),
        accounting=account(made),
        plan=made,
    )
    if device:
        native = Geometry.read(directory, "vae").default_size
        about_target = {
            "target": device.name,
            "warnings": warnings(device, loaded, made, native),
            "sparse_candidates": sparse_candidates(device, made),
        }
        output = output.model_copy(update=about_target)
    emit(output, as_json, lambda console: _show(console, output, show_all))


def _structure(
    recipe: Recipe, catalog: Catalog, tables: Mapping[str, LatencyTable]
) -> dict[str, PlannedStructure]:
    from sdcompress.shrink import check, closest, costs_of, narrowed

    fates = check(recipe, catalog, tables)
    left = narrowed(catalog, fates)
    planned = {}
    for component, several in fates.items():
        structure = recipe.prune[component].structure
        assert structure
        budget = structure.budget
        macs = costs_of(component, "macs", recipe, catalog)
        assert macs
        counted = budget and costs_of(component, budget.what, recipe, catalog, tables)
        known = {fate.block: fate.kept for fate in several if fate.kept is not None}
        settled = len(known) == len(several)
        planned[component] = PlannedStructure(
            budget={budget.what: budget.share} if budget else None,
            closest=closest(counted, several) if counted else None,
            parameters_dense=catalog.parameters[component],
            parameters=left.parameters[component] if settled else None,
            macs_dense=round(macs.total),
            macs=round(macs.total * macs.left(known)) if settled else None,
            blocks=[
                PlannedBlock(
                    name=fate.block.name,
                    kind=fate.block.kind,
                    unit=fate.block.unit,
                    width=fate.block.width,
                    multiple=fate.rule.multiple if fate.rule else None,
                    criterion=fate.rule.criterion if fate.rule else None,
                    refit=bool(fate.rule and fate.rule.refit),
                    asked=fate.rule.ratio if fate.rule else None,
                    kept=None if fate.kept is None else fate.kept * fate.block.unit,
                    skipped_because=fate.skipped_because,
                )
                for fate in several
            ],
        )
    return planned


def _show_structure(console: Console, component: str, structure: PlannedStructure) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=f"blocks of {component}", box=SIMPLE_HEAD)
    table.add_column("block", no_wrap=True)
    for heading in ("kind", "channels", "criterion", "asked to go", "stay"):
        table.add_column(heading)
    for block in structure.blocks:
        if block.skipped_because:
            name, channels = f"{component}.{block.name}", str(block.width)
            table.add_row(name, block.kind, channels, "", "", block.skipped_because, style="dim")
            continue
        gone = "by budget" if block.asked is None else f"{block.asked:.1%}"
        stay = (
            f"by budget, in steps of {math.lcm(block.unit, block.multiple or 1)}"
            if block.kept is None
            else f"{block.kept} ({1 - block.kept / block.width:.1%} go)"
        )
        how = f"{block.criterion}{', refit' if block.refit else ''}"
        table.add_row(f"{component}.{block.name}", block.kind, str(block.width), how, gone, stay)
    console.print(table)
    for what, before, after in (
        ("parameters", structure.parameters_dense, structure.parameters),
        ("MACs of a sample in a step", structure.macs_dense, structure.macs),
    ):
        now = "by budget" if after is None else f"{after:,} ({after / before:.1%})"
        console.print(f"{component}: {what} {before:,} → {now}")
    for what, share in (structure.budget or {}).items():
        least = (
            "how far that could go, a --table tells"
            if structure.closest is None
            else f"no less than {structure.closest:.1%} can be reached"
        )
        console.print(f"{component}: a budget of {share:.1%} of its {what}; {least}")


def _show(console: Console, output: Output, show_all: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from sdcompress.commands._tables import accounting_table

    table = Table(title=output.recipe, box=SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True)
    for heading in ("shape", "pattern", "criterion", "sparsity"):
        table.add_column(heading)
    for component, structure in output.structure.items():
        _show_structure(console, component, structure)
    pruned_components = {p.component for p in output.plan.layers if p.pruned}
    hidden = 0
    for p in output.plan.layers:
        shape = "×".join(map(str, p.shape))
        name = f"{p.component}.{p.name}"
        matrix = p.kind in ("linear", "conv", "embedding")
        if p.pruned:
            sparsity = p.sparsity if isinstance(p.sparsity, str) else f"{p.sparsity:.1%}"
            table.add_row(name, shape, p.pattern, p.criterion, sparsity)
        elif show_all or (matrix and p.component in pruned_components):
            table.add_row(name, shape, "dense", "", p.skipped_because, style="dim")
        else:
            hidden += 1
    if table.row_count:
        console.print(table)
        for component in (c for c, s in output.structure.items() if s.budget):
            console.print(f"{component}: shapes before its budget is spent")
    if hidden:
        console.print(
            f"{hidden} more tensors stay dense: biases, normalisation and components the recipe "
            "does not name (--all lists them)"
        )
    console.print(accounting_table(output.accounting))
    if output.rounds:
        steps = ", ".join(f"{asked:.1%}" for asked in output.rounds)
        console.print(f"in {len(output.rounds)} rounds, which ask for {steps} together")
    if (candidates := output.sparse_candidates) and candidates.of:
        console.print(
            f"{output.target}: {candidates.large_enough} of {candidates.of} 2:4 layers are large "
            "enough to be ever chosen (more than 256 channels in and out)"
        )
    for warning in output.warnings:
        console.print(Text("warning:", "yellow"), warning)
