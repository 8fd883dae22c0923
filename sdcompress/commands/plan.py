"""`sdcompress plan`: what a recipe would do to a model, layer by layer; no weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from export.targets.fit import SparseCandidates
from sdcompress.commands._common import emit, json_option, model_options
from sdcompress.plan import Accounting, SparsityPlan
from sdcompress.recipe import Gates

if TYPE_CHECKING:
    from rich.console import Console


class Output(BaseModel):
    """`plan --json`; `sparse_candidates` and `warnings` speak of the target, if there is one.

    `gates` is null where the recipe sets no limits. `rounds` is what each of several rounds asks
    of the components pruned, as a fraction of all their parameters.
    """

    recipe: str
    model: str
    target: str | None = None
    warnings: tuple[str, ...] = ()
    sparse_candidates: SparseCandidates | None = None
    gates: Gates | None = None
    rounds: list[float] = []
    accounting: Accounting
    plan: SparsityPlan


@click.command()
@click.argument("recipe")
@click.option("--model", help="Instead of the recipe's model: mini-sd2, a directory, a hub id, ….")
@click.option(
    "--target", help="Instead of the recipe's target: a name from `list targets` or a YAML file."
)
@model_options
@click.option("--all", "show_all", is_flag=True, help="List biases and norms too.")
@json_option
def command(
    recipe: str,
    model: str | None,
    target: str | None,
    show_all: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Show what RECIPE prunes, how far, and what it skips and why.

    For a target, also what will not be there as the recipe hopes.

    \b
    Examples:
      sdcompress plan sd2-2to4 --model mini-sd2
      sdcompress plan sd2-2to4 --model mini-sd2 --target jetson-orin-nano
    """
    from export.pipeline import Geometry
    from export.targets import load_target
    from export.targets.fit import check_backend, sparse_candidates, warnings
    from sdcompress.allocation import foresee
    from sdcompress.catalog import read_catalog
    from sdcompress.models.sources import resolve
    from sdcompress.plan import account
    from sdcompress.recipe import load_recipe, model_of
    from sdcompress.rounds import asked_in_rounds, check_recipe

    loaded = load_recipe(recipe)
    name = model_of(loaded, model)
    wanted = target or loaded.target
    device = load_target(wanted) if wanted else None
    if device:
        check_backend(device, loaded.engine.backend)
    directory = resolve(name, **how).directory
    catalog = read_catalog(directory)
    made = foresee(check_recipe(loaded, catalog), loaded)
    output = Output(
        recipe=loaded.name,
        model=name,
        gates=loaded.gates if loaded.gates != Gates() else None,
        rounds=asked_in_rounds(loaded, catalog),
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


def _show(console: Console, output: Output, show_all: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from sdcompress.commands._tables import accounting_table

    table = Table(title=output.recipe, box=SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True)
    for heading in ("shape", "pattern", "criterion", "sparsity"):
        table.add_column(heading)
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
    console.print(table)
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
