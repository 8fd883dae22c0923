"""Weights + configs → ONNX bundle, in two steps that know nothing of each other.

`build_skeleton` gives the graph of the *architecture* and the map to its weights, out of the cache
or by tracing (`export.tracing`). `fill` then streams the real weights to the places the map names:
what is all there is to do where the graph is known, and then the only part that needs more than
files, bytes and hashes is a cast.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from export.graph_cache import Skeleton, cached
from export.specs import (
    COMPONENTS,
    MODEL_OF,
    NUMPY_DTYPES,
    OPSET,
    DTypeName,
    canonical_key,
    unused_key,
)
from export.weight_map import DATA, Entry, WeightMap
from sdcompress.bits import Array, all_finite, in_memory, is_zero, pieces, room, slices
from sdcompress.bundle import (
    Bundle,
    FileRecord,
    Manifest,
    TensorRecord,
    carry_over,
    seal,
    staging,
    tool_versions,
)
from sdcompress.catalog import read_catalog, read_config
from sdcompress.errors import InputError, UsageError
from sdcompress.hashed_file import HashedFile
from sdcompress.prune import record_tensor
from sdcompress.safetensors_io import TensorInfo, as_tensor, raw_bytes, read_finite
from sdcompress.structure import RECORD

if TYPE_CHECKING:
    from export.ranges import Ranges

MODEL = "model.onnx"
# What configs say that is no matter of the architecture: who wrote them, and from where.
_WHENCE = ("_name_or_path", "_diffusers_version", "transformers_version", "_commit_hash")
_STRIP = 16  # columns: what is written of a row fills a line of the cache, or half of one
RECORD_DTYPES: dict[DTypeName, str] = {"fp16": "F16", "fp32": "F32"}  # as safetensors calls them
UpcastAttention = Literal["auto", "on", "off"]
Progress = Callable[[str, int], None]  # what, how many bytes of weights were done


def _silent(what: str, nbytes: int) -> None:
    pass


@dataclass(frozen=True)
class Filled:
    """What `fill` wrote: a record of each tensor, the weights that became zero by the cast, and
    the record of the data file.

    The first two are keyed like the source's state dict.
    """

    records: dict[str, TensorRecord]
    underflow: dict[str, int]
    data: FileRecord


def export_bundle(
    source: Bundle,
    out: Path,
    *,
    dtype: DTypeName = "fp16",
    opset: int = OPSET,
    components: Sequence[str] = COMPONENTS,
    upcast_attention: UpcastAttention = "auto",
    keep_fp32: Ranges | None = None,
    replace: bool = False,
    progress: Progress = _silent,
) -> Bundle:
    """Export a weight bundle to ONNX in the layout optimum's pipelines load.

    In an fp16 graph, `upcast_attention` computes the UNet's attention scores and their softmax in
    fp32 (`auto`: where its config asks for that), and `keep_fp32` every value that left the range
    of fp16 when the ranges were recorded; the bundle then holds them as `ranges.json`.

    Raises:
        UsageError: an opset the exporter cannot write, or ranges of another graph or for fp32.
        InputError: `out` exists and `replace` is not given, or a tensor is missing, unknown, not
            finite or too large for `dtype`.
    """
    catalog = read_catalog(source.path)
    plan = source.outline.plan
    tensors: dict[str, dict[str, TensorRecord]] = {}
    underflow: dict[str, dict[str, int]] = {}
    layers: dict[str, list[str]] = {}
    products: dict[str, list[str]] = {}
    upcast = False
    if keep_fp32 and dtype != "fp16":
        raise UsageError(f"{dtype} needs no layer kept in fp32; leave out the ranges")
    known: dict[str, FileRecord] = {}
    with staging(out, replace=replace) as work:
        for component in components:
            progress(f"tracing {component}", 0)
            model = MODEL_OF[component]
            config = read_config(source.path / model)
            skeleton = build_skeleton(component, config, dtype, opset)
            if dtype == "fp16":
                scores = _upcast(component, config, upcast_attention)
                kept = keep_fp32.kept(component, skeleton.digest) if keep_fp32 else ()
                skeleton = widen(skeleton, kept, upcast_attention=scores)
                layers[component] = list(skeleton.fp32_layers)
                products[component] = list(skeleton.fp32_products)
                upcast |= scores
            filled = fill(
                skeleton,
                {i.name: i for h in catalog.headers[model] for i in h.tensors.values()},
                work / component,
                pruned={p.name for p in plan.of(model) if p.pruned} if plan else (),
                progress=progress,
            )
            tensors[model], underflow[model] = filled.records, filled.underflow
            known[f"{component}/{DATA}"] = filled.data
        if keep_fp32:
            keep_fp32.write(work)
        known |= _carry_over(source, components, work)
        manifest = Manifest(
            stage="onnx",
            parent=source.digest,
            source=source.manifest.source,
            recipe=source.manifest.recipe,
            tools=tool_versions(),
            plan=plan,
            tensors=tensors,
            details={
                "dtype": dtype,
                "opset": opset,
                "components": list(components),
                "underflow": {model: zeros for model, zeros in underflow.items() if zeros},
                "upcast_attention": upcast,
                "kept_fp32": {c: names for c, names in layers.items() if names},
                "fp32_products": {c: names for c, names in products.items() if names},
                **{k: v for k, v in source.manifest.details.items() if k == RECORD},
            },
        )
        seal(work, manifest, known=known)
    return Bundle.open(out)


def _carry_over(source: Bundle, components: Sequence[str], work: Path) -> dict[str, FileRecord]:
    """Link everything that is no model: scheduler, tokenizer, licence, model card; and configs."""
    models = set(MODEL_OF.values())
    targets = {n: n for n in source.manifest.files if n.split("/")[0] not in models}
    for component in components:
        targets[f"{MODEL_OF[component]}/config.json"] = f"{component}/config.json"
    records = {}
    for name, target in targets.items():
        if name not in source.manifest.files:
            raise InputError(f"{source.path}: expected {name}, found none; make the model again")
        carry_over(source, name, work / target)
        records[target] = source.manifest.files[name]
    return records


# The skeleton: config → graph and map.


def build_skeleton(
    component: str, config: Mapping[str, Any], dtype: DTypeName = "fp16", opset: int = OPSET
) -> Skeleton:
    """Export the architecture that `config` describes, without anybody's weights.

    Ensures: every parameter of the module is held by an initializer named after it, nothing else
    is external, and every matrix product and convolution works on `dtype`.

    Raises:
        UsageError: `opset` is below what the exporter can write.
        InputError: the exporter folded a weight away or left another dtype in a product.
    """
    if opset < OPSET:
        raise UsageError(f"opset {opset}: the exporter writes {OPSET} or newer; ask for {OPSET}")
    return _build_skeleton(component, json.dumps(config, sort_keys=True), dtype, opset)


@lru_cache(maxsize=2 * len(COMPONENTS))  # a run exports two twins of one architecture
def _build_skeleton(component: str, config_json: str, dtype: DTypeName, opset: int) -> Skeleton:
    config = json.loads(config_json)

    def trace() -> Skeleton:
        from export.tracing import trace_skeleton

        return trace_skeleton(component, config, dtype, opset)

    architecture = {key: value for key, value in config.items() if key not in _WHENCE}
    return cached([component, architecture, dtype, opset], trace)


# fp32 where fp16 is too narrow.


def _upcast(component: str, config: Mapping[str, Any], asked: UpcastAttention) -> bool:
    """Of the three only the UNet's config has such a key, and only its scores overflow."""
    if component != "unet" or asked == "off":
        return False
    return asked == "on" or bool(config.get("upcast_attention"))


