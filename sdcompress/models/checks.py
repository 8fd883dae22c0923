"""Is this directory a Stable Diffusion 2? Answered from JSON and safetensors headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdcompress.catalog import COMPONENTS, weight_files, weights_or_index
from sdcompress.errors import InputError
from sdcompress.safetensors_io import Header, read_header

CLASSES = {
    "unet": "UNet2DConditionModel",
    "text_encoder": "CLIPTextModel",
    "vae": "AutoencoderKL",
}
PARTS = (*CLASSES, "tokenizer", "scheduler")
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
EXPECTED = (
    "expected a Stable Diffusion 2 (UNet2DConditionModel, CLIPTextModel, AutoencoderKL, "
    "4 input channels)"
)
# Models that look close, by what gives them away.
_INPUT_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-editing or upscaling model",
    9: "an inpainting model",
}


def check_sd2_like(directory: Path) -> None:
    """Check components, their classes and sizes, and that the safetensors files are whole.

    Raises:
        InputError: with one line that names what was found, what was expected and how to fix it.
    """
    index = _model_index(directory)
    _check_classes(directory, index)
    unet = read_json(directory / "unet/config.json")
    text_encoder = read_json(directory / "text_encoder/config.json")
    vae = read_json(directory / "vae/config.json")
    _check_sizes(directory, unet, text_encoder, vae)
    headers = {name: _headers(directory / name) for name in COMPONENTS}
    _check_weights_fit(directory, unet, headers["unet"])


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; InputError where there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise InputError(
            f"{file}: expected this file of a diffusers directory, found none; download the "
            "model again"
        ) from e
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(
            f"{file}: expected a JSON object, found something unreadable; download the model again"
        ) from e
    if not isinstance(data, dict):
        raise InputError(f"{file}: expected a JSON object, found a {type(data).__name__}")
    return data


def _model_index(directory: Path) -> dict[str, Any]:
    file = directory / "model_index.json"
    if file.is_file():
        return read_json(file)
    found = sorted(p.name for p in directory.iterdir())
    shown = ", ".join(found[:5]) + (", …" if len(found) > 5 else "") if found else "nothing"
    checkpoints = [name for name in found if name.endswith(".safetensors")]
    fix = (
        f"for the single-file checkpoint in it, give {directory / checkpoints[0]}"
        if checkpoints
        else "give the directory that holds model_index.json"
    )
    raise InputError(
        f"{directory}: expected a diffusers directory with model_index.json, found {shown}; {fix}"
    )


def _check_classes(directory: Path, index: dict[str, Any]) -> None:
    pipeline = str(index.get("_class_name", ""))
    found = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    if "text_encoder_2" in found or "XL" in pipeline:
        raise InputError(f"{directory}: {EXPECTED}, found Stable Diffusion XL ({pipeline})")
    for name in PARTS:
        if name not in found:
            raise InputError(
                f"{directory}: {EXPECTED}, found a {pipeline or 'pipeline'} without {name}; "
                "use a complete model"
            )
        if name in CLASSES and found[name] != CLASSES[name]:
            raise InputError(f"{directory}: {EXPECTED}, found {found[name]} as its {name}")
        if not (directory / name).is_dir():
            raise InputError(
                f"{directory}: model_index.json names {name}, found no such directory; "
                "download the model again"
            )


def _check_sizes(
    directory: Path, unet: dict[str, Any], text_encoder: dict[str, Any], vae: dict[str, Any]
) -> None:
    channels = unet.get("in_channels")
    if channels != 4:
        kind = _INPUT_CHANNELS.get(channels, "another kind of model") if channels else "no config"
        raise InputError(
            f"{directory}: {EXPECTED}, found {channels} input channels, {kind}; "
            "use the text-to-image model"
        )
    if unet.get("addition_embed_type") or unet.get("class_embed_type"):
        raise InputError(f"{directory}: {EXPECTED}, found a UNet with additional conditioning")
    if unet.get("cross_attention_dim") != text_encoder.get("hidden_size"):
        raise InputError(
            f"{directory}: the UNet expects text features of {unet.get('cross_attention_dim')}, "
            f"its text encoder gives {text_encoder.get('hidden_size')}; "
            "they belong to different models"
        )
    if vae.get("latent_channels") != 4:
        raise InputError(
            f"{directory}: {EXPECTED}, found a VAE of {vae.get('latent_channels')} latent channels"
        )


def _headers(component: Path) -> list[Header]:
    """Read the headers of one component; each shard must hold what the index says."""
    has_safetensors = any(component.glob("*.safetensors"))
    pickled = sorted(p.name for p in component.iterdir() if p.suffix in PICKLED)
    if pickled and not has_safetensors:
        raise InputError(
            f"{component}: expected safetensors weights, found pickled ones ({pickled[0]}), which "
            "can run code when opened; use a safetensors model, or --allow-pickle if you trust it"
        )
    headers = [read_header(file) for file in weight_files(component)]
    if (index := weights_or_index(component)).suffix == ".json":
        weight_map = read_json(index).get("weight_map")
        held = {name: header.path.name for header in headers for name in header.tensors}
        if weight_map != held:
            odd = sorted(
                set(held.items()) ^ set(weight_map.items() if isinstance(weight_map, dict) else ())
            )
            raise InputError(
                f"{index}: it and the shards disagree about {odd[0][0]} in {odd[0][1]}; "
                "download the model again"
            )
    return headers


def _check_weights_fit(directory: Path, unet: dict[str, Any], headers: list[Header]) -> None:
    """A config from one model beside the weights of another shows at the UNet's first layer."""
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    first = tensors.get("conv_in.weight")
    if first is None:
        raise InputError(f"{directory}: {EXPECTED}, found UNet weights without conv_in.weight")
    expected = [*(unet.get("block_out_channels") or [None])[:1], unet["in_channels"]]
    if list(first.shape[:2]) != expected:
        raise InputError(
            f"{directory}: expected a first UNet layer of {expected} channels as in its config, "
            f"found {list(first.shape[:2])} in the weights; they belong to different models"
        )
