"""`sdcompress prune`: model + recipe → pruned bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from sdcompress.commands._common import (
    Stopwatch,
    byte_progress,
    emit,
    json_option,
    model_options,
    open_model,
    output_option,
)
from sdcompress.plan import Accounting


class Output(BaseModel):
    """`prune --json`."""

    bundle: str
    digest: str
    parent: str
    accounting: Accounting
    seconds: float


@click.command()
@click.argument("model")
@click.option("--recipe", required=True, help="A YAML file, or the name of a shipped recipe.")
@output_option
@model_options
@json_option
def command(
    model: str,
    recipe: str,
    output: Path,
    as_json: bool,
    **how: Any,
) -> None:
    """Prune MODEL: mini-sd2, a diffusers directory, HUB-ID@REVISION, a .safetensors checkpoint.

    The result is a diffusers directory with a manifest; diffusers loads it as it is.

    \b
    Example:
      sdcompress prune mini-sd2 --recipe sd2-2to4 -o pruned
    """
    from sdcompress.plan import account
    from sdcompress.prune import prune
    from sdcompress.recipe import load_recipe

    watch = Stopwatch()
    loaded = load_recipe(recipe)
    source = open_model(model, **how)
    with byte_progress(source) as progress:
        bundle = prune(source, loaded, output, progress=progress)
    assert bundle.manifest.plan
    result = Output(
        bundle=str(output),
        digest=bundle.digest,
        parent=source.digest,
        accounting=account(bundle.manifest.plan),
        seconds=watch.seconds,
    )

    from sdcompress.commands._tables import accounting_table

    emit(result, as_json, lambda console: console.print(accounting_table(result.accounting)))
