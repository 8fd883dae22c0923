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
from sdcompress.commands._structure import budget_options
from sdcompress.plan import Accounting
from sdcompress.structure import ComponentStructure

if TYPE_CHECKING:
    from sdcompress.recipe import Recipe


class Output(BaseModel):
    """`prune --json`; `notes` say what a person should know of how it was done.

    `structure` is what became of the blocks of each component whose blocks became narrower.
    """

    bundle: str
    digest: str
    parent: str
    accounting: Accounting
    structure: dict[str, ComponentStructure] = {}
    notes: list[str]
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
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False),
    help="Take gradients (taylor, snip, fisher) on the pictures of this folder; metadata.jsonl has "
    "their captions.",
)
@click.option(
    "--packages",
    type=click.IntRange(min=1),
    help="Calibrate and prune the layers in so many parts, each on what became of those before: "
    "more passes, less memory.  [default: the recipe's, else 1]",
)
@click.option(
    "--max-hessian",
    type=click.IntRange(min=1),
    help="Columns that a Conv's Hessian may have (sparsegpt, obs, obs_diff, obs_refit); above, "
    "each kernel position has one of its own.  [default: the recipe's, else 8192]",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="Prune a little more in each of so many rounds; 1 is all at once.",
)
@click.option(
    "--tune-steps",
    type=click.IntRange(min=1),
    help="With --rounds: tune for so many steps between rounds, otherwise as the recipe says.",
)
@budget_options
@click.option(
    "--fresh", is_flag=True, help="Begin anew, whatever earlier rounds and measurements have left."
)
@output_option
@model_options
@json_option
def command(
    model: str,
    recipe: str,
    prompts: Path | None,
    calibration_count: int | None,
    images: str | None,
    packages: int | None,
    max_hessian: int | None,
    rounds: int | None,
    tune_steps: int | None,
    budgets: tuple[str, ...],
    tables: tuple[str, ...],
    fresh: bool,
    output: Path,
    as_json: bool,
    **how: Any,
) -> None:
    """Prune MODEL: mini-sd2, a diffusers directory, HUB-ID@REVISION, a .safetensors checkpoint.

    The result is a diffusers directory with a manifest; diffusers loads it as it is, unless blocks
    were made narrower: then `sdcompress.load` does. Criteria that look at activations or gradients
    have the model paint the calibration prompts first. A budget of latency has it measured first,
    unless there is a --table. Rounds that are finished outlive a call that was killed, and are
    taken up when it is repeated.

    \b
    Examples:
      sdcompress prune mini-sd2 --recipe sd2-2to4 -o pruned
      sdcompress prune mini-sd2 --recipe wanda.yaml --calibration-count 32 -o pruned
      sdcompress prune mini-sd2 --recipe sd2-2to4 --rounds 2 --tune-steps 50 -o pruned
      sdcompress prune mini-sd2 --recipe sd2-2to4 --budget macs=0.7 -o pruned
    """
    from sdcompress.bundle import proving, refuse_existing
    from sdcompress.calibrate import is_main_process
    from sdcompress.commands._structure import measure_missing, with_budgets, with_tables
    from sdcompress.plan import account
    from sdcompress.prune import notes
    from sdcompress.recipe import load_recipe
    from sdcompress.rounds import check, prune_in_rounds
    from sdcompress.structure import read_record

    watch = Stopwatch()
    asked = {"images": images, "packages": packages, "max_hessian": max_hessian}
    loaded, given = with_tables(with_budgets(load_recipe(recipe), budgets), tables)
    loaded = _with_calibration(loaded, prompts, calibration_count, asked)
    loaded = _with_schedule(loaded, rounds, tune_steps)
    source = open_model(model, check_now=False, **how)
    refuse_existing(output)
    with proving(source):
        check(source, loaded, given)  # before anything is measured
        measured = measure_missing(source, loaded, given, fresh=fresh)
        with phase_progress() as progress:
            bundle = prune_in_rounds(
                source, loaded, output, tables=measured, fresh=fresh, progress=progress
            )
    if not is_main_process():
        return
    assert bundle.manifest.plan
    result = Output(
        bundle=str(output),
        digest=bundle.digest,
        parent=source.digest,
        accounting=account(bundle.manifest.plan),
        structure=read_record(bundle.manifest.details),
        notes=notes(bundle.manifest),
        seconds=watch.seconds,
    )

    from sdcompress.commands._tables import accounting_table, structure_table

    def show(console: Any) -> None:
        if result.structure:
            console.print(structure_table(result.structure))
        console.print(accounting_table(result.accounting))
        for note in result.notes:
            console.print(f"note: {note}")
        console.print(f"{output} in {result.seconds:.0f} s")

    emit(result, as_json, show)


def _with_calibration(
    recipe: Recipe, file: Path | None, count: int | None, more: dict[str, Any]
) -> Recipe:
    """The recipe, calibrated as the command line asks; `more` are fields of its calibration."""
    from sdcompress.errors import UsageError
    from sdcompress.models.prompts import read_prompts

    asked = {name: value for name, value in more.items() if value is not None}
    given = {"prompts": file, "calibration_count": count, **more}
    _refuse_unused(recipe, [name for name, value in given.items() if value is not None])
    if file is not None or count is not None:
        prompts = read_prompts(file) if file else recipe.calibration.prompts
        if prompts and count:
            if count > len(prompts):
                raise UsageError(
                    f"--calibration-count {count}: expected no more than the {len(prompts)} "
                    "prompts given; ask for fewer, or give more"
                )
            prompts = prompts[:count]
        asked["prompts"] = prompts
        asked["count"] = count or len(prompts) or recipe.calibration.count
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=asked)})


def _refuse_unused(recipe: Recipe, options: list[str]) -> None:
    """Raise UsageError for an option of the calibration that nothing in the recipe looks at."""
    from sdcompress.criteria import GRADIENTS, STATISTICS
    from sdcompress.errors import UsageError
    from sdcompress.prune import decisive, needed

    needs = needed(recipe)
    at_work = "calibration" in decisive(recipe)
    uses = {
        "prompts": ("activations or gradients", at_work),
        "calibration_count": ("activations or gradients", at_work),
        "images": ("gradients", bool(needs & GRADIENTS)),
        "packages": ("activations or gradients", bool(needs & STATISTICS)),
        "max_hessian": ("a Hessian", bool(needs & {"hessian", "step_hessian"})),
    }
    for option in options:
        what, used = uses[option]
        if not used:
            raise UsageError(
                f"recipe {recipe.name}: none of its criteria looks at {what}; leave out "
                f"--{option.replace('_', '-')}, or choose a criterion that does"
            )


def _with_schedule(recipe: Recipe, rounds: int | None, tune_steps: int | None) -> Recipe:
    """The recipe, pruned in the rounds that the command line asks for."""
    from sdcompress.recipe import Schedule, Tune

    schedule = recipe.schedule
    if rounds == 1:
        schedule = Schedule()
    elif rounds:
        schedule = schedule.model_copy(update={"rounds": rounds})
    if tune_steps:
        tune = schedule.tune or recipe.tune or Tune()
        tune = tune.model_copy(update={"steps": tune_steps})
        schedule = schedule.model_copy(update={"tune": tune})
    return recipe.model_copy(update={"schedule": schedule})
