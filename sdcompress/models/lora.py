"""Merging LoRA files into a model before it is pruned: the zeros must be those of the sum.

Three ways of naming the same thing are read: diffusers and PEFT (`unet.a.b.lora_A.weight`),
older diffusers (`unet.a.b.processor.to_q_lora.down.weight`) and the trainers around kohya's
(`lora_unet_a_b.lora_down.weight`, with an alpha beside). The model streams through tensor by
tensor, so merging costs the memory of the LoRA and of one tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.bundle import link_or_copy, sha256_file
from sdcompress.catalog import model_files, weight_files
from sdcompress.errors import InputError, UsageError
from sdcompress.models.checks import PICKLED
from sdcompress.models.modules import is_narrow
from sdcompress.safetensors_io import StreamWriter, raw_bytes, read_header, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

_COMPONENTS = ("unet", "text_encoder")
_ROLES = (
    (
        "down",
        re.compile(r"(\.lora_A|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight$"),
    ),
    ("up", re.compile(r"(\.lora_B|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
)
_PREFIXES = {
    "unet": re.compile(r"^(unet\.|lora_unet_)"),
    "text_encoder": re.compile(r"^(text_encoder\.|lora_te_)"),
}
# Older diffusers names what an attention layer does, not the module that does it.
_ALIASES = {
    "unet": {"to_out": "to_out_0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}


@dataclass(frozen=True)
class Lora:
    """A LoRA file and the factor its change is added with."""

    file: Path
    scale: float

    def record(self) -> str:
        """What the manifest says of it: name, contents and scale."""
        return f"{self.file.name}@sha256:{sha256_file(self.file)}:{self.scale:g}"


@dataclass(frozen=True)
class _Change:
    """ΔW = factor · up · down, with up [out, rank] and down [rank, everything else]."""

    lora: Lora
    up: Tensor
    down: Tensor
    factor: float


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
        scale = math.nan
    if not math.isfinite(scale):
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

    W ← W + Σ scale · (alpha / rank) · up · down (Hu et al. 2021), summed in float32 and rounded
    once to the stored type.

    Raises:
        InputError: a LoRA is of a kind that is not read, or does not fit the model.
    """
    shapes = {
        (component, name): info.shape
        for component in _COMPONENTS
        for file in weight_files(model / component)
        for name, info in read_header(file).tensors.items()
    }
    narrower = {component for component in _COMPONENTS if is_narrow(model / component)}
    changes: dict[tuple[str, str], list[_Change]] = {}
    for lora in loras:
        for weight, change in _changes(lora, shapes, narrower).items():
            changes.setdefault(weight, []).append(change)
    rewritten = set()
    for component in _COMPONENTS:
        for file in weight_files(model / component):
            of_file = {name: c for (part, name), c in changes.items() if part == component}
            _rewrite(file, of_file, directory / component / file.name)
            rewritten.add(file)
    for file in model_files(model):
        if file not in rewritten:
            link_or_copy(file, directory / file.relative_to(model))


def _changes(
    lora: Lora, shapes: Mapping[tuple[str, str], tuple[int, ...]], narrower: Collection[str]
) -> dict[tuple[str, str], _Change]:
    """(component, state-dict key) → what the LoRA adds to that weight."""
    tensors, settings = _read(lora.file)
    flat = {
        component: {
            _flat(name.removesuffix(".weight")): name
            for part, name in shapes
            if part == component and name.endswith(".weight")
        }
        for component in _COMPONENTS
    }
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        role, module = _role(lora, key)
        weight = _weight(module, flat)
        if weight is None:
            raise InputError(
                f"{lora.file}: expected a LoRA for this model, but the model has nothing that "
                f"{key} could change; use one trained on the same Stable Diffusion"
            )
        found.setdefault(weight, {})[role] = tensor
    changes = {}
    for weight, parts in found.items():
        name = ".".join(weight)
        if not {"up", "down"} <= parts.keys():
            raise InputError(
                f"{lora.file}: it has only half of the change to {name}; it is damaged"
            )
        up, down = parts["up"].float().flatten(1), parts["down"].float().flatten(1)
        rank, shape = down.shape[0], shapes[weight]
        fits = (up.shape[0], up.shape[1], down.shape[1]) == (shape[0], rank, math.prod(shape[1:]))
        if not fits:
            fix = "use one trained on the same Stable Diffusion"
            if weight[0] in narrower:
                fix = "this model has lost blocks, merge the LoRA into the one it was made from"
            raise InputError(
                f"{lora.file}: expected a LoRA for this model, but its change to {name} is "
                f"{up.shape[0]}×{down.shape[1]} and the weight {shape[0]}×{math.prod(shape[1:])}; "
                f"{fix}"
            )
        alpha = float(parts["alpha"]) if "alpha" in parts else settings.alpha(weight, rank)
        changes[weight] = _Change(lora, up, down, lora.scale * alpha / rank)
    return changes


