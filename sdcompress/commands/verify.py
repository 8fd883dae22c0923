"""`sdcompress verify`: is the artefact what its manifest says?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdcompress.commands._common import emit, json_option, stage_status
from sdcompress.results import VerifyReport

if TYPE_CHECKING:
    from rich.console import Console

Output = VerifyReport


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The bundle it was made from: values must then agree bit for bit.",
)
@click.option("--no-parity", is_flag=True, help="Skip running the model in onnxruntime and torch.")
@json_option
def command(bundle: Path, against: Path | None, no_parity: bool, as_json: bool) -> None:
    """Check BUNDLE: digests, zeros against the plan, patterns by axis, dtypes, parity.

    Ends with exit code 3 if a check fails, and names the tensors.

    \b
    Example:
      sdcompress verify onnx --against pruned
    """
    from export.verify import verify_bundle
    from sdcompress.errors import VerificationError

    with stage_status("verifying"):
        report = verify_bundle(bundle, against=against, parity=not no_parity)
    emit(report, as_json, lambda console: _show(console, report))
    if not report.passed:
        failed = [c for c in report.checks if not c.passed]
        others = f"; failed, too: {', '.join(c.name for c in failed[1:])}" if failed[1:] else ""
        raise VerificationError(f"{bundle}: {failed[0].name} failed: {failed[0].detail}{others}")


def _show(console: Console, report: VerifyReport) -> None:
    from rich.text import Text

    for check in report.checks:
        mark = Text("passed", "green") if check.passed else Text("FAILED", "red")
        console.print(mark, f"{check.name}: {check.detail}")
        for name in check.tensors[:20]:
            console.print(f"       {name}")
