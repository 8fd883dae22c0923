"""`sdcompress search`: the most sparsity that keeps a budget of quality."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from sdcompress.catalog import COMPONENTS
from sdcompress.commands._common import (
    Finite,
    Stopwatch,
    emit,
    json_option,
    model_options,
    open_model,
    picture_options,
    size,
    stage_status,
)
from sdcompress.criteria import for_weights
from sdcompress.errors import VerificationError
from sdcompress.evaluation.quality import QualitySettings
from sdcompress.search import Found

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.table import Table

    from sdcompress.search.bisect import Line

SAMPLES = 200


class Output(BaseModel):
    """`search --json`: the recipe that was written, if any, and everything that was measured.

    `work` holds the measured points and their pictures, for a search that goes on or another one.
    """

    recipe: str | None
    model: str
    settings: QualitySettings
    found: Found
    work: str
    seconds: float


@click.command()
@click.argument("model")
@click.option(
    "--keep",
    multiple=True,
    metavar="METRIC=LIMIT",
    help="The budget, once a metric: clip_score=0.98 of the dense model's, psnr=20 dB, ….",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The recipe, a YAML file that `run` takes; it must not exist yet.",
)
@click.option(
    "--component",
    "components",
    multiple=True,
    type=click.Choice(COMPONENTS),
    help="What may be pruned; text_encoder and unet if not given.",
)
@click.option(
    "--criterion",
    type=click.Choice(for_weights()),
    default="magnitude",
    show_default=True,
    help="What says which weights go.",
)
@click.option(
    "--scope",
    type=click.Choice(["all", "linear", "conv"]),
    default="all",
    show_default=True,
    help="Which layers are pruned.",
)
@click.option(
    "--pattern", default="unstructured", hidden=True, help="N:M has nothing to search for."
)
@click.option(
    "--most",
    type=click.Choice(["sparsity", "macs", "bytes"]),
    default="sparsity",
    show_default=True,
    help="What is best: the most zeros, the fewest multiply-accumulates, the smallest pack.",
)
@click.option(
    "--resolution",
    type=Finite(min=0, min_open=True, max=0.5),
    default=0.01,
    show_default=True,
    help="The step of sparsity.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    help=f"Pictures a point; {SAMPLES}, or all of --prompts, if not given.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts, one a line, instead of those that come with the model.",
)
@picture_options
@click.option(
    "--median", "by_value", is_flag=True, help="Let figures hold, whatever their intervals say."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where measured points are kept; a hidden folder beside the output if not given.",
)
@model_options
@json_option
def command(
    model: str,
    keep: tuple[str, ...],
    output: Path,
    components: tuple[str, ...],
    pattern: str,
    samples: int | None,
    prompts: Path | None,
    work: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the most that MODEL can be pruned within a budget of quality; the outcome is a recipe.

    First each component alone, by bisection on the point where quality falls off, then together. A
    limit holds if the worse end of its 95 % interval is within it; --median asks less. Quality is
    taken to fall as sparsity grows; the answer and the step above it were both measured.

    A search that was stopped goes on where it was.

    \b
    Example:
      sdcompress search mini-sd2 --keep prompt_accuracy=0.9 --keep psnr=20 -o recipe.yaml
    """
    from export.run import command_line
    from sdcompress.bundle import refuse_existing, write_text
    from sdcompress.evaluation.quality import default_settings
    from sdcompress.models.prompts import read_prompts
    from sdcompress.search import Request, recipe_text, refuse_fixed, search
    from sdcompress.search.budget import parse_budget

    watch = Stopwatch()
    asked = {key: options.pop(key) for key in ("criterion", "scope", "most", "resolution")}
    pictures = {key: options.pop(key) for key in _PICTURES}
    request = Request(
        components=tuple(dict.fromkeys(components)) or ("text_encoder", "unet"),
        budget=parse_budget(keep),
        by_value=options.pop("by_value"),
        **asked,
    )
    refuse_fixed(pattern)
    refuse_existing(output)
    texts = read_prompts(prompts) if prompts else None
    source = open_model(model, **options)
    settings = default_settings(
        source,
        samples or (len(texts) if texts else SAMPLES),
        prompts=texts,
        metrics=list(request.budget),
        **pictures,
    )
    output.parent.mkdir(parents=True, exist_ok=True)  # now, and not when all is measured
    work = work or output.with_name(f".{output.name}.search")
    with stage_status("searching") as status:
        doing = ""

        def announce(what: str) -> None:
            nonlocal doing
            doing = what
            status(what)

        found = search(
            source,
            request,
            settings,
            work,
            announce=announce,
            progress=lambda done, total: status(f"{doing}: {done} of {total}"),
        )
    if found.answer:
        text = recipe_text(
            found,
            settings,
            model=model,
            name=re.sub(r"[^A-Za-z0-9._-]", "-", output.stem).strip("._-") or "search",
            prompts=settings.prompts if texts else None,
            run=_run_line(output, options),
            made_by=command_line(sys.argv[1:]),
        )
        write_text(output, text)
    result = Output(
        recipe=str(output) if found.answer else None,
        model=source.digest,
        settings=settings,
        found=found,
        work=str(work),
        seconds=watch.seconds,
    )
    emit(result, as_json, lambda console: _show(console, result))
    if not found.answer:
        raise VerificationError(_nothing(found))


