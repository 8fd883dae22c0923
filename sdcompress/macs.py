"""Multiply-accumulates of a component, layer by layer, from names, shapes and configs alone.

A weight is used once for each position it is applied to: a token, a place in a picture, or once
where there is the time only. The products of attention belong to no weight; both of them, the
scores and what they weigh, are as many as queries times keys times the width of all heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcompress.catalog import read_config
from sdcompress.structure import Block, level_of


@dataclass(frozen=True)
class Sizes:
    """Of one sample: the latents' height and width, and the tokens of a prompt."""

    height: int
    width: int
    tokens: int

    @classmethod
    def of_model(cls, model: Path, height: int | None = None, width: int | None = None) -> Sizes:
        """Those of a diffusers directory; `height` and `width` in pixels, its own if None."""
        unet, vae, text = (read_config(model / c) for c in ("unet", "vae", "text_encoder"))
        scale = 2 ** (len(vae.get("block_out_channels", ())) - 1)
        own = int(unet["sample_size"])
        return cls(
            height // scale if height else own,
            width // scale if width else own,
            int(text["max_position_embeddings"]),
        )


def component_macs(
    component: str, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], sizes: Sizes
) -> dict[str, int]:
    """MACs of one sample in one step: by the key of each weight, attention's products by the
    name of their block. The sum of all is the component's.
    """
    macs = {}
    for name, shape in shapes.items():
        matrix = name.endswith(".weight") and len(shape) in (2, 4)
        if matrix and not name.endswith("embedding.weight"):
            macs[name] = _positions(component, name, config, sizes) * math.prod(shape)
        if match := re.fullmatch(r"(.*)\.(?:to_out\.0|out_proj|proj_attn)\.weight", name):
            queries = _positions(component, name, config, sizes)
            cross = match[1].endswith(".attn2")
            macs[match[1]] = 2 * queries * (sizes.tokens if cross else queries) * shape[1]
    return macs


def block_macs(block: Block, macs: Mapping[str, int]) -> int:
    """The part of `component_macs` that is in proportion to a block's width."""
    return sum(macs.get(name, 0) for name in (block.name, *(part.tensor for part in block.parts)))


def _positions(component: str, name: str, config: Mapping[str, Any], sizes: Sizes) -> int:
    """How often a weight is used for one sample."""
    if component == "text_encoder":
        return sizes.tokens
    levels = len(config["block_out_channels"])
    if component == "vae":
        if name.startswith(("encoder.", "quant_conv.")):
            return 0  # no part of painting
        match = re.match(r"decoder\.up_blocks\.(\d+)\.(\w+)\.", name)
        # conv_out comes after the last level.
        up = levels - 1 if name.startswith("decoder.conv_out") else int(match[1]) if match else 0
        up += bool(match and match[2] == "upsamplers")
        return sizes.height * sizes.width << 2 * up
    if name.startswith("time_embedding.") or ".time_emb_proj." in name:
        return 1
    if ".attn2.to_k." in name or ".attn2.to_v." in name:
        return sizes.tokens
    level = level_of(name, levels) + (".downsamplers." in name) - (".upsamplers." in name)
    return -(-sizes.height >> level) * -(-sizes.width >> level)  # an odd side is rounded up
