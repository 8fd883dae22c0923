"""`sdcompress prune`: model + recipe → pruned bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from sdcompress.commands._common import (
    Stopwatch,
    emit,
    json_option,
    model_options,
    open_model,
    output_option,
    phase_progress,
)
from sdcompress.plan import Accounting

if TYPE_CHECKING:
    from sdcompress.recipe import Recipe


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
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Calibrate with these prompts, one a line, instead of the recipe's or the model's own.",
)
@click.option(
    "--calibration-count",
    type=click.IntRange(min=1),
    help="Calibrate with so many prompts, the first ones.",
)
@output_option
@model_options
@json_option
def command(
    model: str,
    recipe: str,
    prompts: Path | None,
    calibration_count: int | None,
    output: Path,
    as_json: bool,
    **how: Any,
) -> None:
    """Prune MODEL: mini-sd2, a diffusers directory, HUB-ID@REVISION, a .safetensors checkpoint.

    The result is a diffusers directory with a manifest; diffusers loads it as it is. A criterion
    that looks at activations (wanda) has the model paint the calibration prompts first.

    \b
    Examples:
      sdcompress prune mini-sd2 --recipe sd2-2to4 -o pruned
      sdcompress prune mini-sd2 --recipe wanda.yaml --calibration-count 32 -o pruned
    """
    from sdcompress.calibrate import is_main_process
    from sdcompress.plan import account
    from sdcompress.prune import prune
    from sdcompress.recipe import load_recipe

    watch = Stopwatch()
    loaded = _with_prompts(load_recipe(recipe), prompts, calibration_count)
    source = open_model(model, **how)
    with phase_progress() as progress:
        bundle = prune(source, loaded, output, progress=progress)
    if not is_main_process():
        return
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


def _with_prompts(recipe: Recipe, file: Path | None, count: int | None) -> Recipe:
    """The recipe, calibrated with the prompts that the command line asks for."""
    from sdcompress.errors import UsageError
    from sdcompress.models.prompts import read_prompts
    from sdcompress.prune import decisive

    if file is None and count is None:
        return recipe
    if "calibration" not in decisive(recipe):
        raise UsageError(
            f"recipe {recipe.name}: none of its criteria looks at activations; leave out --prompts "
            "and --calibration-count, or choose a criterion that does"
        )
    prompts = read_prompts(file) if file else recipe.calibration.prompts
    if prompts and count:
        if count > len(prompts):
            raise UsageError(
                f"--calibration-count {count}: expected no more than the {len(prompts)} prompts "
                "given; ask for fewer, or give more"
            )
        prompts = prompts[:count]
    asked = {"prompts": prompts, "count": count or len(prompts) or recipe.calibration.count}
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=asked)})