def widen(skeleton: Skeleton, kept: Collection[str], *, upcast_attention: bool) -> Skeleton:
    """The skeleton with the values `kept`, and attention scores if asked, in fp32.

    Weights and map stay as they are. Where there is nothing to keep the same skeleton comes back.
    """
    if not (kept or upcast_attention):
        return skeleton

    def change() -> Skeleton:
        from export.tracing import in_fp32

        return in_fp32(skeleton, kept, upcast_attention=upcast_attention)

    return cached(["in fp32", skeleton.digest, sorted(kept), upcast_attention], change)


# The weights: safetensors → external data.


def fill(
    skeleton: Skeleton,
    weights: Mapping[str, TensorInfo],
    directory: Path,
    *,
    pruned: Collection[str] = (),
    progress: Progress = _silent,
) -> Filled:
    """Write graph, map and data of one component to `directory`, a few tensors in memory at a time.

    `weights` is the source's state dict; records of those in `pruned` say where the zeros are.
    Several threads read, cast, hash and turn tensors; they are written in order.

    Raises:
        InputError: a tensor is missing, unknown, of another shape, or not finite after the cast.
    """
    weight_map = skeleton.weight_map
    component, dtype = weight_map.component, weight_map.dtype
    entries = weight_map.by_key()
    chosen = _choose(weights, weight_map)
    directory.mkdir(parents=True, exist_ok=True)
    records: dict[str, TensorRecord] = {}
    underflow: dict[str, int] = {}
    if any(chosen[key].dtype != RECORD_DTYPES[dtype] for key in entries):
        import torch  # noqa: F401  # before there are threads, which are to have one core each
    jobs = (
        (
            room(_memory(chosen[key], places, dtype)),
            partial(_make, chosen[key], places, dtype, chosen[key].name in pruned),
        )
        for key, places in entries.items()
    )
    with (
        HashedFile(directory / DATA) as data,
        closing(in_memory(jobs)) as made,
    ):
        for (key, places), tensor in zip(entries.items(), made, strict=True):
            info = chosen[key]
            records[info.name] = tensor.record
            if tensor.underflow:
                underflow[info.name] = tensor.underflow
            for entry, stored in zip(places, tensor.stored, strict=True):
                data.write(bytes(entry.offset - data.size))
                data.write(raw_bytes(stored))
            progress(f"writing {component}", info.nbytes)
    (directory / MODEL).write_bytes(skeleton.model)
    weight_map.write(directory)
    return Filled(records, underflow, FileRecord(size=data.size, sha256=data.sha256))