def _role(lora: Lora, key: str) -> tuple[str, str]:
    """What a tensor of the file is ("up", "down" or "alpha"), and of which module."""
    for role, pattern in _ROLES:
        if match := pattern.search(key):
            return role, key[: match.start()]
    raise InputError(
        f"{lora.file}: expected a LoRA (pairs of up and down weights), found {key}; LoHa, LoKr, "
        "DoRA and textual inversion are not read, merge such a file with the tool it was made with"
    )


def _weight(module: str, flat: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """The weight a module's name means, whichever way it is spelled."""
    module = module.removeprefix("base_model.model.").replace(".processor.", ".")
    component = next((c for c, prefix in _PREFIXES.items() if prefix.search(module)), "unet")
    name = _flat(_PREFIXES[component].sub("", module))
    spellings = [name]
    for old, new in _ALIASES[component].items():
        if name.endswith(f"_{old}"):
            spellings.append(name.removesuffix(old) + new)
    key = next((flat[component][s] for s in spellings if s in flat[component]), None)
    return None if key is None else (component, key)


def _flat(module: str) -> str:
    """A module's name without dots, and without the prefix only some versions of CLIP have."""
    return re.sub(r"\W", "_", module.removeprefix("text_model.")).removeprefix("text_model_")


@dataclass(frozen=True)
class _Settings:
    """PEFT's settings, which newer diffusers writes into the file's metadata."""

    values: Mapping[str, Any]

    def alpha(self, weight: tuple[str, str], rank: int) -> float:
        """The alpha of one weight; the rank, which means a factor of 1, where none is given."""
        component, name = weight
        module = name.removesuffix(".weight")
        alpha = self.values.get(f"{component}.lora_alpha", rank)
        for pattern, value in (self.values.get(f"{component}.alpha_pattern") or {}).items():
            if module == pattern or module.endswith(f".{pattern}"):
                alpha = value
        # Rank-stabilised LoRA divides by the root of the rank (Kalajdzievski 2023).
        root = math.sqrt(rank) if self.values.get(f"{component}.use_rslora") else 1.0
        return float(alpha) * root


def _read(file: Path) -> tuple[dict[str, Tensor], _Settings]:
    if file.suffix in PICKLED:
        import torch

        state = torch.load(file, map_location="cpu", weights_only=False)
        return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}, _Settings({})
    header = read_header(file)
    try:
        settings = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as e:
        raise InputError(f"{file}: its lora_adapter_metadata is not valid JSON") from e
    for component in _COMPONENTS:
        if settings.get(f"{component}.use_dora"):
            raise InputError(f"{file}: expected a LoRA, found a DoRA, which is not read; merge it")
    tensors = {name: read_tensor(info) for name, info in header.tensors.items()}
    if not tensors:
        raise InputError(f"{file}: expected a LoRA, found a file without tensors")
    return tensors, _Settings(settings)


def _rewrite(file: Path, changes: Mapping[str, Sequence[_Change]], target: Path) -> None:
    """Write `file` with the changes added, in the types, order and header it has."""
    header = read_header(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with StreamWriter(target, header) as out:
        for name, info in header.tensors.items():
            weight = read_tensor(info)
            if name in changes:
                total = weight.float()
                for change in changes[name]:
                    delta = (change.up @ change.down).reshape(total.shape)
                    total = total.add_(delta, alpha=change.factor)
                weight = total.to(weight.dtype)
            out.write_tensor(info, raw_bytes(weight))
