"""`sdcompress pack`: bundle → the smallest file to ship."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from rich.console import Console

    from sdcompress.bundle import Bundle


class File(BaseModel):
    """The tensors of one file. `entropy_bytes` is what their order-0 entropy would take: of the
    zero positions (log2 6 bits a group of 2:4) and of each byte of the other values."""

    file: str
    tensors: int
    original_bytes: int
    packed_bytes: int
    entropy_bytes: int


class Output(BaseModel):
    """`pack --json`. `ratio` is packed to original, all files and the index counted."""

    packed: str
    bundle: str
    digest: str
    original_bytes: int
    packed_bytes: int
    ratio: float
    files: list[File]
    seconds: float


@click.command()
@click.argument("bundle")
@output_option
@json_option
def command(bundle: str, output: Path, as_json: bool) -> None:
    """Pack BUNDLE into one file, as small as its numbers allow; `unpack` gives it back bit for bit.

    Takes every bundle: weights, ONNX, engines; and every model that `prune` takes, of which only
    the files that a pipeline needs are packed.

    \b
    Example:
      sdcompress pack pruned -o model.sdz
    """
    from sdcompress.packing import pack

    watch = Stopwatch()
    source = _open(bundle)
    total = sum(record.size for record in source.manifest.files.values())
    with bytes_bar("packing", total) as progress:
        packed = pack(source, output, progress=progress)
    result = Output(
        packed=str(output),
        bundle=bundle,
        digest=packed.digest,
        original_bytes=packed.original_bytes,
        packed_bytes=packed.packed_bytes,
        ratio=packed.packed_bytes / packed.original_bytes,
        files=[File(**f.model_dump()) for f in packed.files],
        seconds=watch.seconds,
    )
    emit(result, as_json, lambda console: _show(console, result))


def _open(name: str) -> Bundle:
    from sdcompress.bundle import MANIFEST, Bundle
    from sdcompress.models.sources import resolve

    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        return Bundle.open(path)
    found = resolve(name)
    return Bundle.of_source(found.directory, found.source)


def _show(console: Console, result: Output) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("original", "packed", "ratio", "entropy", "above it"):
        table.add_column(column, justify="right")
    for f in result.files:
        row = _row(f"{f.file}: {f.tensors} tensors", f.original_bytes, f.packed_bytes)
        above = f.packed_bytes / f.entropy_bytes - 1 if f.entropy_bytes else 0
        table.add_row(*row, size(f.entropy_bytes), f"{above:.2%}")
    original = result.original_bytes - sum(f.original_bytes for f in result.files)
    packed = result.packed_bytes - sum(f.packed_bytes for f in result.files)
    table.add_row(*_row("everything else", original, packed), "", "")
    table.add_row(*_row("total", result.original_bytes, result.packed_bytes), "", "")
    console.print(table)
    console.print(f"{result.packed} in {result.seconds:.0f} s")


def _row(what: str, original: int, packed: int) -> tuple[str, ...]:
    ratio = f"{packed / original:.1%}" if original else ""
    return what, size(original), size(packed), ratio
