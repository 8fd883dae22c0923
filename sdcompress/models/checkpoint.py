"""Single-file checkpoints, as trainers and web interfaces exchange them, to diffusers directories.

Such a file holds the UNet and the VAE under the names of the original latent diffusion code and
the text encoder under OpenCLIP's. Every tensor that diffusers wants is a run of bytes of one that
the file has (OpenCLIP keeps query, key and value in one), so importing copies bytes: no tensor is
ever loaded, and the values cannot change.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdcompress.errors import InputError, UsageError
from sdcompress.models.sd2 import CONFIGS, tensor_shapes, write_configs
from sdcompress.safetensors_io import DTYPES, Header, TensorInfo, read_header

WEIGHT_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
# SD 2.x, and the generation of training code that SD-Turbo comes from.
_TEXT = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
_CHUNK = 1 << 24


def config_name(header: Header, asked: str | None) -> str:
    """Which of `CONFIGS` a checkpoint is: what was asked for, else what its metadata says.

    Shapes cannot tell: the 512 and the 768 model differ in what their output means, nothing else.

    Raises:
        UsageError: not one of `CONFIGS`, or not asked for and not in the metadata.
    """
    choices = "; ".join(f"{name}: {what}" for name, what in CONFIGS.items())
    if asked is not None:
        if asked not in CONFIGS:
            raise UsageError(f"{asked}: not a Stable Diffusion 2 configuration; choose {choices}")
        return asked
    architecture = header.metadata.get("modelspec.architecture", "")
    prediction = header.metadata.get("modelspec.prediction_type", "")
    if "v2-768-v" in architecture or prediction in ("v", "v_prediction"):
        return "sd2-768"
    if "v2-512" in architecture or prediction == "epsilon":
        return "sd2-base"
    raise UsageError(
        f"{header.path}: the weights cannot tell which Stable Diffusion 2 this is; "
        f"say --config NAME ({choices})"
    )


def import_checkpoint(header: Header, configs: dict[str, dict[str, Any]], directory: Path) -> None:
    """Write the checkpoint as a diffusers directory of the architecture in `configs`.

    Raises:
        InputError: the file is another kind of model, or tensors are missing or of another shape.
    """
    layers = {name: config.get("layers_per_block", 0) for name, config in configs.items()}
    depth = configs["text_encoder"]["num_hidden_layers"]
    found = {
        "unet": _translated(header, (_UNET,), lambda key: _unet_key(key, layers["unet"])),
        "text_encoder": _text_tensors(header, depth),
        "vae": _translated(
            header, (_VAE,), lambda key: _vae_key(key, len(configs["vae"]["block_out_channels"]))
        ),
    }
    wanted = {c: _match(header, c, found[c], tensor_shapes(c, configs[c])) for c in found}
    write_configs(directory, configs)
    for component, tensors in wanted.items():
        write_copies(directory / component / WEIGHT_FILES[component], tensors)


def _translated(
    header: Header, prefixes: tuple[str, ...], translate: Callable[[str], str]
) -> dict[str, TensorInfo]:
    return {
        translate(key.removeprefix(prefix)): info
        for prefix in prefixes
        for key, info in header.tensors.items()
        if key.startswith(prefix)
    }


def _rename(key: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


_RESNET = (
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
)
_UNET_ENDS = (
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
)


def _unet_key(key: str, layers: int) -> str:
    """Latent diffusion numbers blocks in one row; diffusers by level, `layers` resnets in each."""
    key = _rename(key, _UNET_ENDS)
    if match := re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", key):
        side, block, part, rest = match[1], int(match[2]), int(match[3]), match[4]
        # Down: conv_in is block 0 and each level ends with a downsampler. Up: one resnet more.
        level, layer = divmod(block - (side == "input"), layers + 1)
        where = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
        if rest.startswith("op."):
            key = f"{where}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        elif rest.startswith("conv."):
            key = f"{where}.upsamplers.0.{rest}"
        else:
            key = f"{where}.{'attentions' if part else 'resnets'}.{layer}.{rest}"
    return _rename(key, _RESNET)


_VAE_NAMES = (
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)


def _vae_key(key: str, levels: int) -> str:
    """The original decoder counts its levels from the picture, diffusers from the latent."""
    if match := re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", key):
        part = "resnets" if match[2] == "block" else "upsamplers.0"
        key = f"decoder.up_blocks.{levels - 1 - int(match[1])}.{part}.{match[3]}"
    return _rename(key, _VAE_NAMES)


_TEXT_NAMES = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def _text_tensors(header: Header, depth: int) -> dict[str, TensorInfo]:
    """OpenCLIP's text tower up to layer `depth`; in_proj is cut into query, key and value."""
    tensors = {}
    for key, info in _translated(header, _TEXT, lambda key: _rename(key, _TEXT_NAMES)).items():
        layer = re.match(r"encoder\.layers\.(\d+)\.", key)
        if layer and int(layer[1]) >= depth:
            continue  # SD2 stops one layer early; the file has them all
        for name, part in _thirds(f"text_model.{key}", info):
            tensors[name] = part
    return tensors


