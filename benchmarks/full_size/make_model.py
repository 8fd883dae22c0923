"""A Stable Diffusion 2 of exact size with seeded random weights: real work without a download.

    python benchmarks/full_size/make_model.py OUT [--dtype fp16] [--geometry sd2-base] [--seed 0]
        [--shards N] [--parameters 300M]

It draws no picture, but its tensors have the names, shapes, types and plausible values of the real
one. `--shards` cuts the weights of UNet and text encoder into so many files, as diffusers does;
`--parameters` makes a network of the same kind, half as deep and of other widths.

Where the distributions come from. Each weight is a normal number of its own, times 1/sqrt(fan-in),
times the gain of its kind of layer (`GAINS`), times a factor of its layer and one of its row. The
gains, both spreads and the values of norms and biases are those of mini-sd2, the one trained model
of this architecture that ships here: over its layers of a kind, the standard deviation times
sqrt(fan-in), rounded. The tails are a choice: mini-sd2 was trained briefly, its 3×3 convolutions
have a kurtosis of 3.4 to 3.7 and its attention less than a normal's 3; here everything has 3.85, as
longer training makes tails heavier. Embeddings are as wide as OpenCLIP's initial ones.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdcompress.bundle import staging
from sdcompress.models.checkpoint import WEIGHT_FILES, encode_header
from sdcompress.models.sd2 import CONFIGS, component_configs, tensor_shapes, write_configs
from sdcompress.parallel import in_order

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

# Part of a tensor's name → standard deviation of its weights times sqrt(fan-in); the first counts.
GAINS = {
    "conv_in": 0.75, "conv_out": 1.0, "conv_shortcut": 0.6, "samplers": 1.1,
    "conv1": 1.85, "conv2": 1.5,
    "time_emb_proj": 0.95, "ff.net.0": 0.75, "ff.net.2": 1.05,
    "attn2": 0.71, "attn1": 0.66, "proj_in": 0.73, "proj_out": 0.64,
    "q_proj": 0.62, "k_proj": 0.62, "v_proj": 0.74, "out_proj": 1.12, "fc1": 0.9, "fc2": 1.34,
}  # fmt: skip
OTHER_GAIN = 0.65
LAYER_SPREAD, ROW_SPREAD = 0.1, 0.1  # standard deviations of the logarithms of scales
TAIL = 0.03  # of z + TAIL·z³ for a normal z: a kurtosis of 3.85
NORM = (0.95, 0.06)  # mean and standard deviation of the weights of norms
BIAS = 0.05
EMBEDDINGS = {"token_embedding": 0.02, "position_embedding": 0.01}


class Size(NamedTuple):
    """A geometry with other widths: channels of the first level, features of the text encoder."""

    channels: int
    features: int


# About so many parameters in UNet and text encoder together. Heads have 32 channels in the UNet and
# 64 in the text encoder.
SIZES = {
    "10M": Size(32, 64),
    "30M": Size(32, 256),
    "100M": Size(96, 448),
    "300M": Size(192, 640),
    "1G": Size(352, 1280),
    "2G": Size(480, 2048),
}


def sized_configs(name: str) -> dict[str, dict[str, Any]]:
    """The configs of SD2 base with the widths of `SIZES[name]`, and half as deep.

    What a graph costs depends on its depth, which is the same for all sizes; half of it is enough.
    """
    channels, features = SIZES[name]
    configs = component_configs("sd2-base")
    widths = [channels * times for times in (1, 2, 4, 4)]
    configs["unet"] |= {
        "block_out_channels": widths,
        "attention_head_dim": [width // 32 for width in widths],
        "cross_attention_dim": features,
        "layers_per_block": 1,
    }
    configs["text_encoder"] |= {
        "hidden_size": features,
        "intermediate_size": 4 * features,
        "num_attention_heads": features // 64,
        "num_hidden_layers": 12,
    }
    first = max(32, 32 * round(channels * 0.4 / 32))  # SD2: 128 of 320
    configs["vae"] |= {
        "block_out_channels": [first * times for times in (1, 2, 4, 4)],
        "layers_per_block": 1,
    }
    return configs


def draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The float32 values of one tensor; they depend on its name and the seed, not on its place."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        mean, spread = NORM if name.endswith("weight") else (0.0, BIAS)
        return noise.mul_(spread).add_(mean)
    for part, scale in EMBEDDINGS.items():
        if part in name:
            return noise.mul_(scale)
    gain = next((gain for part, gain in GAINS.items() if part in name), OTHER_GAIN)
    layer = torch.randn((), generator=generator).mul_(LAYER_SPREAD).exp_()
    rows = torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator)
    rows = rows.mul_(ROW_SPREAD).exp_()
    variance = (1 + 6 * TAIL + 15 * TAIL**2) * math.prod(shape[1:])  # E(z + TAIL·z³)², fan-in
    noise.mul_(noise.square().mul_(TAIL).add_(1))
    return noise.mul_(rows * layer * (gain / math.sqrt(variance)))


def write(file: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    """Stream the tensors into one safetensors file, in the order of `shapes`."""

    def make(name: str, shape: tuple[int, ...]) -> Any:
        return draw(name, shape, seed).to(dtype).view(torch.uint8).numpy()

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("xb") as f:
        f.write(encode_header((name, FORMAT_NAMES[dtype], s) for name, s in shapes.items()))
        for data in in_order(partial(make, name, shape) for name, shape in shapes.items()):
            f.write(data)


def write_shards(
    file: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int, shards: int
) -> None:
    """The same tensors in several files and an index, named as diffusers and transformers do."""
    parts = cut(shapes, shards)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        shard = file.with_name(f"{file.stem}-{number:05}-of-{len(parts):05}{file.suffix}")
        write(shard, part, dtype, seed)
        weight_map |= dict.fromkeys(part, shard.name)
    total = sum(map(math.prod, shapes.values())) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    file.with_name(f"{file.name}.index.json").write_text(text, encoding="utf-8")


def cut(shapes: dict[str, tuple[int, ...]], shards: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in order, in so many parts of about the same size, or fewer."""
    total, before = sum(map(math.prod, shapes.values())), 0
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    for name, shape in shapes.items():
        parts[min(before * shards // total, shards - 1)][name] = shape
        before += math.prod(shape)
    return [part for part in parts if part]


def write_model(
    directory: Path,
    configs: dict[str, dict[str, Any]],
    dtype: torch.dtype,
    *,
    seed: int = 0,
    shards: int = 1,
) -> dict[str, int]:
    """Everything of a diffusers directory; returns the parameters of each component."""
    write_configs(directory, configs)
    counts = {}
    for component, name in WEIGHT_FILES.items():
        shapes = tensor_shapes(component, configs[component])
        counts[component] = sum(map(math.prod, shapes.values()))
        file = directory / component / name
        if shards > 1 and component != "vae":
            write_shards(file, shapes, dtype, seed, shards)
        else:
            write(file, shapes, dtype, seed)
    return counts


def check_published(counts: dict[str, int]) -> None:
    """A wrong config would show here."""
    for component, expected in PARAMETERS.items():
        if counts[component] != expected:
            raise SystemExit(f"{component}: expected {expected}, found {counts[component]}")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--geometry", choices=CONFIGS, default="sd2-base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1, help="files of UNet and text encoder each")
    parser.add_argument("--parameters", choices=SIZES, help="about so many, by other widths")
    args = parser.parse_args(argv)
    if args.shards < 1:
        parser.error("--shards: expected at least 1")
    if args.parameters and args.geometry != "sd2-base":
        parser.error("--parameters changes the widths of sd2-base; leave --geometry out")
    return args


def main(argv: Iterable[str] | None = None) -> None:
    args = arguments(None if argv is None else list(argv))
    torch.set_num_threads(1)  # tensors go to threads of ours
    configs = (
        sized_configs(args.parameters) if args.parameters else component_configs(args.geometry)
    )
    named = f"{args.geometry} at {args.parameters}" if args.parameters else args.geometry
    with staging(args.out) as work:
        (work / "README.md").write_text(
            CARD.format(geometry=named, dtype=args.dtype, seed=args.seed), encoding="utf-8"
        )
        counts = write_model(work, configs, DTYPES[args.dtype], seed=args.seed, shards=args.shards)
        if not args.parameters:
            check_published(counts)
    for component, count in counts.items():
        print(f"{component}: {count:,} parameters")


if __name__ == "__main__":
    main()
