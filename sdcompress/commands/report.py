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
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Instead of the results.json there, such as what a device has measured.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Instead of DIRECTORY/report.html."
)
@json_option
def command(directory: Path, results: Path | None, output: Path | None, as_json: bool) -> None:
    """Write DIRECTORY/report.html from what a run has left in DIRECTORY.

    The results.json there may also be one that the script of a device bundle has written.

    \b
    Examples:
      sdcompress report out
      sdcompress report out --results from-the-device.json -o device.html
    """
    from export.device_bundle import is_device_results, read_results
    from sdcompress.report import write_report
    from sdcompress.results import Results

    file = results or directory / "results.json"
    found = read_results(file) if is_device_results(file) else None
    if results and not found:
        found = Results.read(results)
    written = Output(report=str(write_report(directory, found, output)))
    emit(written, as_json, lambda console: console.print(written.report))
