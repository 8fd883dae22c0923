"""`sdcompress unpack`: packed file → the bundle it was made from."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import BaseModel

from sdcompress.commands._common import (
    Stopwatch,
    bytes_bar,
    emit,
    json_option,
    output_option,
    size,
)


class Output(BaseModel):
    """`unpack --json`. `digest` is that of the bundle, as `pack` printed it."""

    bundle: str
    digest: str
    stage: str
    files: int
    bytes: int
    seconds: float


@click.command()
@click.argument("packed", type=click.Path(path_type=Path))
@output_option
@json_option
def command(packed: Path, output: Path, as_json: bool) -> None:
    """Unpack PACKED, a file made by `sdcompress pack`, into a directory.

    Every file is checked against its digest before anything appears; a file that was damaged or
    made to do harm is refused.

    \b
    Example:
      sdcompress unpack model.sdz -o pruned
    """
    from sdcompress.packing import Pack, unpack

    watch = Stopwatch()
    with Pack(packed) as opened:
        total = sum(file.size for file in opened.index.files)
    with bytes_bar("unpacking", total) as progress:
        bundle = unpack(packed, output, progress=progress)
    result = Output(
        bundle=str(output),
        digest=bundle.digest,
        stage=bundle.manifest.stage,
        files=len(bundle.manifest.files),
        bytes=total,
        seconds=watch.seconds,
    )
    emit(
        result,
        as_json,
        lambda console: console.print(
            f"{output}: {result.files} files of the {result.stage} bundle, {size(result.bytes)}, "
            "all digests right"
        ),
    )
