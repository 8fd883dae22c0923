"""`sdcompress generate`: pictures from weights or from an engine."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from sdcompress.commands._common import (
    GUIDANCE,
    counted_progress,
    emit,
    json_option,
    model_options,
    open_model,
    output_option,
    residency_option,
)

if TYPE_CHECKING:
    from export.residency import Residency


class Output(BaseModel):
    """`generate --json`; `pictures` in the order of the prompts."""

    pictures: list[str]
    steps: int
    guidance: float


@click.command()
@click.argument("bundle")
@click.option("--prompt", "prompts", multiple=True, required=True, help="Can be given repeatedly.")
@output_option
@click.option("--seed", type=int, default=0, show_default=True, help="Picture i uses seed + i.")
@click.option("--steps", type=click.IntRange(min=1))
@click.option("--guidance", type=GUIDANCE)
@click.option("--height", type=click.IntRange(min=8), help="Pixels.")
@click.option("--width", type=click.IntRange(min=8), help="Pixels.")
@residency_option
@model_options
@json_option
def command(
    bundle: str,
    prompts: tuple[str, ...],
    output: Path,
    seed: int,
    steps: int | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    residency: Residency,
    as_json: bool,
    **how: Any,
) -> None:
    """Make pictures with BUNDLE: an engine, a bundle of weights or any model source.

    The same prompt and seed start from the same noise in every one of them.

    \b
    Example:
      sdcompress generate mini-sd2 --prompt "a small blue square on a grey background" -o pictures
    """
    from sdcompress.bundle import staging
    from sdcompress.evaluation.images import check_request, save
    from sdcompress.models.defaults import sampling_defaults

    seeds = [seed + i for i in range(len(prompts))]
    check_request(prompts, seeds, 1 if steps is None else steps)
    make, source = _maker(bundle, how, residency)
    asked = {"steps": steps, "guidance": guidance, "height": height, "width": width}
    defaults = sampling_defaults(source)
    settings: dict[str, Any] = {k: defaults[k] if v is None else v for k, v in asked.items()}
    with staging(output) as work, counted_progress("making pictures") as progress:
        pictures = make(source.path, prompts, seeds, progress=progress, **settings)
        save(pictures, work, prompts, seeds, **settings)
    files = [str(output / f"{i:02d}.png") for i in range(len(prompts))]
    result = Output(pictures=files, steps=settings["steps"], guidance=settings["guidance"])
    emit(result, as_json, lambda console: console.print("\n".join(files)))


def _maker(bundle: str, how: Mapping[str, Any], residency: Residency) -> Any:
    """The function that makes pictures from this bundle, and the opened bundle."""
    from sdcompress.bundle import MANIFEST, Bundle
    from sdcompress.errors import UsageError

    path = Path(bundle)
    if (path / MANIFEST).is_file():
        opened = Bundle.open(path, stages=("source", "pruned", "tuned", "engine"))
        if opened.manifest.stage == "engine":
            from export.pipeline import generate

            return partial(generate, residency=residency), opened
    if residency != "resident":
        raise UsageError(f"--residency {residency} is for engines; {bundle} is none, leave it out")
    from sdcompress.evaluation.images import generate_from_weights

    return generate_from_weights, open_model(bundle, **how)
