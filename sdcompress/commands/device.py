"""`sdcompress device`: a tar that builds, checks and measures on the device itself."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import BaseModel

from sdcompress.commands._common import emit, json_option, output_option, size, stage_status


class Output(BaseModel):
    """`device --json`; `bytes` and `sha256` of the tar."""

    bundle: str
    sha256: str
    bytes: int
    files: int
    target: str


@click.command()
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("sparse", type=click.Path(path_type=Path))
@output_option
@click.option(
    "--target", required=True, help="The device: `sdcompress list targets`, or a YAML file."
)
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps of the timed picture.")
@click.option("--height", type=click.IntRange(min=8), help="Pixels.")
@click.option("--width", type=click.IntRange(min=8), help="Pixels.")
@click.option("--images", type=click.IntRange(min=1), default=1, help="Pictures at once.")
@click.option(
    "--guidance/--no-guidance",
    default=None,
    help="Two branches, or one as distilled models want it.  [default: the model's own]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the inputs to compare by.",
)
@json_option
def command(
    dense: Path,
    sparse: Path,
    output: Path,
    target: str,
    steps: int | None,
    height: int | None,
    width: int | None,
    images: int,
    guidance: bool | None,
    seed: int,
    as_json: bool,
) -> None:
    """Pack the ONNX bundles DENSE and SPARSE for a device, with the script that does the rest.

    On the device: tar xf bundle.tar && python3 sdcompress_device.pyz

    \b
    Example:
      sdcompress device out/onnx/dense out/onnx/sparse --target jetson-orin-nano -o bundle.tar
    """
    from export.device_bundle import write_device_bundle
    from export.specs import Sizes
    from export.targets import load_target
    from sdcompress.bundle import Bundle
    from sdcompress.models.defaults import sampling_defaults

    device = load_target(target)
    dense_onnx, sparse_onnx = (Bundle.open(path, stages=("onnx",)) for path in (dense, sparse))
    defaults = sampling_defaults(dense_onnx)
    if guidance is None:
        guidance = defaults["guidance"] > 1
    sizes = Sizes(images, guidance, height, width)
    with stage_status("computing what the device should give, and packing"):
        written = write_device_bundle(
            dense_onnx,
            sparse_onnx,
            output,
            target=device,
            sizes=sizes,
            steps=steps or defaults["steps"],
            seed=seed,
        )
    result = Output(
        bundle=str(output),
        sha256=written.sha256,
        bytes=written.bytes,
        files=written.files,
        target=device.name,
    )
    emit(
        result,
        as_json,
        lambda console: console.print(
            f"{output} for {device.title}: {size(written.bytes)}, {written.files} files\n"
            f"sha256 {written.sha256}"
        ),
    )
