"""What can go as a whole: neurons, heads and channels, inner widths that nothing outside sees.

A block is a stretch of a model with a width of its own between two layers: its producers give that
many numbers, its consumer takes them, and what comes out is as wide as ever. So a block can be made
narrower without any other part of the model changing its shape.

    neurons    feed-forward: both halves of a GEGLU and the layer behind it; a text encoder's
               fc1 and fc2
    heads      attention: rows of query, key and value, columns of the output projection
    channels   ResNet block: conv1, the projection of the time, norm2, and what conv2 takes, by
               whole groups of the GroupNorm, so that every group keeps what it normalises

Known from names, shapes and configs alone. A component's `config.json` says under `KEY` which of
its blocks are narrower than its other numbers make them; whoever reads the config can build it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

KEY = "structure"  # in a config: block → width
RECORD = "structure"  # in a manifest's details: component → ComponentStructure
Kind = Literal["neurons", "heads", "channels"]
_Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Part:
    """A tensor that has a block's width along `axis`, `copies` times one after the other."""

    tensor: str
    axis: int
    copies: int = 1


@dataclass(frozen=True)
class Block:
    """`width` numbers between producers and consumer, which go `unit` at a time.

    `full` is the width before anything went. The last of `parts` is the consumer's weight.
    """

    component: str
    name: str
    kind: Kind
    width: int
    full: int
    unit: int
    parts: tuple[Part, ...]

    @property
    def units(self) -> int:
        return self.width // self.unit

    @property
    def consumer(self) -> str:
        return self.parts[-1].tensor

    def step(self, multiple: int) -> int:
        """How many units go at once, so that what stays is a multiple of `multiple`."""
        return math.lcm(self.unit, multiple) // self.unit

    def kept(self, ratio: float, multiple: int) -> int:
        """The units that stay where a `ratio` of them is to go: the nearest number allowed, of two
        as near the larger; 0 where the ratio leaves nothing of the block."""
        wanted = self.units * (1 - ratio)
        return min((*self.choices(multiple), 0), key=lambda n: (abs(n - wanted), -n))

    def choices(self, multiple: int, at_least: float = 0.0) -> list[int]:
        """The numbers of units that may stay, all of them first; no fewer than this share."""
        step = self.step(multiple)
        most = (self.units - 1) // step * step
        fewest = self.units * at_least - 1e-9
        return [self.units, *(n for n in range(most, 0, -step) if n >= fewest)]


class BlockRecord(BaseModel):
    """What became of one block; `width` and `kept` count channels, `removed` names units.

    `asked` is the share of the units that was to go, None where a budget decided; `criterion` is
    None for a block that was not judged. With `refit`, the consumer's weights were fitted anew.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    unit: int
    width: int
    kept: int
    asked: float | None
    criterion: str | None
    refit: bool = False
    removed: str  # "0-3,7"


class ComponentStructure(BaseModel):
    """What became of a component's blocks, those that stayed whole included.

    `macs` are of one sample in one step. `latency` is what a table foretold, as a share of dense.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: dict[str, float] | None = None
    parameters_dense: int
    parameters: int
    macs_dense: int
    macs: int
    latency: float | None = None
    latency_table: str | None = None  # its sha256
    blocks: dict[str, BlockRecord]


def read_record(details: Mapping[str, Any]) -> dict[str, ComponentStructure]:
    """What a manifest's details say of each component that lost blocks; {} where none did."""
    return {c: ComponentStructure.model_validate(r) for c, r in details.get(RECORD, {}).items()}


def find_blocks(component: str, shapes: _Shapes, config: Mapping[str, Any]) -> tuple[Block, ...]:
    """The blocks of a component that can lose something, in the order of its file.

    `shapes` are those of its state dict. A block of one unit (a VAE's single head) is none.
    """
    found = []
    for name in shapes:
        for pattern, build in _CONSUMERS:
            if match := re.fullmatch(pattern, name):
                block = build(component, match[1], shapes, config)
                if block.full // block.unit > 1:
                    found.append(block)
    return tuple(found)


def _neurons_geglu(c: str, name: str, shapes: _Shapes, config: Mapping[str, Any]) -> Block:
    consumer = f"{name}.net.2"
    full = 4 * shapes[f"{consumer}.weight"][0]  # diffusers has no other, and no config for it
    return _block(c, name, "neurons", full, 1, [f"{name}.net.0.proj"], consumer, shapes)


def _neurons_mlp(c: str, name: str, shapes: _Shapes, config: Mapping[str, Any]) -> Block:
    full = config["intermediate_size"]
    return _block(c, name, "neurons", full, 1, [f"{name}.fc1"], f"{name}.fc2", shapes)


