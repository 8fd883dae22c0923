"""`sdcompress run`: every stage, from the model to the page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from sdcompress.commands._common import (
    Stopwatch,
    console,
    emit,
    json_option,
    model_options,
    open_model,
)


class Output(BaseModel):
    """`run --json`; `skipped` are the stages that were done before."""

    output: str
    report: str
    results: str | None
    device: str | None
    done: list[str]
    skipped: list[str]
    seconds: float


@click.command()
@click.argument("recipe")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="A run goes on there."
)
@click.option("--model", help="Instead of the recipe's model: mini-sd2, a directory, a hub id, ….")
@click.option(
    "--target", help="Instead of the recipe's target: a name from `list targets` or a YAML file."
)
@click.option("--fresh", is_flag=True, help="Do all stages again.")
@model_options
@json_option
def command(
    recipe: str,
    output: Path,
    model: str | None,
    target: str | None,
    fresh: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Prune, export, verify, build, picture, measure and report, as RECIPE says.

    RECIPE is a YAML file or the name of a shipped one. A run that was stopped goes on where it
    was; stages whose inputs have not changed are skipped.

    \b
    Example:
      sdcompress run edge -o out
    """
    from export.run import DEVICE, RESULTS, command_line, run
    from sdcompress.recipe import load_recipe, model_of

    watch = Stopwatch()
    loaded = load_recipe(recipe)
    if target:
        loaded = loaded.model_copy(update={"target": target})
    source = open_model(model_of(loaded, model), **how)
    stages: dict[bool, list[str]] = {False: [], True: []}
    people = console()
    with people.status("pruned") as status:

        def announce(stage: str, done_before: bool) -> None:
            stages[done_before].append(stage)
            note = "unchanged" if done_before else f"{watch.seconds:6.1f} s"
            people.print(f"[green]✓[/] {stage:<14} {note}")
            status.update("working")

        page = run(
            source,
            loaded,
            output,
            command=command_line(sys.argv[1:]),
            fresh=fresh,
            announce=announce,
            tell=status.update,
            warn=lambda what: people.print(f"warning: {what}", markup=False),
        )
    result = Output(
        output=str(output),
        report=str(page),
        results=_if_there(output / RESULTS),
        device=_if_there(output / DEVICE),
        done=stages[False],
        skipped=stages[True],
        seconds=watch.seconds,
    )

    from sdcompress.commands._tables import print_outcome

    emit(result, as_json, lambda c: print_outcome(c, output, page))


def _if_there(path: Path) -> str | None:
    return str(path) if path.exists() else None
