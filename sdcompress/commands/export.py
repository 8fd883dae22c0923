"""`sdcompress export`: weights → ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    size,
)

if TYPE_CHECKING:
    from rich.console import Console


class Output(BaseModel):
    """`export --json`; `bytes` of each component's graph and weights together."""

    bundle: str
    digest: str
    parent: str
    dtype: str
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
@model_options
@json_option
def command(
    bundle: str,
    output: Path,
    dtype: Literal["fp16", "fp32"],
    as_json: bool,
    **how: Any,
) -> None:
    """Export BUNDLE, or any model source, to ONNX with free batch, height and width.

    The result is laid out as optimum's ORT pipelines load it.

    \b
    Example:
      sdcompress export mini-sd2 -o onnx --dtype fp32
    """
    from export.to_onnx import export_bundle

    watch = Stopwatch()
    source = open_model(bundle, **how)
    with byte_progress(source) as progress:
        made = export_bundle(source, output, dtype=dtype, progress=progress)
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
        bytes=sizes,
        seconds=watch.seconds,
    )

    def show(console: Console) -> None:
        for component, nbytes in result.bytes.items():
            console.print(f"{component}: {size(nbytes)} {dtype}")
        console.print(f"{output} in {result.seconds:.0f} s")

    emit(result, as_json, show)