def _heads_diffusers(c: str, name: str, shapes: _Shapes, config: Mapping[str, Any]) -> Block:
    consumer, producers = f"{name}.to_out.0", [f"{name}.to_{letter}" for letter in "qkv"]
    full = shapes[f"{consumer}.weight"][0]
    if c == "vae":
        unit = config.get("attention_head_dim") or full
    else:
        heads = config["attention_head_dim"]  # diffusers' historical name for their number
        levels = len(config["block_out_channels"])
        unit = full // (heads if isinstance(heads, int) else heads[level_of(name, levels)])
    return _block(c, name, "heads", full, unit, producers, consumer, shapes)


def _heads_clip(c: str, name: str, shapes: _Shapes, config: Mapping[str, Any]) -> Block:
    full = config["hidden_size"]
    producers = [f"{name}.{letter}_proj" for letter in "qkv"]
    unit = full // config["num_attention_heads"]
    return _block(c, name, "heads", full, unit, producers, f"{name}.out_proj", shapes)


def _channels(c: str, name: str, shapes: _Shapes, config: Mapping[str, Any]) -> Block:
    full = shapes[f"{name}.conv2.weight"][0]
    producers = [f"{name}.{layer}" for layer in ("conv1", "time_emb_proj", "norm2")]
    unit = full // config["norm_num_groups"]
    return _block(c, name, "channels", full, unit, producers, f"{name}.conv2", shapes)


_CONSUMERS = (
    (r"(.*\.ff)\.net\.2\.weight", _neurons_geglu),
    (r"(.*\.mlp)\.fc2\.weight", _neurons_mlp),
    (r"(.*)\.to_out\.0\.weight", _heads_diffusers),
    (r"(.*\.self_attn)\.out_proj\.weight", _heads_clip),
    (r"(.*\.resnets\.\d+)\.conv2\.weight", _channels),
)


def _block(
    component: str,
    name: str,
    kind: Kind,
    full: int,
    unit: int,
    producers: Iterable[str],
    consumer: str,
    shapes: _Shapes,
) -> Block:
    width = shapes[f"{consumer}.weight"][1]
    parts = [
        Part(tensor, 0, shapes[tensor][0] // width)
        for layer in producers
        for tensor in (f"{layer}.weight", f"{layer}.bias")
        if tensor in shapes
    ]
    parts.append(Part(f"{consumer}.weight", 1))
    return Block(component, name, kind, width, full, unit, tuple(parts))


def level_of(name: str, levels: int) -> int:
    """How often a picture was halved before it came to this part of a UNet."""
    if match := re.match(r"(down|up)_blocks\.(\d+)\.", name):
        place = int(match[2])
        return place if match[1] == "down" else levels - 1 - place
    return levels - 1 if name.startswith("mid_block.") else 0


def channels_of(block: Block, units: Iterable[int]) -> list[int]:
    """The places, within a block's width, of these units."""
    return [unit * block.unit + i for unit in units for i in range(block.unit)]


def cut(tensor: Tensor, part: Part, channels: Sequence[int], width: int) -> Tensor:
    """What is left of a block's tensor when only these of its `width` channels stay."""
    import torch

    index = [copy * width + channel for copy in range(part.copies) for channel in channels]
    return tensor.index_select(part.axis, torch.tensor(index, device=tensor.device))


@dataclass(frozen=True)
class Remains:
    """What stayed of a tensor: these of the `width` channels of a block that it is a part of."""

    part: Part
    channels: tuple[int, ...]
    width: int

    def of(self, tensor: Tensor) -> Tensor:
        return cut(tensor, self.part, self.channels, self.width)


def remains(blocks: Iterable[Block], record: ComponentStructure) -> dict[str, Remains]:
    """What stayed, by the record, of each tensor of a model whose blocks are these.

    A block that is not as wide as it was before, so one of a model that has lost it, says nothing.
    """
    found = {}
    for block in blocks:
        known = record.blocks.get(block.name)
        if known is None or known.kept == known.width or known.width != block.width:
            continue
        gone = set(from_ranges(known.removed))
        channels = channels_of(block, (unit for unit in range(block.units) if unit not in gone))
        for part in block.parts:
            found[part.tensor] = Remains(part, tuple(channels), block.width)
    return found


def to_ranges(numbers: Iterable[int]) -> str:
    """Rising numbers in short: "0-3,7"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def from_ranges(text: str) -> Iterator[int]:
    """The numbers that `to_ranges` wrote."""
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)
