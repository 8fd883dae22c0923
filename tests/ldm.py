"""A diffusers directory written as the single file that the original training code would have made.

The names are spelled out block by block, the other way round than the importer reads them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
Tensors = dict[str, torch.Tensor]


def write_single_file(
    model: Path,
    file: Path,
    *,
    text_prefix: str = "cond_stage_model.model.",
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write `model` (a diffusers directory) to `file` and return `file`."""
    tensors = {
        **{f"model.diffusion_model.{k}": v for k, v in _unet(model / "unet").items()},
        **{f"first_stage_model.{k}": v for k, v in _vae(model / "vae").items()},
        **{f"{text_prefix}{k}": v for k, v in _text(model / "text_encoder").items()},
        # what such files hold besides
        "alphas_cumprod": torch.linspace(0.99, 0.01, 1000),
        "model_ema.decay": torch.tensor(0.9999),
    }
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata=metadata)
    return file


def _move(state: Tensors, source: str, target: str, names: dict[str, str] | None = None) -> Tensors:
    """The tensors under `source.`, taken out of `state`, under `target.`; parts renamed."""
    moved = {}
    for key in [k for k in state if k.startswith(f"{source}.")]:
        rest = key.removeprefix(f"{source}.")
        for mine, theirs in (names or {}).items():
            if rest.startswith(f"{mine}."):
                rest = f"{theirs}.{rest.removeprefix(f'{mine}.')}"
                break
        moved[f"{target}.{rest}"] = state.pop(key)
    return moved


def _load(component: Path) -> tuple[Tensors, dict]:
    (file,) = component.glob("*.safetensors")
    return load_file(file), json.loads((component / "config.json").read_text())


def _unet(component: Path) -> Tensors:
    state, config = _load(component)
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    out = {
        **_move(state, "time_embedding.linear_1", "time_embed.0"),
        **_move(state, "time_embedding.linear_2", "time_embed.2"),
        **_move(state, "conv_in", "input_blocks.0.0"),
        **_move(state, "conv_norm_out", "out.0"),
        **_move(state, "conv_out", "out.2"),
        **_move(state, "mid_block.resnets.0", "middle_block.0", RESNET),
        **_move(state, "mid_block.attentions.0", "middle_block.1"),
        **_move(state, "mid_block.resnets.1", "middle_block.2", RESNET),
    }
    block = 1
    for level in range(levels):
        here = f"down_blocks.{level}"
        for layer in range(layers):
            out |= _move(state, f"{here}.resnets.{layer}", f"input_blocks.{block}.0", RESNET)
            out |= _move(state, f"{here}.attentions.{layer}", f"input_blocks.{block}.1")
            block += 1
        out |= _move(state, f"{here}.downsamplers.0.conv", f"input_blocks.{block}.0.op")
        block += 1
    block = 0
    for level in range(levels):
        here = f"up_blocks.{level}"
        for layer in range(layers + 1):
            out |= _move(state, f"{here}.resnets.{layer}", f"output_blocks.{block}.0", RESNET)
            attention = _move(state, f"{here}.attentions.{layer}", f"output_blocks.{block}.1")
            out |= attention
            if layer == layers:
                place = 2 if attention else 1
                target = f"output_blocks.{block}.{place}.conv"
                out |= _move(state, f"{here}.upsamplers.0.conv", target)
            block += 1
    assert not state, f"not written: {sorted(state)}"
    return out


def _vae(component: Path) -> Tensors:
    state, config = _load(component)
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    shortcut = {"conv_shortcut": "nin_shortcut"}
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    out: Tensors = {}
    for side in ("encoder", "decoder"):
        out |= _move(state, f"{side}.conv_in", f"{side}.conv_in")
        out |= _move(state, f"{side}.conv_out", f"{side}.conv_out")
        out |= _move(state, f"{side}.conv_norm_out", f"{side}.norm_out")
        mid = f"{side}.mid_block"
        out |= _move(state, f"{mid}.resnets.0", f"{side}.mid.block_1", shortcut)
        out |= _move(state, f"{mid}.resnets.1", f"{side}.mid.block_2", shortcut)
        for key, tensor in _move(
            state, f"{mid}.attentions.0", f"{side}.mid.attn_1", attention
        ).items():  # a 1×1 convolution there
            matrix = key.endswith("weight") and ".norm." not in key
            out[key] = tensor[:, :, None, None] if matrix else tensor
    for level in range(levels):
        for layer in range(layers):
            source = f"encoder.down_blocks.{level}.resnets.{layer}"
            out |= _move(state, source, f"encoder.down.{level}.block.{layer}", shortcut)
        source = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        out |= _move(state, source, f"encoder.down.{level}.downsample.conv")
        theirs = levels - 1 - level
        for layer in range(layers + 1):
            source = f"decoder.up_blocks.{level}.resnets.{layer}"
            out |= _move(state, source, f"decoder.up.{theirs}.block.{layer}", shortcut)
        source = f"decoder.up_blocks.{level}.upsamplers.0.conv"
        out |= _move(state, source, f"decoder.up.{theirs}.upsample.conv")
    out |= _move(state, "quant_conv", "quant_conv")
    out |= _move(state, "post_quant_conv", "post_quant_conv")
    assert not state, f"not written: {sorted(state)}"
    return out


def _text(component: Path) -> Tensors:
    """OpenCLIP has one layer more than SD2 uses, and a projection."""
    loaded, config = _load(component)
    state = {k.removeprefix("text_model."): v for k, v in loaded.items()}
    state.pop("embeddings.position_ids", None)
    out = {
        **_move(state, "embeddings.token_embedding", "token_embedding"),
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        **_move(state, "final_layer_norm", "ln_final"),
        "text_projection": torch.eye(config["hidden_size"]),
        "logit_scale": torch.tensor(4.6),
    }
    depth = config["num_hidden_layers"]
    for layer in range(depth):
        source, target = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{source}.self_attn.{x}_proj.{kind}") for x in "qkv"]
            out[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
        out |= _move(state, source, target, CLIP)
    last = f"transformer.resblocks.{depth - 1}."
    unused = {k: torch.zeros_like(v) for k, v in out.items() if k.startswith(last)}
    out |= {k.replace(last, f"transformer.resblocks.{depth}."): v for k, v in unused.items()}
    assert not state, f"not written: {sorted(state)}"
    return out
