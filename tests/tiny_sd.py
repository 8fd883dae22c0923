"""A seeded, tiny Stable Diffusion 2 on disk: every class of the real one, a million parameters.

Used wherever a test needs a pipeline but not a trained one. Building it takes about a second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

START, END = "<|startoftext|>", "<|endoftext|>"

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "norm_num_groups": 8,
}
TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 32,
    "hidden_act": "gelu",
    # As in SD2: 2 means "the position of the largest id", which END is.
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
LICENCE = "Apache License 2.0. Made by a test; it has learnt nothing.\n"


def make_tiny_sd(
    directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: dict[str, Any]
) -> Path:
    """Write a seeded `StableDiffusionPipeline` to `directory` (safetensors) and return `directory`.

    `overrides` change the configs: `unet={"layers_per_block": 2}`, likewise `text_encoder`, `vae`
    and `scheduler`. Every tensor gets values of its own, norms and biases included, so that a lost
    or swapped tensor shows.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    directory = Path(directory)
    vocabulary = _write_tokenizer(directory / "tokenizer")
    text_config = {"vocab_size": vocabulary, **TEXT_ENCODER, **overrides.get("text_encoder", {})}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        models = {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text_config)),
            "unet": UNet2DConditionModel(**{**UNET, **overrides.get("unet", {})}),
            "vae": AutoencoderKL(**{**VAE, **overrides.get("vae", {})}),
        }
        for model in models.values():
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            if dtype != torch.float32:
                model.to(dtype)
    pipeline = StableDiffusionPipeline(
        **models,
        tokenizer=CLIPTokenizer.from_pretrained(directory / "tokenizer"),
        scheduler=DDIMScheduler(**{**SCHEDULER, **overrides.get("scheduler", {})}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)
    (directory / "LICENSE").write_text(LICENCE)
    (directory / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\n# tiny-sd: a test's model\n"
    )
    return directory


def _write_tokenizer(directory: Path) -> int:
    """Write a CLIPTokenizer that knows bytes and a few merges; return its vocabulary size."""
    # CLIP's byte alphabet: printable bytes stand for themselves, the rest for 256, 257, …
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(b) for b in sorted(printable)] + [chr(256 + i) for i in range(len(rest))]
    merges = [("r", "e"), ("re", "d</w>"), ("a", "t</w>"), ("c", "at</w>")]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), START, END]
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    (directory / "vocab.json").write_text(
        json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "!"}
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, **special}))
    return len(words)
