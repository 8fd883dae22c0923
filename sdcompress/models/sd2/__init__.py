"""What every Stable Diffusion 2 shares: its architecture as configs, its tokenizer, its schedulers.

A single-file checkpoint holds weights only. With this package it becomes a diffusers directory
without a download.
"""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

from sdcompress.models import modules

_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    # diffusers' historical name for the number of heads of each block: 64 channels a head.
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "use_linear_projection": True,
}
# OpenCLIP ViT-H/14's text tower without its last layer: SD2 conditions on the penultimate one.
_TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "vocab_size": 49408,
    "bos_token_id": 0,
    # 2 means "pool at the largest id", which the end token has.
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# Distilled for one to four steps: these must start at the last, noisiest timestep.
_TURBO_SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
}
START, END = "<|startoftext|>", "<|endoftext|>"
_TOKENIZER: dict[str, Any] = {
    "tokenizer_class": "CLIPTokenizer",
    "add_prefix_space": False,
    "bos_token": START,
    "do_lower_case": True,
    "eos_token": END,
    "errors": "replace",
    "model_max_length": 77,
    "pad_token": "!",  # SD2 was trained with id 0 as padding
    "unk_token": END,
}

CONFIGS = {
    "sd2-base": "512 pixels, epsilon prediction (SD 2.0-base, 2.1-base and their fine-tunes)",
    "sd2-768": "768 pixels, v prediction (SD 2.0, 2.1 and their fine-tunes)",
    "sd-turbo": "512 pixels, epsilon prediction, one to four steps without guidance",
}


def component_configs(name: str) -> dict[str, dict[str, Any]]:
    """The configs of `name`, one of `CONFIGS`: unet, text_encoder, vae and scheduler."""
    configs = copy.deepcopy(
        {"unet": _UNET, "text_encoder": _TEXT_ENCODER, "vae": _VAE, "scheduler": _SCHEDULER}
    )
    if name == "sd2-768":
        # 2.1 overflows fp16 in attention unless it is upcast; harmless for 2.0.
        configs["unet"] |= {"sample_size": 96, "upcast_attention": True}
        configs["vae"]["sample_size"] = 768
        configs["scheduler"]["prediction_type"] = "v_prediction"
    elif name == "sd-turbo":
        configs["scheduler"] = copy.deepcopy(_TURBO_SCHEDULER)
    elif name != "sd2-base":
        raise ValueError(f"no SD2 configuration is named {name}")
    return configs


def tensor_shapes(component: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """State-dict key → shape of a component with this config, in state-dict order.

    Nothing is allocated. The text encoder's keys have the prefix of the published files, which
    newer transformers classes have dropped.
    """
    import torch

    with torch.device("meta"):
        model = modules.build(component, config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if component == "text_encoder":
        shapes = {f"{modules.PREFIX}{k.removeprefix(modules.PREFIX)}": s for k, s in shapes.items()}
    return shapes


def write_configs(directory: Path, configs: dict[str, dict[str, Any]]) -> None:
    """Write everything of a diffusers directory but the weights, the tokenizer included."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", configs["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(directory / "model_index.json", index)
    for component, config in configs.items():
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        _write_json(directory / component / file, config)
    write_tokenizer(directory / "tokenizer")


def write_tokenizer(directory: Path) -> None:
    """Write CLIP's tokenizer in the files that `CLIPTokenizer.from_pretrained` reads."""
    merges = gzip.decompress((Path(__file__).parent / "tokenizer/merges.txt.gz").read_bytes())
    _write_json(directory / "tokenizer_config.json", _TOKENIZER)
    special = {k: v for k, v in _TOKENIZER.items() if k.endswith("_token")}
    _write_json(directory / "special_tokens_map.json", special)
    (directory / "merges.txt").write_bytes(merges)
    vocabulary = json.dumps(_vocabulary(merges.decode("utf-8")), ensure_ascii=False)
    (directory / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")


def _vocabulary(merges: str) -> dict[str, int]:
    """Token → id: every byte, every byte that ends a word, every merge, the two marks.

    A byte is written as a visible character: itself where Latin-1 shows one, else the next
    character from 256 on, and the visible ones come first.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 256 - len(visible)
    symbols = [chr(b) for b in visible] + [chr(256 + i) for i in range(hidden)]
    pairs = merges.splitlines()[1:]  # the first line is the format's version
    tokens = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *(p.replace(" ", "") for p in pairs),
        START,
        END,
    ]
    return {token: i for i, token in enumerate(tokens)}


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