def _thirds(name: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    match = re.fullmatch(r"(.*\.self_attn\.)in_proj_(weight|bias)", name)
    if match is None or info.shape[0] % 3:
        yield name, info
        return
    shape, nbytes = (info.shape[0] // 3, *info.shape[1:]), info.nbytes // 3
    for i, letter in enumerate("qkv"):
        offset = info.offset + i * nbytes
        yield (
            f"{match[1]}{letter}_proj.{match[2]}",
            replace(info, shape=shape, offset=offset, nbytes=nbytes),
        )


def _match(
    header: Header,
    component: str,
    found: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, TensorInfo]:
    """The tensors the architecture wants, in its order, under its names and shapes."""
    wanted = {}
    for name, shape in shapes.items():
        info = found.get(name)
        if info is None:
            raise InputError(
                f"{header.path}: expected a whole Stable Diffusion 2 checkpoint, found "
                f"{_what_it_is(header)} without {component} tensor {name}"
            )
        # The VAE's attention was a 1×1 convolution once: the same bytes under another shape.
        if info.shape not in (shape, (*shape, 1, 1)):
            raise InputError(
                f"{header.path}: expected {component} tensor {name} of shape {list(shape)}, found "
                f"{list(info.shape)} in {_what_it_is(header)}; use a Stable Diffusion 2 checkpoint"
            )
        wanted[name] = replace(info, name=name, shape=shape)
    return wanted


def _what_it_is(header: Header) -> str:
    keys = header.tensors
    if any(k.startswith("conditioner.embedders.1.") for k in keys):
        return "Stable Diffusion XL"
    if any(k.startswith("cond_stage_model.transformer.") for k in keys):
        return "Stable Diffusion 1"
    if (first := keys.get(f"{_UNET}input_blocks.0.0.weight")) and first.shape[1:2] != (4,):
        return f"a model of {first.shape[1]} input channels (9: inpainting, 5: depth)"
    if any("lora" in k for k in keys):
        return "a LoRA (use --lora FILE:scale beside a whole model)"
    if not any(k.startswith(_UNET) for k in keys):
        return "a file of other contents"
    return "a Stable Diffusion checkpoint"


def write_copies(file: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Write a safetensors file of tensors whose bytes lie in other files; memory stays small."""
    # Large types first: every tensor then starts at a multiple of its type's size.
    ordered = sorted(tensors.items(), key=lambda item: -DTYPES[item[1].dtype][1])
    with file.open("xb") as out:
        out.write(encode_header((name, i.dtype, i.shape) for name, i in ordered))
        for _, info in ordered:
            with info.file.open("rb") as f:
                f.seek(info.offset)
                left = info.nbytes
                while left:
                    chunk = f.read(min(left, _CHUNK))
                    if not chunk:
                        raise InputError(f"{info.file}: it shrank while being read")
                    out.write(chunk)
                    left -= len(chunk)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file whose tensors (name, dtype, shape) follow in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * DTYPES[dtype][1]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    return len(text).to_bytes(8, "little") + text


def unpickle(file: Path, target: Path) -> Header:
    """Rewrite a pickled state dict as safetensors. It runs whatever code the file holds.

    Raises:
        InputError: the file holds no state dict.
    """
    import torch
    from safetensors.torch import save_file

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=False)
    except Exception as e:  # pickle can raise anything
        raise InputError(f"{file}: cannot be unpickled ({type(e).__name__}: {e})") from e
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {k: v.clone().contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise InputError(f"{file}: expected a pickled state dict, found no tensors in it")
    save_file(tensors, target)
    return read_header(target)
