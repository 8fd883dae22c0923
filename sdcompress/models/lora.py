"""Merging LoRA files into a model before it is pruned: the zeros must be those of the sum."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcompress.bundle import link_or_copy, sha256_file
from sdcompress.catalog import model_files, weight_files
from sdcompress.errors import InputError, UsageError
from sdcompress.models.checks import PICKLED
from sdcompress.safetensors_io import StreamWriter, raw_bytes, read_header, read_tensor


@dataclass(frozen=True)
class Lora:
    """A LoRA file and the factor its change is added with."""

    file: Path
    scale: float

    def record(self) -> str:
        """What the manifest says of it: name, contents and scale."""
        return f"{self.file.name}@sha256:{sha256_file(self.file)}:{self.scale:g}"


def parse_lora(text: str, *, allow_pickle: bool = False) -> Lora:
    """Read `FILE:scale`; the scale is 1 where it is not given.

    Raises:
        UsageError: the scale is not a finite number.
        InputError: there is no such file, or it is pickled.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).is_file():
        name, number = text, "1"
    try:
        scale = float(number)
    except ValueError:
        scale = float("nan")
    if not abs(scale) < float("inf"):
        raise UsageError(f"--lora {text}: expected FILE:scale with a number as scale, as in a:0.8")
    file = Path(name)
    if not file.is_file():
        raise InputError(f"{name}: no such LoRA file; give a local .safetensors file")
    if file.suffix in PICKLED and not allow_pickle:
        raise InputError(
            f"{name}: expected a safetensors LoRA, found a pickled file, which can run code when "
            "opened; convert it, or say --allow-pickle if you trust it"
        )
    return Lora(file, scale)


def merge(model: Path, loras: Sequence[Lora], directory: Path) -> None:
    """Write `model` with the LoRAs added to its UNet and text encoder; the rest is linked.

    W ← W + scale · (alpha / rank) · B A, computed in float32 and rounded once to the stored type.

    Raises:
        InputError: a LoRA does not fit the model or changes nothing in it.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        model, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    for i, lora in enumerate(loras):
        _add(pipeline, lora, f"lora{i}")
    rewritten = set()
    for component in ("unet", "text_encoder"):
        state = getattr(pipeline, component).state_dict()
        # transformers 5 classes have dropped the prefix that the files keep
        state |= {f"text_model.{name}": tensor for name, tensor in state.items()}
        for file in weight_files(model / component):
            _rewrite(file, state, directory / component / file.name)
            rewritten.add(file)
    for file in model_files(model):
        if file not in rewritten:
            link_or_copy(file, directory / file.relative_to(model))


def _add(pipeline: Any, lora: Lora, name: str) -> None:
    import torch

    before = _fingerprint(pipeline)
    try:
        with warnings.catch_warnings():
            # A file for UNet and text encoder both, or for one of them: either is fine.
            warnings.simplefilter("ignore")
            pipeline.load_lora_weights(_lora_state(lora.file), adapter_name=name)
            pipeline.fuse_lora(lora_scale=lora.scale, adapter_names=[name], safe_fusing=True)
            pipeline.unload_lora_weights()
    except (ValueError, KeyError, RuntimeError, torch.OutOfMemoryError) as e:
        raise InputError(
            f"{lora.file}: expected a LoRA for this model, but it does not fit "
            f"({str(e).strip().splitlines()[0]}); use one trained on the same Stable Diffusion"
        ) from e
    if lora.scale and _fingerprint(pipeline) == before:
        raise InputError(
            f"{lora.file}: expected a LoRA for this model, found nothing in it that changes the "
            "UNet or the text encoder; use one trained on the same Stable Diffusion"
        )


def _lora_state(file: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    if file.suffix in PICKLED:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
        return state
    read_header(file)  # a truncated file gets our one line, not a traceback
    return load_file(file)


def _fingerprint(pipeline: Any) -> tuple[float, ...]:
    """Any change of a Linear or Conv weight shows here; adapters' own tensors are gone by then."""
    return tuple(
        float(p.double().abs().sum())
        for model in (pipeline.unet, pipeline.text_encoder)
        for p in model.parameters()
        if p.dim() > 1
    )


def _rewrite(file: Path, state: dict[str, Any], target: Path) -> None:
    """Write `file` with the values of `state`, in the types, order and header it has."""
    header = read_header(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with StreamWriter(target, header) as out:
        for name, info in header.tensors.items():
            old = read_tensor(info)
            new = state.get(name)
            out.write(info, raw_bytes(old if new is None else new.to(old.dtype)))
