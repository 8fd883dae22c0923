"""`sdcompress report`: the page of a run."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import BaseModel

from sdcompress.commands._common import emit, json_option


class Output(BaseModel):
    """`report --json`."""

    report: str


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@json_option
def command(directory: Path, as_json: bool) -> None:
    """Write DIRECTORY/report.html from what a run has left in DIRECTORY.

    The results.json there may also be one that the script of a device bundle has written.

    \b
    Example:
      sdcompress report out
    """
    from export.device_bundle import is_device_results, read_results
    from sdcompress.report import write_report

    file = directory / "results.json"
    results = read_results(file) if is_device_results(file) else None
    output = Output(report=str(write_report(directory, results)))
    emit(output, as_json, lambda console: console.print(output.report))
