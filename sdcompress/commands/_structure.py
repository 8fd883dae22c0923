"""What commands say and ask about blocks that become narrower."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from sdcompress.bundle import Bundle
    from sdcompress.latency import LatencyTable
    from sdcompress.recipe import Budget, Recipe

F = TypeVar("F", bound=Callable[..., Any])
_FORM = "[COMPONENT:]macs|params|latency=SHARE"


def budget_options(f: F) -> F:
    """What a component may still cost, and what tells its latency."""
    for option in (
        click.option(
            "--table",
            "tables",
            multiple=True,
            metavar="FILE",
            help="What widths take, measured by `sdcompress latency`; for a budget of latency.",
        ),
        click.option(
            "--budget",
            "budgets",
            multiple=True,
            metavar="[COMPONENT:]KIND=SHARE",
            help="Make blocks narrower until so much of the dense component is left: macs=0.7, "
            "params=0.7 or latency=0.75.  [default component: those whose blocks the recipe makes "
            "narrower, else the UNet]",
        ),
    ):
        f = option(f)
    return f


def with_budgets(recipe: Recipe, budgets: Iterable[str]) -> Recipe:
    """The recipe with these budgets in place of what it says of widths.

    Raises:
        UsageError: one of them is none, names no component, or a component has two.
    """
    from sdcompress.recipe import ComponentRecipe, Structure, StructureRule

    prune = dict(recipe.prune)
    named = [c for c, section in prune.items() if section.structure] or ["unet"]
    given: dict[str, str] = {}
    for text in budgets:
        components, budget = _parse(text, named)
        for component in components:
            if component in given:
                raise _refused(text, f"{component} has one already, {given[component]}; give one")
            given[component] = text
            section = prune.get(component) or ComponentRecipe(structure=Structure(budget=budget))
            rules = section.structure.rules if section.structure else (StructureRule(),)
            structure = Structure(
                budget=budget,
                table=section.structure.table
                if section.structure and budget.latency is not None
                else None,
                rules=tuple(rule.model_copy(update={"ratio": None}) for rule in rules),
            )
            prune[component] = section.model_copy(update={"structure": structure})
    return recipe.model_copy(update={"prune": prune})


def _parse(text: str, default: list[str]) -> tuple[list[str], Budget]:
    from pydantic import ValidationError

    from sdcompress.catalog import COMPONENTS
    from sdcompress.recipe import Budget, describe_first

    if not (match := re.fullmatch(r"(?:(.*):)?(\w+)=(.*)", text)):
        raise _refused(text, f"expected {_FORM}, such as macs=0.7 or unet:latency=0.75")
    component, kind, share = match[1], match[2], match[3]
    if component is not None and component not in COMPONENTS:
        raise _refused(
            text, f"expected a component among {', '.join(COMPONENTS)}, found {component!r}"
        )
    if kind not in Budget.model_fields:
        kinds = ", ".join(Budget.model_fields)
        raise _refused(text, f"expected one of {kinds}, found {kind!r}")
    try:
        return [component] if component else default, Budget.model_validate({kind: share})
    except ValidationError as e:
        raise _refused(text, describe_first(e, "budget")) from e


def _refused(text: str, why: str) -> Exception:
    from sdcompress.errors import UsageError

    return UsageError(f"--budget {text}: {why}")


def with_tables(recipe: Recipe, files: Iterable[str]) -> tuple[Recipe, dict[str, LatencyTable]]:
    """What the files say of each component; they come before what the recipe names.

    Raises:
        UsageError: a file is no latency table, or its component has no budget of latency.
    """
    from sdcompress.errors import UsageError
    from sdcompress.latency import read_table

    tables: dict[str, LatencyTable] = {}
    prune = dict(recipe.prune)
    for file in files:
        table = read_table(Path(file))
        section = prune.get(table.component)
        structure = section.structure if section else None
        if not (section and structure and structure.budget and structure.budget.latency):
            raise UsageError(
                f"--table {file}: is of {table.component}, which has no budget of latency; add "
                f"--budget {table.component}:latency=SHARE, or leave the table out"
            )
        if table.component in tables:
            raise UsageError(
                f"--table {file}: is of {table.component}, as is another; give one of them"
            )
        tables[table.component] = table
        structure = structure.model_copy(update={"table": None})
        prune[table.component] = section.model_copy(update={"structure": structure})
    return recipe.model_copy(update={"prune": prune}), tables


def measure_missing(
    source: Bundle, recipe: Recipe, tables: Mapping[str, LatencyTable], *, fresh: bool
) -> dict[str, LatencyTable]:
    """The tables, and those that budgets of latency still lack, measured here and now.

    They are measured once for a model, a backend and a machine, and kept in the cache; `fresh`
    measures them again.

    Raises:
        UsageError: the recipe's backend cannot time blocks here.
    """
    from sdcompress.calibrate import on_main_process
    from sdcompress.commands._common import told_progress
    from sdcompress.latency import read_table
    from sdcompress.shrink import needs_tables

    missing = [component for component in needs_tables(recipe) if component not in tables]
    made = dict(tables)
    for component in missing:
        file = _kept(source, recipe, component)

        def measure(component: str = component, file: Path = file) -> None:
            from export.latency import measure_latency
            from export.run import as_engines
            from sdcompress.bundle import write_text

            if file.is_file() and not fresh:
                return
            with told_progress("exporting") as progress:
                asked = as_engines(recipe, source)
                table = measure_latency(source, component, **asked, progress=progress)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, table.model_dump_json(indent=1) + "\n")

        on_main_process(measure)
        made[component] = read_table(file)
    return made


def _kept(source: Bundle, recipe: Recipe, component: str) -> Path:
    """Where a table is kept, by all that it depends on."""
    import hashlib
    from dataclasses import asdict

    from export.bench import machine
    from export.run import as_engines
    from sdcompress.bundle import runtime_versions, to_json, tool_versions
    from sdcompress.cache import cache_folder

    asked = as_engines(recipe, source)
    made_of = {
        "source": source.digest,
        "component": component,
        "asked": {**asked, "sizes": asdict(asked["sizes"])},
        "tools": {**tool_versions(), **runtime_versions()},
        "machine": machine(),
    }
    digest = hashlib.sha256(to_json(made_of).encode()).hexdigest()
    return cache_folder() / "latency" / f"{component}-{digest[:32]}.json"
