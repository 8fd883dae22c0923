"""Stage 3: a small CLIP, for scores. Its text tower starts as the trained text encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fit import draw, fit, world
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)
from vae import to_tensor

from sdcompress.models.mini_sd2.scenes import (
    BACKGROUNDS,
    COLOURS,
    PHRASINGS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    render,
    sample_scenes,
    split_of,
)

STEPS = 300
BATCH = 128
LEARNING_RATE = 1e-3
WIDTH = 128
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "projection_dim": 64,
}


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """SD2's kind of text encoder, three layers deep, for captions of 32 tokens."""
    return CLIPTextConfig(
        **TOWER,
        num_hidden_layers=3,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP of 64-pixel pictures in 8-pixel patches and captions of 32 tokens."""
    vision = CLIPVisionConfig(**TOWER, num_hidden_layers=2, image_size=64, patch_size=8)
    text = text_config(tokenizer)
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (n, 32), padded as the pipeline pads them."""
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert isinstance(ids, Tensor)
    return ids


def vary(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing about it changed, still of a trained combination."""
    while True:
        things, relation, background = list(scene.things), scene.relation, scene.background
        what = rng.integers(5)
        if what == 0:
            background = rng.choice(list(BACKGROUNDS)).item()
        elif what == 1 and relation:
            relation = rng.choice(list(RELATIONS)).item()
        elif what >= 2:
            i = rng.integers(len(things))
            name, group = (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES))[what - 2]
            things[i] = replace(things[i], **{name: rng.choice(list(group)).item()})
        other = Scene(tuple(things), relation, background)
        distinct = len({t.colour for t in things}) == len(things)
        if other != scene and distinct and split_of(other) == "train":
            return other


def train_clip(
    work: Path, seed: int, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> tuple[CLIPModel, dict[str, float]]:
    """Train contrastively on scenes drawn afresh for every batch, or load the finished training."""
    torch.manual_seed(seed)
    clip = build_clip(tokenizer)
    clip.text_model.load_state_dict(text_encoder.text_model.state_dict())

    def loss_fn(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        own = draw(seed, step)
        rng = np.random.default_rng(own)
        # Half of the batch is the other half with one thing changed: whoever tells those apart
        # has to look at everything a caption says.
        scenes = sample_scenes(BATCH // world() // 2, None, "train", own)
        scenes += [vary(scene, rng) for scene in scenes]
        texts = [caption(scene, int(rng.integers(2 * len(PHRASINGS)))) for scene in scenes]
        ids = tokenize(tokenizer, texts)
        out = clip(input_ids=ids, pixel_values=to_tensor(render(scenes, own)))
        logits = out.logits_per_text
        # Chance repeats a scene now and then; both copies are right answers.
        keys = [frozenset((s, s.converse())) for s in scenes]
        same = torch.from_numpy(np.array([[a == b for b in keys] for a in keys])).float()
        target = same / same.sum(1, keepdim=True)
        loss = -(target * (logits.log_softmax(1) + logits.t().log_softmax(1))).sum(1).mean() / 2
        right = (same.gather(1, logits.detach().argmax(1, keepdim=True))).mean()
        return {"loss": loss, "right": right}

    report = fit(
        "clip", clip, loss_fn, steps=STEPS, lr=LEARNING_RATE, work=work, seed=seed,
        weight_decay=0.05, warmup=100, ema_decay=0.99,
    )  # fmt: skip
    return clip, report