@dataclass(frozen=True)
class _Made:
    """A tensor ready to be written to each of its places."""

    record: TensorRecord
    underflow: int
    stored: list[Array]


def _memory(info: TensorInfo, places: Sequence[Entry], dtype: DTypeName) -> list[int]:
    """Bytes for the tensor as it is read, for its cast if it needs one, and for it turned."""
    cast = 0 if info.dtype == RECORD_DTYPES[dtype] else places[0].nbytes
    turned = any(entry.transform == "transpose" for entry in places)
    return [info.nbytes, cast, places[0].nbytes if turned else 0]


def _make(
    info: TensorInfo, places: Sequence[Entry], dtype: DTypeName, pruned: bool, memory: Array
) -> _Made:
    read, other, turned = pieces(memory, _memory(info, places, dtype))
    cast, underflow = _cast(read_finite(info, read), dtype, info, other)
    record = record_tensor(cast, RECORD_DTYPES[dtype], pruned=pruned)
    stored = [entry.from_key(cast) for entry in places]
    stored = [a if a.flags.c_contiguous else _turned(a, turned) for a in stored]
    return _Made(record, underflow, stored)


def _turned(array: Array, memory: Array) -> Array:
    """A transposed matrix in C order, in this memory.

    A strip at a time: numpy alone would walk across the whole matrix for every row of the result.
    """
    turned: Array = memory.view(array.dtype).reshape(array.shape)
    for first in range(0, array.shape[1], _STRIP):
        turned[:, first : first + _STRIP] = array[:, first : first + _STRIP]
    return turned


def _choose(weights: Mapping[str, TensorInfo], weight_map: WeightMap) -> dict[str, TensorInfo]:
    """The source tensor of each key of the map; everything in the source must have a use."""
    component = weight_map.component
    shapes = {e.key: e.key_shape for e in weight_map.initializers.values()}
    chosen = {canonical_key(component, name): info for name, info in weights.items()}
    for key, shape in shapes.items():
        if key not in chosen:
            raise InputError(
                f"{component}: expected a tensor {key} as its config.json says, found none; "
                "weights and configuration belong to different models"
            )
        if chosen[key].shape != shape:
            raise InputError(
                f"{component}: expected {key} of shape {shape} as its config.json says, found "
                f"{chosen[key].shape}; weights and configuration belong to different models"
            )
    if extra := [k for k in chosen if k not in shapes and not unused_key(component, k)]:
        raise InputError(
            f"{component}: the weights hold {extra[0]}, which its config.json has no use for; "
            "weights and configuration belong to different models"
        )
    return chosen


def _cast(weight: Array, dtype: DTypeName, info: TensorInfo, memory: Array) -> tuple[Array, int]:
    """A finite weight in another type, and how many of its numbers that made zero."""
    if weight.dtype == NUMPY_DTYPES[dtype]:
        return weight, 0
    cast, lost = memory.view(NUMPY_DTYPES[dtype]).reshape(weight.shape), 0
    for before, after in zip(slices(weight), slices(cast), strict=True):
        as_tensor(after).copy_(as_tensor(before))  # numpy casts one by one
        if not all_finite(after):
            raise InputError(
                f"{info.file}: {info.name} holds weights beyond the range of {dtype}; "
                "export as fp32"
            )
        lost += int(np.count_nonzero(is_zero(after)) - np.count_nonzero(is_zero(before)))
    return cast, lost
