"""`sdcompress sweep`: quality against sparsity, and where it falls off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from sdcompress import registry
from sdcompress.catalog import COMPONENTS
from sdcompress.commands._common import (
    Stopwatch,
    emit,
    json_option,
    model_options,
    open_model,
    phase_progress,
    picture_options,
)
from sdcompress.criteria import for_weights
from sdcompress.errors import SdcompressError, UsageError
from sdcompress.sweep.grid import PRESETS
from sdcompress.sweep.outcome import CurveCliff

if TYPE_CHECKING:
    from rich.console import Console

    from sdcompress.sweep.points import Point


class Output(BaseModel):
    """`sweep --json`; `table` is a CSV, `sweep` the JSON with all figures."""

    output: str
    report: str
    table: str
    sweep: str
    points: int
    failed: dict[str, str]
    cliffs: tuple[CurveCliff, ...]
    seconds: float


@click.command()
@click.argument("model")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="A sweep goes on there."
)
@click.option(
    "--component",
    metavar="LIST",
    help=f"Of {', '.join(COMPONENTS)} and both (text_encoder and unet alike).  "
    "[default: text_encoder,unet,both]",
)
@click.option(
    "--criterion",
    metavar="LIST",
    help=f"Of {', '.join(for_weights())}.  [default: magnitude]",
)
@click.option(
    "--pattern", metavar="LIST", help="unstructured and N:M, such as 2:4.  [default: unstructured]"
)
@click.option(
    "--sparsity",
    metavar="RANGE",
    help="FIRST:LAST:STEP or a list, for unstructured.  [default: 0.3:0.7:0.1]",
)
@click.option(
    "--scope",
    type=click.Choice(["all", "linear", "conv"]),
    help="Which layers are pruned.  [default: all]",
)
@click.option(
    "--allocation",
    type=click.Choice(registry.names("allocation")),
    help="How sparsity is spread over layers.  [default: uniform]",
)
@click.option("--preset", type=click.Choice(PRESETS), help="The grid of a published study.")
@click.option(
    "--points",
    "listed",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A YAML file with `points:`, a list; each has `parts: {COMPONENT: {criterion, pattern, "
    "sparsity, …}}`.",
)
@click.option(
    "--recipe", help="Whose seed, calibration and tuning every point has; its rules do not count."
)
@click.option(
    "--keep",
    multiple=True,
    metavar="METRIC=LIMIT",
    help="The tolerance that cliffs are found by, can be given repeatedly.  "
    "[default: clip_score=0.98, prompt_accuracy=0.95]",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="Can be given repeatedly; all that can run here if not given.",
)
@click.option("--samples", type=click.IntRange(min=2), help="Pictures a point.  [default: 400]")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts, one a line, instead of those that come with the model.",
)
@picture_options
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Points at a time on a machine (or, with --ray, on each GPU); cores are divided.",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Measure on this Ray cluster: auto, HOST:PORT or ray://HOST:PORT.",
)
@model_options
@json_option
def command(
    model: str,
    output: Path,
    preset: str | None,
    listed: Path | None,
    recipe: str | None,
    keep: tuple[str, ...],
    metrics: tuple[str, ...],
    samples: int | None,
    prompts: Path | None,
    jobs: int,
    address: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Prune MODEL in many ways, measure the pictures of each, and find where quality falls off.

    Points are every combination of component, criterion, pattern and sparsity; or those of a
    --preset, or of a file. A sweep that was stopped goes on where it was: points that are done are
    not measured again.

    \b
    Example:
      sdcompress sweep mini-sd2 -o sweep --component text_encoder --sparsity 0.5:0.8:0.1 \\
        --samples 32
    """
    from sdcompress.evaluation.quality import default_settings
    from sdcompress.models.prompts import read_prompts
    from sdcompress.recipe import load_recipe
    from sdcompress.sweep.points import refuse_foreign
    from sdcompress.sweep.run import PAGE, RESULTS, SWEEP, parse_keep, sweep

    watch = Stopwatch()
    grid_options = {name: options.pop(name) for name in _GRID}
    pictures = {name: options.pop(name) for name in _PICTURES}
    points = _points(preset, listed, grid_options)
    tolerance = parse_keep(keep)
    refuse_foreign(output)  # now, and not when the metrics are loaded
    base = load_recipe(recipe) if recipe else None
    texts = read_prompts(prompts) if prompts else None
    source = open_model(model, **options)
    settings = default_settings(source, samples, prompts=texts, metrics=metrics or None, **pictures)
    with phase_progress() as progress:
        found = sweep(
            source,
            points,
            settings,
            output,
            keep=tolerance,
            base=base,
            preset=preset,
            jobs=jobs,
            address=address,
            progress=progress,
        )
    result = Output(
        output=str(output),
        report=str(output / PAGE),
        table=str(output / RESULTS),
        sweep=str(output / SWEEP),
        points=len(found.points),
        failed={row.digest: row.failed for row in found.points if row.failed},
        cliffs=found.cliffs,
        seconds=watch.seconds,
    )
    emit(result, as_json, lambda console: _show(console, result))
    if not found.keep:
        click.echo(
            f"sdcompress: warning: no tolerance for {', '.join(settings.metrics)}, so no cliffs; "
            "repeat with --keep METRIC=LIMIT, points are not measured again",
            err=True,
        )
    if result.failed:
        first = next(iter(result.failed.values()))
        raise SdcompressError(
            f"{len(result.failed)} of {result.points} points failed ({first}); the same command "
            "tries them again, and nothing else"
        )


_GRID = ("component", "criterion", "pattern", "sparsity", "scope", "allocation")
_PICTURES = (
    *("seed", "steps", "guidance", "height", "width", "batch", "dtype"),
    *("clip", "real_images", "real_statistics", "inception_weights"),
)


def _points(preset: str | None, listed: Path | None, asked: dict[str, str | None]) -> list[Point]:
    from sdcompress.sweep import grid

    given = [f"--{name}" for name, value in asked.items() if value is not None]
    given = [*(["--preset"] if preset else []), *(["--points"] if listed else []), *given]
    if (preset or listed) and len(given) > 1:
        raise UsageError(f"{given[0]} says which points there are; leave out {given[1]}")
    if preset:
        return grid.preset(preset)
    if listed:
        return grid.read_points(listed)
    components, criteria, patterns = (
        tuple(word.strip() for word in (asked[name] or default).split(","))
        for name, default in (
            ("component", "text_encoder,unet,both"),
            ("criterion", "magnitude"),
            ("pattern", "unstructured"),
        )
    )
    return grid.grid(
        components,
        criteria,
        patterns,
        grid.parse_sparsities(asked["sparsity"] or "0.3:0.7:0.1"),
        asked["scope"] or "all",
        asked["allocation"] or "uniform",
    )


def _show(console: Console, output: Output) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from sdcompress.sweep.plot import label, labels

    if output.cliffs:
        headings = ("tolerance", "last within", "first beyond", "95 % interval")
        table = Table("where quality falls off", *headings, box=SIMPLE_HEAD)
        names = labels({found.curve for found in output.cliffs})
        for found in output.cliffs:
            cliff, name = found.cliff, names[found.curve]
            if cliff is None:
                table.add_row(name, label(found.metric), found.why_not)
                continue
            both = (cliff.last_within, cliff.first_beyond)
            ends = ("–" if end is None else f"{end:.4g}" for end in both)
            table.add_row(name, f"{label(found.metric)} {cliff.limit:g}", *ends, cliff.interval)
        console.print(table)
    console.print(f"table: {output.table}")
    console.print(f"page: {output.report}")
