"""`sdcompress plan`: what a recipe would do to a model, layer by layer; no weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from sdcompress.commands._common import emit, json_option, model_options
from sdcompress.plan import Accounting, SparsityPlan

if TYPE_CHECKING:
    from rich.console import Console


class Output(BaseModel):
    """`plan --json`."""

    recipe: str
    model: str
    accounting: Accounting
    plan: SparsityPlan


@click.command()
@click.argument("recipe")
@click.option("--model", help="Instead of the recipe's model: mini-sd2, a directory, a hub id, ….")
@model_options
@click.option("--all", "show_all", is_flag=True, help="List biases and norms too.")
@json_option
def command(
    recipe: str,
    model: str | None,
    show_all: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Show what RECIPE prunes, how far, and what it skips and why.

    \b
    Example:
      sdcompress plan sd2-2to4 --model mini-sd2
    """
    from sdcompress.catalog import read_catalog
    from sdcompress.models.sources import resolve
    from sdcompress.plan import account, make_plan
    from sdcompress.recipe import load_recipe, model_of

    loaded = load_recipe(recipe)
    name = model_of(loaded, model)
    made = make_plan(loaded, read_catalog(resolve(name, **how).directory))
    output = Output(recipe=loaded.name, model=name, accounting=account(made), plan=made)
    emit(output, as_json, lambda console: _show(console, output, show_all))


def _show(console: Console, output: Output, show_all: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

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
