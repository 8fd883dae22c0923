"""`sdcompress latency`: what the widths of a component's blocks cost on a backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from pydantic import BaseModel

from sdcompress.catalog import COMPONENTS
from sdcompress.commands._common import (
    Stopwatch,
    emit,
    json_option,
    model_options,
    open_model,
    told_progress,
)
from sdcompress.latency import LatencyTable

if TYPE_CHECKING:
    from rich.console import Console


class Output(BaseModel):
    """`latency --json`: where the table was put, and the table."""

    file: str
    sha256: str
    table: LatencyTable
    seconds: float


@click.command()
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the table goes; it must not exist yet.",
)
@click.option(
    "--component",
    type=click.Choice(COMPONENTS),
    default="unet",
    show_default=True,
    help="Whose blocks are measured.",
)
@click.option("--backend", default="onnxruntime", show_default=True, help="What runs them.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the backend, such as provider=cuda; an unknown key lists all there are.",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp16", "fp32"]),
    default="fp32",
    show_default=True,
    help="As `export` has it: fp16 for GPUs; fp32 for CPUs.",
)
@click.option("--height", type=click.IntRange(min=8), help="Of the pictures, in pixels.")
@click.option("--width", type=click.IntRange(min=8), help="Of the pictures, in pixels.")
@click.option("--images", type=click.IntRange(min=1), default=1, help="Pictures at once.")
@click.option(
    "--guidance/--no-guidance",
    default=None,
    help="Two branches, or one as distilled models want it.  [default: the model's own]",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How often at least each width has its turn.",
)
@model_options
@json_option
def command(
    model: str,
    output: Path,
    component: str,
    backend: str,
    options: tuple[str, ...],
    dtype: Literal["fp16", "fp32"],
    height: int | None,
    width: int | None,
    images: int,
    guidance: bool | None,
    rounds: int,
    as_json: bool,
    **how: Any,
) -> None:
    """Measure how long the blocks of MODEL take at several widths, on this machine.

    The table tells `prune --table`, or `table:` in a recipe, what a budget of latency is spent on:
    neurons, heads and channels that save more time than others. Let nothing else run meanwhile.

    \b
    Example:
      sdcompress latency mini-sd2 -o unet.json
    """
    from export.latency import measure_latency
    from export.specs import Sizes
    from sdcompress.bundle import refuse_existing, write_text
    from sdcompress.commands.build import parse_options
    from sdcompress.models.defaults import sampling_defaults

    watch = Stopwatch()
    refuse_existing(output)
    wanted = parse_options(options)
    source = open_model(model, **how)
    if guidance is None:
        guidance = sampling_defaults(source)["guidance"] > 1
    with told_progress("exporting") as progress:
        table = measure_latency(
            source,
            component,
            backend=backend,
            options=wanted,
            sizes=Sizes(images, guidance, height, width),
            dtype=dtype,
            rounds=rounds,
            progress=progress,
        )
    write_text(output, table.model_dump_json(indent=1) + "\n")
    result = Output(file=str(output), sha256=table.sha256, table=table, seconds=watch.seconds)
    emit(result, as_json, lambda console: _show(console, result))


def _show(console: Console, output: Output) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    found = output.table
    shown = Table("block", "width", "ms", "its share", "at half", box=SIMPLE_HEAD)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, seconds in found.blocks.items():
        full = max(seconds)
        whole, half = seconds[full], found.seconds(name, full // 2)
        saved = f"{1 - half / whole:.0%} less" if whole else ""
        shown.add_row(name, str(full), f"{whole * 1e3:.3f}", f"{whole / found.total:.1%}", saved)
    console.print(shown)
    share = sum(seconds[max(seconds)] for seconds in found.blocks.values()) / found.total
    console.print(
        f"{found.component}: {found.total * 1e3:.2f} ms on {found.machine} ({found.backend}), "
        f"{share:.0%} of it in blocks that can become narrower"
    )
    console.print(f"{output.file} in {output.seconds:.0f} s")
