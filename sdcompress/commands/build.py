"""`sdcompress build`: ONNX → engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from pydantic import BaseModel

from sdcompress.build_report import BuildReport
from sdcompress.commands._common import (
    Stopwatch,
    emit,
    json_option,
    output_option,
    stage_status,
)
from sdcompress.results import SparseKernels

if TYPE_CHECKING:
    from rich.console import Console

    from export.targets import Target


class Output(BaseModel):
    """`build --json`."""

    bundle: str
    digest: str
    parent: str
    backend: str
    providers: dict[str, str]
    sparse_kernels: SparseKernels
    report: BuildReport | None = None
    seconds: float


@click.command()
@click.argument("onnx", type=click.Path(path_type=Path))
@output_option
@click.option(
    "--backend", help="Without a target onnxruntime, else the first that serves it and works here."
)
@click.option("--target", help="The device it is for: `sdcompress list targets`, or a YAML file.")
@click.option("--height", type=int, help="Of the pictures, in pixels, where shapes are fixed.")
@click.option("--width", type=int, help="Of the pictures, in pixels, where shapes are fixed.")
@click.option("--images", type=click.IntRange(min=1), default=1, help="Pictures at once.")
@click.option(
    "--guidance/--no-guidance",
    default=None,
    help="Two branches, or one as distilled models want it.  [default: the model's own]",
)
@click.option(
    "--refit",
    type=click.Path(path_type=Path),
    metavar="ENGINE",
    help="Put the weights into this engine's plans instead. It must have been built with --option "
    "refit=true, and its zeros must be the same; target, sizes and options are its own.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the backend, such as provider=cuda; repeat a key for a list. "
    "An unknown key lists all there are.",
)
@json_option
def command(
    onnx: Path,
    output: Path,
    backend: str | None,
    target: str | None,
    height: int | None,
    width: int | None,
    images: int,
    guidance: bool | None,
    refit: Path | None,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Build an engine from an ONNX bundle.

    \b
    Examples:
      sdcompress build onnx -o engine --option provider=cpu
      sdcompress build onnx -o engine --backend tensorrt_rtx --target rtx-4090
    """
    from export.backends import load_backend
    from export.specs import Sizes
    from export.targets import load_target
    from sdcompress.bundle import Bundle
    from sdcompress.models.defaults import sampling_defaults

    watch = Stopwatch()
    wanted = parse_options(options)
    if refit and (
        backend or target or options or height or width or images > 1 or guidance is not None
    ):
        raise click.UsageError(
            "--refit takes the engine's own backend, target, sizes and options; leave them out"
        )
    device = load_target(target) if target else None
    name = backend or _serving(device)
    chosen = load_backend(name)
    source = Bundle.open(onnx, stages=("onnx",))
    if refit:
        from export.backends.tensorrt import refit as refit_engine

        engine = Bundle.open(refit, stages=("engine",))
        name = str(engine.manifest.details["backend"])
        with stage_status(f"refitting {refit}"):
            made = refit_engine(engine, source, output)
    else:
        chosen.check(wanted, device)
        if guidance is None:
            guidance = sampling_defaults(source)["guidance"] > 1
        sizes = Sizes(images, guidance, height, width)
        with stage_status(f"building with {name}") as tell:
            made = chosen.build(
                source,
                output,
                target=device,
                sizes=sizes,
                options=wanted,
                progress=lambda what, phase, done, of: tell(f"{what}: {phase}, {done} of {of}"),
            )
    result = Output(
        bundle=str(output),
        digest=made.digest,
        parent=source.digest,
        backend=name,
        providers=made.manifest.details["providers"],
        sparse_kernels=SparseKernels.model_validate(made.manifest.details["sparse_kernels"]),
        report=BuildReport.read(output),
        seconds=watch.seconds,
    )
    emit(result, as_json, lambda console: _show(console, result))


def _serving(target: Target | None) -> str:
    """The backend to use where none is named."""
    from export.backends import load_backend

    if target is None:
        return "onnxruntime"
    return next((b for b in target.backends if not load_backend(b).available()), target.backends[0])


def _show(console: Console, output: Output) -> None:
    from sdcompress.commands._tables import build_table

    kernels = output.sparse_kernels
    used = "an unknown number" if kernels.used is None else kernels.used
    console.print(
        f"{output.bundle} in {output.seconds:.0f} s; "
        f"{used} of {kernels.of} layers use sparse kernels ({kernels.how})"
    )
    if output.report:
        console.print(build_table(output.report))


def parse_options(options: tuple[str, ...]) -> dict[str, object]:
    """KEY=VALUE as a recipe would hold them; a key that is repeated has a list."""
    import yaml

    from sdcompress.recipe import read_value

    parsed: dict[str, object] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise click.BadParameter(f"expected KEY=VALUE, found {option!r}", param_hint="--option")
        try:
            one = read_value(value)
        except yaml.YAMLError as e:
            raise click.BadParameter(
                f"expected a word, a number or a YAML value after {key}=, found {value!r}",
                param_hint="--option",
            ) from e
        if key in parsed:
            before = parsed[key]
            parsed[key] = [*before, one] if isinstance(before, list) else [before, one]
        else:
            parsed[key] = one
    return parsed
