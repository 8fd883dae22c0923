"""Embeddings of pictures and prompts by a CLIP, shared by the metrics that need them."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.errors import InputError
from sdcompress.evaluation.metrics import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from sdcompress.bundle import Bundle
    from sdcompress.evaluation.quality import QualitySettings

SHIPPED = "mini-sd2"  # the small CLIP of this package
VIT_B_32 = "openai/clip-vit-base-patch32"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def default_clip(dense: Bundle) -> str:
    """The CLIP that suits a model: the small one for mini-sd2, else the common ViT-B/32."""
    return SHIPPED if dense.outline.source.kind == "mini-sd2" else VIT_B_32


def possible(settings: QualitySettings, dense: Bundle) -> str | None:
    """Why the CLIP cannot be had, and what to pass; None if it can."""
    return _problem(settings.clip or default_clip(dense))


@lru_cache
def _problem(name: str) -> str | None:
    try:
        _load(name)
    except InputError as e:
        return str(e)
    return None


def image_embeddings(batch: Batch) -> Tensor:
    """[n, d] in fp32, projected and not normalised."""
    return batch.once("clip images", lambda: _embed_images(batch))


def text_embeddings(batch: Batch) -> Tensor:
    """[n, d] in fp32, projected and not normalised; prompts are cut where the CLIP's text ends."""
    return _embed_prompts(_name(batch), tuple(batch.prompts))


@lru_cache(maxsize=1)  # the same prompts come with one model after the other
def _embed_prompts(name: str, prompts: tuple[str, ...]) -> Tensor:
    import torch

    model, tokenizer, _ = _load(name)
    longest = model.config.text_config.max_position_embeddings  # a tokenizer may not know it
    inputs = tokenizer(
        list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    with torch.no_grad():
        # Not get_text_features, which returns different things in transformers 4 and 5.
        pooled = model.text_model(**inputs.to(model.device)).pooler_output
        embeddings: Tensor = model.text_projection(pooled)
    return embeddings


def _embed_images(batch: Batch) -> Tensor:
    import torch
    from PIL import Image

    model, _, processor = _load(_name(batch))
    pictures = [Image.fromarray(image) for image in batch.images]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=pixels.to(model.device)).pooler_output
        embeddings: Tensor = model.visual_projection(pooled)
    return embeddings


def _name(batch: Batch) -> str:
    assert batch.settings.clip is not None  # `evaluate` fills it in
    return batch.settings.clip


@lru_cache(maxsize=1)
def _load(name: str) -> tuple[Any, Any, Any]:
    """A CLIPModel in fp32 where accelerate says, its tokenizer and its image processor."""
    import torch
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    from sdcompress.evaluation.processes import processes

    source = _directory(name)
    try:
        model = CLIPModel.from_pretrained(source, dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(source)
        processor = CLIPImageProcessor.from_pretrained(source)
    except Exception as e:  # transformers' own, those of its formats, and the system's
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"--clip {name}: not a CLIPModel that can be loaded ({reason:.150}); pass another"
        ) from e
    return model.to(processes().device).eval(), tokenizer, processor


def _directory(name: str) -> Path:
    """Where a CLIP lies; fetched from the hub only if it is neither here nor in the hub's cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from sdcompress.models.mini_sd2 import WEIGHTS

    if name == SHIPPED:
        return WEIGHTS / "clip"
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    try:
        with suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(name, local_files_only=True))
        # Asked first: without a network this fails at once, and a download tries for a minute.
        info = HfApi().model_info(name)
        listing = {sibling.rfilename for sibling in info.siblings or ()}
        weights = next((f for f in _WEIGHTS if f in listing), _WEIGHTS[0])
        files = ["*.json", "*.txt", weights]
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=files))
    except Exception as e:  # the client's, its HTTP library's and the system's errors alike
        raise InputError(
            f"--clip {name}: no such directory, not in the hub's cache, and not to be had from the "
            f"hub ({type(e).__name__}); pass --clip DIRECTORY, or connect to the network"
        ) from e
