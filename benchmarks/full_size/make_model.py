"""A Stable Diffusion 2 of exact size with seeded random weights: real work without a download.

    python benchmarks/full_size/make_model.py OUT [--dtype fp16] [--geometry sd2-base] [--seed 0]

It draws no picture, but its tensors have the names, shapes, types and plausible scales of the real
one: weights are normal with variance 1/fan-in, norms close to one, biases small. One tensor is
held in memory at a time.
"""

from __future__ import annotations

import argparse
import math
import zlib
from pathlib import Path

import torch

from sdcompress.bundle import staging
from sdcompress.models.checkpoint import WEIGHT_FILES, encode_header
from sdcompress.models.sd2 import CONFIGS, component_configs, tensor_shapes, write_configs

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FORMAT_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
# What the published SD2 has; a wrong config would show here.
PARAMETERS = {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}
CARD = """---
license: apache-2.0
---
# Stable Diffusion 2 geometry, random weights

Made by `benchmarks/full_size/make_model.py` (geometry {geometry}, {dtype}, seed {seed}).
It has the size of the real model and has learnt nothing: for timing only.
"""


def draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The float32 values of one tensor; they depend on its name and the seed, not on its place."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    noise = torch.randn(shape, generator=generator)
    if "embedding" in name and len(shape) == 2 and "time" not in name:
        return noise * 0.02
    if len(shape) > 1:
        return noise / math.sqrt(math.prod(shape[1:]))
    return noise * 0.02 + (1.0 if name.endswith("weight") else 0.0)


def write(file: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    """Stream the tensors into one safetensors file, in the order of `shapes`."""
    with file.open("xb") as f:
        f.write(encode_header((name, FORMAT_NAMES[dtype], s) for name, s in shapes.items()))
        for name, shape in shapes.items():
            f.write(draw(name, shape, seed).to(dtype).view(torch.uint8).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--geometry", choices=CONFIGS, default="sd2-base")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    with staging(args.out) as work:
        configs = component_configs(args.geometry)
        write_configs(work, configs)
        (work / "README.md").write_text(CARD.format(**vars(args)), encoding="utf-8")
        for component, file in WEIGHT_FILES.items():
            shapes = tensor_shapes(component, configs[component])
            count = sum(math.prod(shape) for shape in shapes.values())
            if count != PARAMETERS[component]:
                expected = PARAMETERS[component]
                raise SystemExit(f"{component}: expected {expected} parameters, found {count}")
            write(work / component / file, shapes, DTYPES[args.dtype], args.seed)
            print(f"{component}: {count:,} parameters")


if __name__ == "__main__":
    main()
