"""`sdcompress gate`: pass or fail against limits."""

from __future__ import annotations

import hashlib
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel, computed_field

from sdcompress.commands._common import F, emit, json_option
from sdcompress.errors import InputError, UsageError, VerificationError
from sdcompress.gate import TWINS
from sdcompress.recipe import Gates
from sdcompress.results import Check, Results

if TYPE_CHECKING:
    from rich.console import Console


class Output(BaseModel):
    """`gate --json`: the limits that held, and a check for each."""

    results: str
    limits: Gates
    by_median: bool
    checks: tuple[Check, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def _positive(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"expected a number above 0, found {value}", context, option)
    return value


def _limit(name: str, what: str) -> Callable[[F], F]:
    return click.option(name, type=float, callback=_positive, help=what)


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@_limit("--latency", "Time of a picture, sparse ÷ dense, at most.")
@_limit("--memory", "Peak memory, sparse ÷ dense, at most.")
@_limit("--size", "Engine files, sparse ÷ dense, at most.")
@_limit("--psnr", "Pictures, sparse against dense, at least, in dB.")
@click.option(
    "--sparse-layers", type=click.IntRange(min=0), help="Layers on sparse kernels, at least."
)
@click.option("--recipe", help="Take the limits not given here from the recipe's 'gates'.")
@click.option(
    "--quality-from",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Another results.json with the quality of the pictures; devices make none.",
)
@click.option(
    "--run",
    "made",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="The output of `run` whose engines or device.tar RESULTS must have measured.",
)
@click.option(
    "--median", "by_median", is_flag=True, help="Let medians pass, whatever their intervals say."
)
@json_option
def command(
    results: Path,
    recipe: str | None,
    quality_from: Path | None,
    made: Path | None,
    by_median: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Hold RESULTS against limits; exit code 3 and the reasons if they are not met.

    RESULTS is a results.json, of this machine or of a device, or the output directory of `run`,
    whose recipe then also gives the limits not given here.

    A ratio passes if the upper end of its interval is within the limit, so that noise cannot pass
    for speed; --median asks less. What was not measured, or cannot be trusted, has failed.

    \b
    Examples:
      sdcompress gate out
      sdcompress gate results.json --latency 0.95 --memory 1 --psnr 20
    """
    from sdcompress.gate import check_limits, gate
    from sdcompress.recipe import load_recipe

    file = results / "results.json" if results.is_dir() else results
    beside = results / "recipe.yaml"
    if recipe is None and results.is_dir() and beside.is_file():
        recipe = str(beside)
    from_recipe = load_recipe(recipe).gates.model_dump() if recipe else {}
    limits = Gates(**(from_recipe | {k: v for k, v in given.items() if v is not None}))
    check_limits(limits)
    found = _read(file)
    if made:
        _check_made(file, found, made)
    if quality_from:
        found = _with_quality(found, _read(quality_from), quality_from)
    output = Output(
        results=str(file),
        limits=limits,
        by_median=by_median,
        checks=gate(found, limits, by_median=by_median),
    )
    emit(output, as_json, lambda console: _show(console, output))
    if failed := [check.name for check in output.checks if not check.passed]:
        raise VerificationError(f"{file}: not met or unknown: {', '.join(failed)}")


def _read(file: Path) -> Results:
    """Results of this machine, or those a device has brought back."""
    from export.device_bundle import is_device_results, read_results

    bundle = file.parent / "device.tar"
    if not file.exists() and bundle.is_file():
        raise InputError(
            f"{file}: there is none, this run is measured on its device; run the script in "
            f"{bundle} there and give the results.json that it writes"
        )
    return read_results(file) if is_device_results(file) else Results.read(file)


def _check_made(file: Path, results: Results, run: Path) -> None:
    """Raises VerificationError: what was measured is not what lies in the output of a run."""
    from export.device_bundle import is_device_results
    from sdcompress.bundle import MANIFEST

    try:
        if is_device_results(file):
            measured = [json.loads(file.read_bytes())["bundle"]]
            made = [_manifest_of(run / "device.tar")]
        else:
            measured = [results.engines[twin].digest for twin in TWINS]
            made = [
                hashlib.sha256((run / "engine" / twin / MANIFEST).read_bytes()).hexdigest()
                for twin in TWINS
            ]
    except FileNotFoundError:
        made = []
    except (OSError, KeyError, tarfile.TarError) as error:
        raise InputError(
            f"{run}: its engines or its device.tar cannot be read ({error}); run it again"
        ) from error
    if measured != made:
        raise VerificationError(
            f"{file}: measured something else than what is in {run}; measure that"
        )


def _manifest_of(bundle: Path) -> str:
    """The digest that names a device bundle: that of its manifest."""
    with tarfile.open(bundle) as tar:
        member = tar.extractfile("manifest.json")
        return hashlib.sha256(member.read() if member else b"").hexdigest()


def _with_quality(results: Results, other: Results, file: Path) -> Results:
    """The results with the quality found in others of the same model and recipe."""
    about, said = ((r.model, r.recipe) for r in (results, other))
    if about != said:
        raise UsageError(
            f"{file}: is about {said[0]} with recipe {said[1]}, expected {about[0]} with "
            f"{about[1]}; give the results of the same run"
        )
    return results.model_copy(update={"quality": other.quality})


def _show(console: Console, output: Output) -> None:
    from rich.text import Text

    for check in output.checks:
        mark = Text("passed", "green") if check.passed else Text("FAILED", "red")
        console.print(mark, f"{check.name}: {check.detail}")
