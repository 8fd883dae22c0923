"""`sdcompress eval`: the pictures of a compressed model beside those of the dense one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdcompress import registry
from sdcompress.commands._common import (
    counted_progress,
    emit,
    json_option,
    model_options,
    open_model,
    picture_options,
)
from sdcompress.errors import UsageError
from sdcompress.evaluation.presets import PRESETS
from sdcompress.evaluation.quality import Quality

if TYPE_CHECKING:
    from rich.console import Console

    from sdcompress.bundle import Bundle
    from sdcompress.evaluation.quality import Estimate, MetricResult

Output = Quality


@click.command()
@click.argument("bundle")
@click.option("--against", "dense", required=True, help="The dense model it came from.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The quality.json.")
@click.option("--samples", type=click.IntRange(min=2), help="How many pictures.  [default: 400]")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="A text file, one a line, or COCO's captions (.json); else those of the model.",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    type=click.Choice(registry.names("evaluation/metrics")),
    help="Can be given repeatedly; without it, all that can run here.",
)
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), help="A study's protocol; says what it needs."
)
@picture_options
@click.option(
    "--keep-images",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the pictures here; those already there are used.",
)
@model_options
@json_option
def command(
    bundle: str,
    dense: str,
    output: Path | None,
    samples: int | None,
    prompts: Path | None,
    metrics: tuple[str, ...],
    preset: str | None,
    keep_images: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the picture quality of BUNDLE, a bundle of weights or any model source.

    It makes the same prompts from the same seeds as the dense model, which makes them again from
    other seeds: that is the floor. Intervals are of 95 %, bootstrapped over prompts. A repeated
    command goes on where a killed one stopped; `accelerate launch -m sdcompress eval …` shares the
    pictures among processes.

    \b
    Example:
      sdcompress eval out/pruned --against mini-sd2 -o quality.json
    """
    from sdcompress.bundle import MANIFEST, refuse_existing, refuse_inside, write_text
    from sdcompress.evaluation.presets import preset_settings, read_captions
    from sdcompress.evaluation.processes import processes
    from sdcompress.evaluation.quality import default_settings, evaluate, unavailable

    if keep_images:
        refuse_inside(keep_images)
    if output:
        refuse_existing(output)
        output.parent.mkdir(parents=True, exist_ok=True)  # now, and not when all is measured
    how = {key: options.pop(key) for key in ("config", "variant", "allow_pickle", "loras")}
    parent = open_model(dense, **how)
    # A bundle is taken as it is: what made it from the dense model was done when it was made.
    model = open_model(bundle, **({} if (Path(bundle) / MANIFEST).is_file() else how))
    given = read_captions(prompts) if prompts else None
    make_settings = partial(preset_settings, preset) if preset else default_settings
    settings = make_settings(parent, samples, prompts=given, metrics=metrics, **options)
    unable = {} if metrics or preset else unavailable(settings, parent)
    if options["clip"] and "clip_score" in unable:  # it was asked for
        raise UsageError(f"clip_score: {unable['clip_score']}")
    first = processes().is_main_process
    if first:
        _remark(model, parent)
    key = f"{model.digest}\n{parent.digest}\n{settings.model_dump_json()}"
    with _work(keep_images, output, key, remove=first) as work, _progress(first) as progress:
        quality = evaluate(model, parent, settings, work=work, unable=unable, progress=progress)
        if output and first:
            write_text(output, quality.model_dump_json(indent=1) + "\n")
    if first:
        emit(quality, as_json, lambda console: _show(console, quality, keep_images))


def _remark(model: Bundle, dense: Bundle) -> None:
    """Warn where the dense model is not that of the bundle: figures are of these two, then."""
    from sdcompress.errors import SdcompressError
    from sdcompress.tuning import check_lineage

    try:
        if model.manifest.plan is not None:
            check_lineage(model, dense)
        elif dense.manifest.plan is not None:
            raise UsageError(f"{dense.path}: is a {dense.manifest.stage} bundle, not a dense model")
    except SdcompressError as e:
        what = str(e).partition(";")[0]
        click.echo(f"sdcompress: warning: {what}; figures are of these two all the same", err=True)


@contextmanager
def _work(kept: Path | None, output: Path | None, key: str, *, remove: bool) -> Iterator[Path]:
    """Where the pictures lie: kept on request, else removed when all is measured."""
    from sdcompress.cache import cache_folder

    if kept:
        yield kept
        return
    if output:
        work = output.with_name(f".{output.name}.work")
    else:
        work = cache_folder() / "eval" / hashlib.sha256(key.encode()).hexdigest()[:32]
    yield work
    if remove:
        shutil.rmtree(work, ignore_errors=True)


def _progress(show: bool) -> AbstractContextManager[Callable[[int, int], None]]:
    return counted_progress("evaluating") if show else nullcontext(lambda done, total: None)


def _show(console: Console, quality: Quality, kept: Path | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    s = quality.settings
    title = f"{len(s.prompts)} prompts, {s.steps} steps, guidance {s.guidance:g}, seed {s.seed}"
    headings = ("", "better", "model", "dense", "difference", "floor", "says")
    table = Table(*headings, title=title, box=SIMPLE_HEAD)
    for column in table.columns[2:6]:
        column.justify = "right"
    for name, result in quality.metrics.items():
        parts = (result.model, result.dense, result.difference, result.floor)
        cells = (_estimate(part, result) for part in parts)
        unit = "" if result.unit == "1" else f" ({result.unit})"
        table.add_row(name + unit, result.better, *cells, _says(result))
    console.print(table)
    warnings = [(name, text) for name, r in quality.metrics.items() for text in r.warnings]
    for name, text in (*warnings, *(("", text) for text in quality.warnings)):
        console.print(Text(f"warning: {name}: {text}" if name else f"warning: {text}", "yellow"))
    if kept:
        console.print(f"pictures: {kept / 'pictures'}")
    for name, why in quality.unavailable.items():
        console.print(f"not measured: {name}: {why}")


def _estimate(estimate: Estimate | None, result: MetricResult) -> str:
    if estimate is None:
        return ""
    digits = 2 if result.unit == "dB" else 4
    value, low, high = (f"{x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _says(result: MetricResult) -> str:
    d = result.difference
    if d is None:
        return ""
    if d.low <= 0 <= d.high:
        return "no difference"
    return "better" if (d.value > 0) == (result.better == "higher") else "worse"