_PICTURES = (
    *("seed", "steps", "guidance", "height", "width", "batch", "dtype"),
    *("clip", "real_images", "real_statistics", "inception_weights"),
)


def _run_line(recipe: Path, how: dict[str, Any]) -> str:
    """The command that runs the recipe, with the options that say how the model is taken in."""
    line = ["sdcompress", "run", recipe.name, "-o", "out"]
    for name, value in how.items():
        if value is True:
            line.append(f"--{name.replace('_', '-')}")
        elif isinstance(value, str):
            line += [f"--{name}", value]
        elif value:
            for one in value:
                line += ["--lora", one]
    return shlex.join(line)


def _nothing(found: Found) -> str:
    """Why there is no recipe, in one line."""
    from sdcompress.search import closest
    from sdcompress.search.bisect import describe
    from sdcompress.search.budget import in_words

    nearest = closest(found)
    left = [(metric, kept) for metric, kept in nearest.kept.items() if not kept.holds]
    words = "; ".join(in_words(metric, kept) for metric, kept in left)
    fix = "ask for less, or look closer with a smaller --resolution"
    if all(kept.value_holds for _, kept in left):
        fix = "the figures hold and their intervals do not: take more --samples, or --median"
    return (
        f"even a sparsity of {found.request.resolution:g} leaves the budget: closest was "
        f"{describe(nearest.sparsity)} with {words}; {fix}"
    )


def _show(console: Console, output: Output) -> None:
    found = output.found
    console.print(_table(found))
    console.print(
        f"measured points: {len(found.outcome.trail)}, of {len(output.settings.prompts)} prompts; "
        f"limits hold by {'the figure' if found.request.by_value else 'the interval'}; MACs are "
        "those of a picture that are not by a zero"
    )
    for sentence in found.outcome.contradictions:
        console.print(f"quality does not fall steadily: {sentence}; more --samples would tell more")
    for warning in found.warnings:
        console.print(f"warning: {warning}")
    console.print(f"kept in {output.work}, for other budgets; remove it when you are done")
    if output.recipe:
        console.print(f"recipe: {output.recipe}")


def _table(found: Found) -> Table:
    """A row for the end of every line, the answer in bold."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    components, dense = found.request.components, found.dense
    lines = (*found.outcome.alone.values(), *found.outcome.together)
    limits = [f"{m}, at {k.at} {k.limit:g}" for m, k in found.outcome.trail[0].kept.items()]
    table = Table("", *components, "zeros", "MACs", "packed", *limits, box=SIMPLE_HEAD)
    nothing = ["0"] * len(components)
    table.add_row("dense", *nothing, "0.0%", "1.000", size(dense.bytes), *["–"] * len(limits))
    for line in lines:
        best = found.answer is not None and line.end == found.answer.trial
        table.add_row(*_row(line, found), style="bold" if best else None)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _row(line: Line, found: Found) -> Iterator[str]:
    """What a line ends with; where nothing on it holds, its first step and what that leaves."""
    shown = line.end or line.beyond
    assert shown is not None  # a line has at least one step
    cost = next((c.cost for c in found.candidates if c.trial == line.end), None)
    yield line.name if line.end else f"{line.name}: too much"
    for component in found.request.components:
        yield f"{shown.sparsity.get(component, 0):g}"
    if cost and cost.accounting:
        yield f"{cost.accounting.pipeline.of_component:.1%}"
        yield f"{cost.macs / found.dense.macs:.3f}"
        yield size(cost.bytes)
    else:
        yield from ("–", "–", "–")
    for kept in shown.kept.values():
        yield f"{kept.value:.4g} [{kept.low:.4g}, {kept.high:.4g}]"
