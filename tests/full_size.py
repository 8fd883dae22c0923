"""SD2-base's exact geometry without its bytes: headers of the real size over sparse files."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}


@cache
def modules() -> dict[str, torch.nn.Module]:
    """The real modules on the meta device."""
    with torch.device("meta"):
        return {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
            "unet": UNet2DConditionModel(**UNET),
        }


def write_hollow_sd2(directory: Path) -> Path:
    """A diffusers directory whose weight files have true headers and no data on the disk."""
    for component, module in modules().items():
        header, end = {}, 0
        for name, parameter in module.named_parameters():
            nbytes = 2 * math.prod(parameter.shape)
            header[name] = {
                "dtype": "F16",
                "shape": list(parameter.shape),
                "data_offsets": [end, end + nbytes],
            }
            end += nbytes
        text = json.dumps(header).encode()
        file = directory / component / "diffusion_pytorch_model.safetensors"
        file.parent.mkdir(parents=True)
        with file.open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + end)
    return directory
