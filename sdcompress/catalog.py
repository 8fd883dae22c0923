"""What a model has to prune, read from configs and safetensors headers: no weights, no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdcompress.errors import InputError
from sdcompress.safetensors_io import PRUNABLE_DTYPES, Header, read_header

COMPONENTS = ("text_encoder", "unet", "vae")
Kind = Literal["linear", "conv", "embedding", "other"]


@dataclass(frozen=True)
class Layer:
    """One tensor of a component; `why_not` says why no rule may touch it, None if one may."""

    component: str
    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    why_not: str | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Catalog:
    """All layers in the order of their files, and the headers they were read from."""

    layers: tuple[Layer, ...]
    headers: dict[str, tuple[Header, ...]]  # component → its shards

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.headers)

    @property
    def parameters(self) -> dict[str, int]:
        return {c: sum(layer.numel for layer in self.of(c)) for c in self.components}

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Of a component's tensors, in the order of its files."""
        return {layer.name: layer.shape for layer in self.of(component)}

    def folder(self, component: str) -> Path:
        return self.headers[component][0].path.parent

    def of(self, component: str) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.component == component)


def read_catalog(model: Path) -> Catalog:
    """Read the catalog of a diffusers directory.

    Raises:
        InputError: a component or its weights are missing, truncated or corrupt.
    """
    headers = {
        c: tuple(read_header(f) for f in weight_files(model / c))
        for c in COMPONENTS
        if c != "vae" or (model / c).is_dir()
    }
    layers = tuple(
        _layer(component, info.name, info.shape, info.dtype)
        for component, shards in headers.items()
        for header in shards
        for info in header.tensors.values()
        if info.dtype.startswith(("F", "BF"))  # position_ids and the like are no parameters
    )
    return Catalog(layers, headers)


def read_config(component: Path) -> dict[str, Any]:
    """The `config.json` in the folder of a component.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    file = component / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(
            f"{file}: expected the component's configuration, found none that can be read; "
            "download or make the model again"
        ) from e
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a JSON object; download or make the model again")
    return config


def weight_files(component: Path) -> list[Path]:
    """The safetensors files of one component, shards in order.

    Raises:
        InputError: there are none, or the index names no shard or one that is missing.
    """
    file = weights_or_index(component)
    return _shards(file) if file.suffix == ".json" else [file]


def weights_or_index(component: Path) -> Path:
    """The index of shards or the single file; a variant's only where there is nothing plain.

    Raises:
        InputError: there is neither.
    """
    for variant in ("", ".fp16"):
        for index in sorted(component.glob(f"*.safetensors.index{variant}.json")):
            return index
        for name in ("diffusion_pytorch_model", "model"):
            if (file := component / f"{name}{variant}.safetensors").is_file():
                return file
    found = ", ".join(sorted(p.name for p in component.glob("*"))) or "nothing"
    raise InputError(
        f"{component}: expected safetensors weights, found {found}; convert the model with "
        "`pipeline.save_pretrained(DIR, safe_serialization=True)`"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [index.parent / Path(n).name for n in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{index}: not a valid index of shards; download the model again") from e
    if not files:
        raise InputError(f"{index}: names no shards; download the model again")
    if missing := [f.name for f in files if not f.is_file()]:
        raise InputError(f"{index.parent}: the index names {missing[0]}, which is missing")
    return files


CARRIED = ("README*", "LICEN[CS]E*", "NOTICE*", "MODEL_CARD*")
_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".onnx", ".onnx_data", ".msgpack", ".h5", ".pb")


def model_files(model: Path) -> list[Path]:
    """The files a pipeline needs, and its licence and model card.

    Left out: weights in other formats or variants than the one the catalog reads, pictures, and
    whole-model checkpoints lying beside the components.
    """
    index = json.loads((model / "model_index.json").read_text())
    files = [model / "model_index.json"]
    files += sorted(f for glob in CARRIED for f in model.glob(glob) if f.is_file())
    for component, classes in sorted(index.items()):
        directory = model / component
        if not isinstance(classes, list) or not directory.is_dir():
            continue
        present = sorted(f for f in directory.rglob("*") if f.is_file())
        chosen = set(weight_files(directory)) if any(_is_weight(f) for f in present) else set()
        files += [
            f
            for f in present
            if not f.name.endswith(_OTHER_WEIGHTS) and (f in chosen or not _is_weight(f))
        ]
    return files


def _is_weight(file: Path) -> bool:
    return file.suffix == ".safetensors"


def _layer(component: str, name: str, shape: tuple[int, ...], dtype: str) -> Layer:
    kind = _kind(name, shape)
    why_not = None
    if kind == "embedding":
        why_not = "an embedding is a table, not a matrix product"
    elif kind == "other":
        why_not = "bias or normalisation"
    elif dtype not in PRUNABLE_DTYPES:
        why_not = f"{dtype} weights are not supported (F16, BF16 and F32 are)"
    return Layer(component, name, kind, shape, dtype, why_not)


def _kind(name: str, shape: tuple[int, ...]) -> Kind:
    """A key and a shape tell SD2's modules apart; a test holds this against the real modules."""
    if not name.endswith("weight") or len(shape) not in (2, 4):
        return "other"
    if len(shape) == 4:
        return "conv"
    return "embedding" if name.endswith("embedding.weight") else "linear"
