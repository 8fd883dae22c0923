"""Weights → an engine of their UNet alone, in fp32: `engine.py WEIGHTS ENGINE OPTIONS`.

In a process of its own, because exporting and loading the full size each take gigabytes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.structured.worker import UNET
from export.backends import load_backend
from export.to_onnx import export_bundle
from sdcompress.bundle import MANIFEST, Bundle
from sdcompress.models.sources import resolve

BACKEND = "onnxruntime"


def open_weights(model: str) -> Bundle:
    """A bundle of weights, or any model as one."""
    if (Path(model) / MANIFEST).is_file():
        return Bundle.open(Path(model))
    found = resolve(model)
    return Bundle.of_source(found.directory, found.source)


def main(weights: str, engine: str, options: str) -> None:
    out = Path(engine)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".onnx-") as folder:
        onnx = export_bundle(
            open_weights(weights), Path(folder) / "onnx", dtype="fp32", components=[UNET]
        )
        load_backend(BACKEND).build(onnx, out, options=json.loads(options))


if __name__ == "__main__":
    main(*sys.argv[1:])
