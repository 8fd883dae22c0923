"""Which blocks there are, what may stay of them, and how a tensor is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdcompress.catalog import read_catalog, read_config
from sdcompress.models.sd2 import component_configs, tensor_shapes
from sdcompress.structure import (
    Block,
    BlockRecord,
    ComponentStructure,
    Part,
    channels_of,
    cut,
    find_blocks,
    from_ranges,
    level_of,
    read_record,
    remains,
    to_ranges,
)


def sd2_blocks(component: str) -> dict[str, Block]:
    config = component_configs("sd2-base")[component]
    found = find_blocks(component, tensor_shapes(component, config), config)
    return {block.name: block for block in found}


def count(blocks: dict[str, Block], kind: str) -> int:
    return sum(block.kind == kind for block in blocks.values())


def test_the_blocks_of_sd2s_unet() -> None:
    blocks = sd2_blocks("unet")
    # 4 levels of 2 ResNet blocks down, 2 in the middle, 4 of 3 up; attention but at the lowest
    # level: 3 of 2 down, 1, 3 of 3 up, each with two attentions and a feed-forward.
    assert count(blocks, "channels") == 4 * 2 + 2 + 4 * 3
    assert count(blocks, "neurons") == 3 * 2 + 1 + 3 * 3
    assert count(blocks, "heads") == 2 * count(blocks, "neurons")
    up = "up_blocks.1.attentions.0.transformer_blocks.0"
    neurons, heads = blocks[f"{up}.ff"], blocks[f"{up}.attn2"]
    resnet = blocks["up_blocks.3.resnets.0"]
    assert (neurons.width, neurons.unit, neurons.units) == (5120, 1, 5120)
    assert (heads.width, heads.unit, heads.units) == (1280, 64, 20)
    assert (resnet.width, resnet.unit, resnet.units) == (320, 10, 32)
    assert neurons.parts == (
        Part(f"{up}.ff.net.0.proj.weight", 0, 2),  # both halves of the GEGLU
        Part(f"{up}.ff.net.0.proj.bias", 0, 2),
        Part(f"{up}.ff.net.2.weight", 1),
    )
    assert heads.parts == (
        *(Part(f"{up}.attn2.to_{letter}.weight", 0) for letter in "qkv"),
        Part(f"{up}.attn2.to_out.0.weight", 1),
    )
    layers = ("conv1", "time_emb_proj", "norm2")
    assert resnet.parts == (
        *(
            Part(f"{resnet.name}.{layer}.{tensor}", 0)
            for layer in layers
            for tensor in ("weight", "bias")
        ),
        Part(f"{resnet.name}.conv2.weight", 1),
    )
    assert {b.unit for b in blocks.values() if b.kind == "heads"} == {64}  # at every level
    assert all(block.width == block.full for block in blocks.values())


def test_the_blocks_of_sd2s_text_encoder_and_vae() -> None:
    text = sd2_blocks("text_encoder")
    assert (count(text, "neurons"), count(text, "heads"), len(text)) == (23, 23, 46)
    layer = "text_model.encoder.layers.22"
    mlp, attention = text[f"{layer}.mlp"], text[f"{layer}.self_attn"]
    assert (mlp.width, mlp.units, mlp.consumer) == (4096, 4096, f"{layer}.mlp.fc2.weight")
    assert (attention.width, attention.units) == (1024, 16)
    assert f"{layer}.self_attn.v_proj.bias" in {part.tensor for part in attention.parts}
    vae = sd2_blocks("vae")
    # Its attention has one head, which nothing can be taken of.
    assert count(vae, "channels") == len(vae) == 2 * 4 + 2 + 2 + 3 * 4
    assert vae["decoder.up_blocks.3.resnets.2"].units == 32
    assert not [part for b in vae.values() for part in b.parts if "time_emb" in part.tensor]


def test_scale_and_shift_of_the_time_are_two_copies() -> None:
    shapes = {
        "down_blocks.0.resnets.0.conv1.weight": (64, 32, 3, 3),
        "down_blocks.0.resnets.0.time_emb_proj.weight": (128, 256),
        "down_blocks.0.resnets.0.norm2.weight": (64,),
        "down_blocks.0.resnets.0.conv2.weight": (64, 64, 3, 3),
    }
    (block,) = find_blocks("unet", shapes, {"norm_num_groups": 8})
    assert [part.copies for part in block.parts] == [1, 2, 1, 1]


@pytest.mark.parametrize("heads", [4, [2, 4]])
def test_the_number_of_heads_goes_by_a_name_of_old(heads: Any) -> None:
    shapes = {f"mid_block.attn1.to_{x}.weight": (64, 64) for x in ("q", "k", "v", "out.0")}
    config = {"block_out_channels": [32, 64], "attention_head_dim": heads}
    (block,) = find_blocks("unet", shapes, config)
    assert (block.unit, block.units) == (16, 4)


def test_a_narrower_block_knows_what_it_was() -> None:
    shapes = {"a.ff.net.0.proj.weight": (64, 16), "a.ff.net.2.weight": (16, 32)}
    (block,) = find_blocks("unet", shapes, {})
    assert (block.width, block.full, block.units) == (32, 64, 32)
    assert block.parts[0].copies == 2


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("conv_in.weight", 0),
        ("down_blocks.2.resnets.0", 2),
        ("mid_block.attentions.0", 3),
        ("up_blocks.0.resnets.1", 3),
        ("up_blocks.3.resnets.1", 0),
        ("conv_out.weight", 0),
    ],
)
def test_levels(name: str, level: int) -> None:
    assert level_of(name, 4) == level


def block(width: int, unit: int) -> Block:
    return Block("unet", "a.ff", "neurons", width, width, unit, (Part("a.ff.net.2.weight", 1),))


@pytest.mark.parametrize(
    ("width", "unit", "multiple", "ratio", "kept"),
    [
        (100, 1, 1, 0.5, 50),
        (100, 1, 8, 0.5, 48),  # 50: 48 is nearer than 56
        (40, 1, 8, 0.5, 24),  # 20: of 16 and 24, as near, the larger
        (100, 1, 8, 0.02, 100),  # 98: what there was is allowed whatever its multiple is
        (100, 1, 8, 0.03, 96),
        (320, 10, 8, 0.5, 16),  # 160 channels
        (320, 10, 8, 0.3, 24),  # 22.4 groups of 10: steps of 4 groups are 40 channels
        (320, 10, 1, 0.3, 22),
        (1280, 64, 8, 0.25, 15),
        (1280, 64, 128, 0.25, 16),  # 15: of 14 and 16 heads the larger
        (16, 1, 8, 0.9, 0),  # 1.6 is nearer to nothing than to 8
        (16, 1, 8, 0.75, 8),
        (16, 1, 1, 0.99, 0),
    ],
)
def test_what_stays_at_a_ratio(
    width: int, unit: int, multiple: int, ratio: float, kept: int
) -> None:
    assert block(width, unit).kept(ratio, multiple) == kept


def test_the_widths_to_choose_among() -> None:
    assert block(20, 1).choices(8) == [20, 16, 8]
    assert block(16, 1).choices(8) == [16, 8]
    assert block(320, 10).choices(16) == [32, 24, 16, 8]  # 80 channels at a time
    assert block(10, 1).choices(1, at_least=0.7) == [10, 9, 8, 7]
    assert block(10, 1).choices(16) == [10]
    assert block(1280, 64).step(8) == 1
    assert block(320, 10).step(16) == 8


def test_cut_takes_the_channels_of_every_copy() -> None:
    channels = channels_of(block(6, 2), [0, 2])
    assert channels == [0, 1, 4, 5]
    rows = torch.arange(12.0)[:, None]
    left = cut(rows, Part("", 0, 2), channels, 6)
    assert left.flatten().tolist() == [0, 1, 4, 5, 6, 7, 10, 11]
    conv = torch.arange(6.0)[None, :, None, None].expand(3, 6, 2, 2)
    left = cut(conv, Part("", 1), channels, 6)
    assert left.shape == (3, 4, 2, 2)
    assert left[2, :, 1, 1].tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((7,), "7"), ((0, 1, 2, 3, 7), "0-3,7"), ((1, 3, 5, 6), "1,3,5-6")],
)
def test_ranges_in_short(numbers: tuple[int, ...], text: str) -> None:
    assert to_ranges(numbers) == text
    assert tuple(from_ranges(text)) == numbers


def record(**changes: Any) -> ComponentStructure:
    known = {
        "kind": "heads",
        "unit": 2,
        "width": 6,
        "kept": 4,
        "asked": 0.3,
        "criterion": "magnitude",
        "removed": "1",
    }
    return ComponentStructure(
        parameters_dense=100,
        parameters=80,
        macs_dense=10,
        macs=8,
        blocks={"mid_block.attn1": BlockRecord.model_validate({**known, **changes})},
    )


def test_the_record_comes_back_from_a_manifest() -> None:
    details = {"structure": {"unet": record().model_dump(mode="json")}, "rounds": []}
    assert read_record(details) == {"unet": record()}
    assert read_record({"rounds": []}) == {}


def test_what_stayed_of_a_models_tensors() -> None:
    shapes = {f"mid_block.attn1.to_{x}.weight": (6, 6) for x in ("q", "k", "v", "out.0")}
    config = {"block_out_channels": [6], "attention_head_dim": 3}
    left = remains(find_blocks("unet", shapes, config), record())
    assert set(left) == set(shapes)
    values = torch.arange(36.0).reshape(6, 6)
    assert left["mid_block.attn1.to_k.weight"].of(values).equal(values[[0, 1, 4, 5]])
    assert left["mid_block.attn1.to_out.0.weight"].of(values).equal(values[:, [0, 1, 4, 5]])
    # Nothing went of this block, or the model is one that has lost it already.
    assert remains(find_blocks("unet", shapes, config), record(kept=6, removed="")) == {}
    assert remains(find_blocks("unet", shapes, config), record(width=8)) == {}


def test_blocks_of_files_and_modules_are_the_same(tiny_sd: Path) -> None:
    catalog = read_catalog(tiny_sd)
    for component in catalog.components:
        config = read_config(catalog.folder(component))
        blocks = find_blocks(component, catalog.shapes(component), config)
        made = find_blocks(component, tensor_shapes(component, config), config)
        alike = [
            {b.name.removeprefix("text_model."): (b.kind, b.width, b.unit, len(b.parts)) for b in x}
            for x in (blocks, made)
        ]
        assert alike[0] == alike[1]
        assert len({part.tensor for b in blocks for part in b.parts}) == sum(
            len(b.parts) for b in blocks
        )  # no tensor belongs to two blocks, so that each can be cut by itself
