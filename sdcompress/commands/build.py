"""`sdcompress build`: ONNX → engine."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import BaseModel

from sdcompress.commands._common import (
    Stopwatch,
    emit,
    json_option,
    output_option,
    stage_status,
)
from sdcompress.results import SparseKernels


class Output(BaseModel):
    """`build --json`."""

    bundle: str
    digest: str
    parent: str
    backend: str
    sparse_kernels: SparseKernels
    seconds: float


@click.command()
@click.argument("onnx", type=click.Path(path_type=Path))
@output_option
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the backend, such as provider=cuda.",
)
@json_option
def command(
    onnx: Path, output: Path, backend: str, options: tuple[str, ...], as_json: bool
) -> None:
    """Build an engine from an ONNX bundle.

    \b
    Example:
      sdcompress build onnx -o engine --option provider=cpu
    """
    from export.backends import load_backend
    from sdcompress.bundle import Bundle

    watch = Stopwatch()
    wanted = _parse(options)
    chosen = load_backend(backend)
    source = Bundle.open(onnx, stages=("onnx",))
    with stage_status(f"building with {backend}"):
        made = chosen.build(source, output, options=wanted)
    result = Output(
        bundle=str(output),
        digest=made.digest,
        parent=source.digest,
        backend=backend,
        sparse_kernels=SparseKernels.model_validate(made.manifest.details["sparse_kernels"]),
        seconds=watch.seconds,
    )
    kernels = result.sparse_kernels
    used = "unknown" if kernels.used is None else kernels.used
    emit(
        result,
        as_json,
        lambda console: console.print(
            f"{output} in {result.seconds:.0f} s; "
            f"{used} of {kernels.of} layers use sparse kernels ({kernels.how})"
        ),
    )


def _parse(options: tuple[str, ...]) -> dict[str, object]:
    import yaml

    parsed: dict[str, object] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise click.BadParameter(f"expected KEY=VALUE, found {option!r}", param_hint="--option")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise click.BadParameter(
                f"expected a word, a number or a YAML value after {key}=, found {value!r}",
                param_hint="--option",
            ) from e
    return parsed
