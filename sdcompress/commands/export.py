"""`sdcompress export`: weights → ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from pydantic import BaseModel

from sdcompress.commands._common import (
    GUIDANCE,
    Stopwatch,
    byte_progress,
    counted_progress,
    emit,
    json_option,
    model_options,
    open_model,
    output_option,
    size,
)

if TYPE_CHECKING:
    from rich.console import Console

    from export.ranges import Ranges
    from sdcompress.bundle import Bundle

# Bright and dark, empty and full: what a model is asked for where nobody says.
PROMPTS = (
    "a photo of a cat asleep on a red sofa",
    "snowy mountains under a bright midday sun",
    "a dark street at night, neon signs, rain",
    "portrait of an old sailor, oil painting",
    "a bowl of fruit on a white table",
    "a crowded market seen from above",
    "an astronaut on the moon, high contrast",
    "a page of handwriting in black ink",
)


class Output(BaseModel):
    """`export --json`; `bytes` of each component's graph and weights together.

    `kept_fp32`: of each component the layers computed in fp32 because their numbers left fp16.
    """

    bundle: str
    digest: str
    parent: str
    dtype: str
    upcast_attention: bool
    kept_fp32: dict[str, list[str]]
    bytes: dict[str, int]
    seconds: float


@click.command()
@click.argument("bundle")
@output_option
@click.option(
    "--dtype",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="fp16 for GPUs; fp32 for CPUs.",
)
@click.option(
    "--upcast-attention",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Attention scores in fp32; auto: where the model's config asks for it (SD 2.1, 768 px).",
)
@click.option(
    "--calibrate",
    type=click.IntRange(min=0),
    metavar="N",
    help="Make N pictures first, to find and keep in fp32 the layers that leave fp16's range.",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="What --calibrate makes, repeatable; given alone, it makes a picture of each.",
)
@click.option("--steps", type=click.IntRange(min=1), help="For --calibrate.")
@click.option("--guidance", type=GUIDANCE, help="For --calibrate; 0 for distilled models.")
@click.option(
    "--keep-fp32",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The ranges.json of another export, so that both keep the same layers in fp32.",
)
@model_options
@json_option
def command(
    bundle: str,
    output: Path,
    dtype: Literal["fp16", "fp32"],
    upcast_attention: Literal["auto", "on", "off"],
    calibrate: int | None,
    prompts: tuple[str, ...],
    steps: int | None,
    guidance: float | None,
    keep_fp32: Path | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Export BUNDLE, or any model source, to ONNX with free batch, height and width.

    The result is laid out as optimum's ORT pipelines load it. The first export of an architecture
    traces it, which takes a while; its graphs are kept in `graphs` in the cache folder, and from
    then on weights are only filled in.

    \b
    Example:
      sdcompress export mini-sd2 -o onnx --dtype fp32
    """
    from export.to_onnx import export_bundle
    from sdcompress.bundle import proving, refuse_existing
    from sdcompress.errors import UsageError

    watch = Stopwatch()
    pictures = len(prompts) if calibrate is None else calibrate
    if dtype == "fp32" and (pictures or keep_fp32):
        raise UsageError(
            "fp32 has range enough; leave out --calibrate and --keep-fp32, or use fp16"
        )
    if not pictures and (steps is not None or guidance is not None):
        raise UsageError("--steps and --guidance are for --calibrate; give it a number of pictures")
    refuse_existing(output)
    ranges = _read(keep_fp32)
    source = open_model(bundle, check_now=False, **how)
    with proving(source):
        if pictures:
            chosen = [(prompts or PROMPTS)[i % len(prompts or PROMPTS)] for i in range(pictures)]
            found = _calibrate(source, chosen, steps, guidance)
            ranges = ranges.merge(found) if ranges else found
        with byte_progress(source) as progress:
            made = export_bundle(
                source,
                output,
                dtype=dtype,
                upcast_attention=upcast_attention,
                keep_fp32=ranges,
                progress=progress,
            )
    sizes: dict[str, int] = {}
    for name, record in made.manifest.files.items():
        component = name.partition("/")[0]
        if ".onnx" in name:
            sizes[component] = sizes.get(component, 0) + record.size
    result = Output(
        bundle=str(output),
        digest=made.digest,
        parent=source.digest,
        dtype=dtype,
        upcast_attention=made.manifest.details["upcast_attention"],
        kept_fp32=made.manifest.details["kept_fp32"],
        bytes=sizes,
        seconds=watch.seconds,
    )

    def show(console: Console) -> None:
        for component, nbytes in result.bytes.items():
            console.print(f"{component}: {size(nbytes)} {dtype}")
        if result.upcast_attention:
            console.print("unet: attention scores in fp32")
        for component, layers in result.kept_fp32.items():
            console.print(f"{component}: {len(layers)} layers in fp32, beyond fp16's range:")
            for layer in layers:
                console.print(f"  {layer}")
        if ranges and not result.kept_fp32:
            console.print("no layer left fp16's range")
        console.print(f"{output} in {result.seconds:.0f} s")

    emit(result, as_json, show)


def _read(file: Path | None) -> Ranges | None:
    from export.ranges import Ranges

    return Ranges.read(file) if file else None


def _calibrate(
    source: Bundle, prompts: list[str], steps: int | None, guidance: float | None
) -> Ranges:
    from export.ranges import record_ranges
    from sdcompress.models.defaults import sampling_defaults

    settings = sampling_defaults(source)
    asked = {"steps": steps, "guidance": guidance}
    settings |= {name: value for name, value in asked.items() if value is not None}
    with counted_progress("calibrating") as progress:
        return record_ranges(source, prompts=prompts, progress=progress, **settings)
