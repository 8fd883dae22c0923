"""Multiply-accumulates by shapes, against what torch counts when it runs the modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sdcompress.catalog import read_config
from sdcompress.macs import Sizes, block_macs, component_macs
from sdcompress.models import modules
from sdcompress.models.sd2 import component_configs, tensor_shapes
from sdcompress.models.sources import resolve
from sdcompress.structure import KEY, find_blocks

COMPONENTS = ("text_encoder", "unet", "vae")
SIDES = {"mini-sd2": [(8, 8), (9, 13)], "sd2-base": [(64, 64), (7, 65)]}
CASES = [
    (model, component, sides)
    for model, both in SIDES.items()
    for component in COMPONENTS
    for sides in (both if component != "text_encoder" else both[:1])
]


def config_of(model: str, component: str) -> dict[str, Any]:
    if model == "sd2-base":
        return component_configs(model)[component]
    return read_config(resolve(model).directory / component)


class _Decode(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self.vae.decode(latents).sample
        return decoded


def counted(component: str, config: dict[str, Any], sizes: Sizes) -> tuple[int, dict[str, int]]:
    """What torch counts while the module runs, on its meta device: in all, and by module."""
    with torch.device("meta"):
        module: Any = modules.build(component, config).eval()
        latents = torch.empty(1, 4, sizes.height, sizes.width)
        inputs: tuple[Tensor, ...] = (latents,)
        if component == "text_encoder":
            inputs = (torch.zeros(1, sizes.tokens, dtype=torch.long),)
        elif component == "unet":
            text = torch.empty(1, sizes.tokens, config["cross_attention_dim"])
            inputs = (latents, torch.tensor(0), text)
        called = _Decode(module) if component == "vae" else module
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            called(*inputs)
    by_module = {
        name.partition(".")[2].removeprefix("vae."): sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
    }
    return counter.get_total_flops() // 2, by_module


@pytest.mark.parametrize(("model", "component", "sides"), CASES)
@pytest.mark.parametrize("narrow", [False, True], ids=["whole", "narrower"])
def test_the_count_is_torchs(
    model: str, component: str, sides: tuple[int, int], narrow: bool
) -> None:
    config = config_of(model, component)
    sizes = Sizes(*sides, tokens=config_of(model, "text_encoder")["max_position_embeddings"])
    shapes = tensor_shapes(component, config)
    dense = component_macs(component, shapes, config, sizes)
    if narrow:
        blocks = find_blocks(component, shapes, config)
        # Another share of every block, so that no error can make up for another.
        units = {b.name: 1 + i % (b.units - 1) for i, b in enumerate(blocks)}
        config = {**config, KEY: {b.name: b.unit * units[b.name] for b in blocks}}
        shapes = tensor_shapes(component, config)
    total, by_module = counted(component, config, sizes)
    found = component_macs(component, shapes, config, sizes)
    assert sum(found.values()) == total
    for name, macs in found.items():
        module = name.removesuffix(".weight").removeprefix("text_model.")
        if module != name.removeprefix("text_model."):  # a layer and no attention
            assert by_module.get(module, by_module.get(f"text_model.{module}", 0)) == macs
    if narrow:
        gone = {b.name: block_macs(b, dense) * (b.units - units[b.name]) // b.units for b in blocks}
        assert sum(found.values()) == sum(dense.values()) - sum(gone.values())


def test_of_one_layer_of_each_kind() -> None:
    shapes = {
        "conv_in.weight": (8, 4, 3, 3),
        "conv_in.bias": (8,),
        "time_embedding.linear_1.weight": (32, 8),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 6),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0.weight": (8, 8),
        "down_blocks.0.downsamplers.0.conv.weight": (8, 8, 3, 3),
    }
    macs = component_macs("unet", shapes, {"block_out_channels": [8, 8]}, Sizes(5, 4, tokens=7))
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    assert macs == {
        "conv_in.weight": 5 * 4 * 8 * 4 * 9,
        "time_embedding.linear_1.weight": 32 * 8,
        f"{attention}.to_k.weight": 7 * 8 * 6,
        f"{attention}.to_out.0.weight": 3 * 2 * 8 * 8,  # half of 5 is 3
        attention: 2 * (3 * 2) * 7 * 8,
        "down_blocks.0.downsamplers.0.conv.weight": 3 * 2 * 8 * 8 * 9,
    }


def test_what_the_vae_encodes_is_no_part_of_painting() -> None:
    config = component_configs("sd2-base")["vae"]
    shapes = tensor_shapes("vae", config)
    macs = component_macs("vae", shapes, config, Sizes(64, 64, tokens=77))
    assert {n for n, m in macs.items() if not m} == {
        n for n in macs if n.startswith(("encoder.", "quant_conv."))
    }
    # Files of SD2 call the parts of its attention by older names.
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(name: str) -> str:
        for new, spelling in old.items() if ".attentions." in name else ():
            name = name.replace(f".{new}.", f".{spelling}.")
        return name

    renamed = {older(n): s for n, s in shapes.items()}
    again = component_macs("vae", renamed, config, Sizes(64, 64, tokens=77))
    assert {older(n): m for n, m in macs.items()} == again


def test_sizes_of_a_model(tiny_sd: Path) -> None:
    assert Sizes.of_model(tiny_sd) == Sizes(8, 8, tokens=77)
    assert Sizes.of_model(tiny_sd, height=32, width=24) == Sizes(16, 12, tokens=77)
