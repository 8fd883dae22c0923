"""Weights + configs → ONNX bundle, in two steps that know nothing of each other.

`build_skeleton` exports the *architecture*: a module made from the config alone, filled with seeded
values that are all distinct, because the exporter merges equal tensors and because a weight is
recognised by its values afterwards. Graph and weight map depend on config, dtype, opset and tool
versions only. `fill` then streams the real weights to the places the map names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from export.graph_cache import cached
from export.precision import (
    MOVES,
    attention_scores,
    fp32_products,
    keep_in_fp32,
    touching,
    wrong_product_dtypes,
)
from export.specs import (
    COMPONENTS,
    MODEL_OF,
    NUMPY_DTYPES,
    OPSET,
    ComponentSpec,
    DTypeName,
    canonical_key,
    component_spec,
    make_inputs,
    unused_key,
)
from export.weight_map import DATA, WeightMap, lay_out, match_by_value
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
from sdcompress.models.modules import build
from sdcompress.prune import record_tensor
from sdcompress.safetensors_io import TensorInfo, raw_bytes, read_finite
from sdcompress.structure import RECORD

if TYPE_CHECKING:
    from export.ranges import Ranges

MODEL = "model.onnx"
TORCH_DTYPES: dict[DTypeName, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}
RECORD_DTYPES: dict[DTypeName, str] = {"fp16": "F16", "fp32": "F32"}  # as safetensors calls them
UpcastAttention = Literal["auto", "on", "off"]
Progress = Callable[[str, int], None]  # what, how many bytes of weights were done


def _silent(what: str, nbytes: int) -> None:
    pass


@dataclass(frozen=True)
class Skeleton:
    """The serialised graph, its weights all external and not there yet, and the map to them.

    What an fp16 graph computes in fp32: `fp32_layers` to keep numbers in range, named after their
    weights or else their nodes, and `fp32_products` are all the nodes that multiply in fp32.
    """

    model: bytes
    weight_map: WeightMap
    fp32_layers: tuple[str, ...] = ()
    fp32_products: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model).hexdigest()


@dataclass(frozen=True)
class Filled:
    """What `fill` wrote: a record of each tensor, and the weights that became zero by the cast.

    Both are keyed like the source's state dict.
    """

    records: dict[str, TensorRecord]
    underflow: dict[str, int]


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
    plan = source.manifest.plan
    tensors: dict[str, dict[str, TensorRecord]] = {}
    underflow: dict[str, dict[str, int]] = {}
    layers: dict[str, list[str]] = {}
    products: dict[str, list[str]] = {}
    upcast = False
    if keep_fp32 and dtype != "fp16":
        raise UsageError(f"{dtype} needs no layer kept in fp32; leave out the ranges")
    with staging(out, replace=replace) as work:
        linked = _carry_over(source, components, work)
        for component in components:
            progress(f"tracing {component}", 0)
            config, model = read_config(work / component), MODEL_OF[component]
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
        if keep_fp32:
            keep_fp32.write(work)
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
        seal(work, manifest, linked=linked)
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
    key = [component, config, dtype, opset]
    return Skeleton(*cached(key, lambda: _trace_skeleton(component, config, dtype, opset)))


def _trace_skeleton(
    component: str, config: Mapping[str, Any], dtype: DTypeName, opset: int
) -> tuple[bytes, WeightMap]:
    spec = component_spec(component, config)
    module = architecture(component, config)
    weights = _distinct_values(module, dtype)
    module.load_state_dict(weights, assign=True, strict=False)
    model = _trace(module, spec, config, dtype, opset)
    _strip(model)
    _name_axes(model.graph, spec)
    names = parameter_names(component, module)
    arrays = {key: weights[name].numpy() for key, name in names.items()}
    weight_map = _externalise(model.graph, arrays, component, dtype, opset)
    proto = ir.to_proto(model)
    if wrong := wrong_product_dtypes(proto, dtype):
        raise InputError(
            f"{component}: expected {dtype} in every product, found another type in {wrong[0]}; "
            "export as fp32, or use the tested versions in constraints.txt"
        )
    return proto.SerializeToString(deterministic=True), weight_map


class _TextEncoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(input_ids)
        return out.last_hidden_state, out.pooler_output


class _UNet(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        out: Tensor = self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return out


class _VaeDecoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        for unused in ("encoder", "quant_conv"):
            delattr(model, unused)

    def forward(self, latent_sample: Tensor) -> Tensor:
        out: Tensor = self.model.decode(latent_sample, return_dict=False)[0]
        return out


def architecture(component: str, config: Mapping[str, Any]) -> nn.Module:
    """The component's module in inference mode, its parameters without values."""
    wrap = {"text_encoder": _TextEncoder, "unet": _UNet, "vae_decoder": _VaeDecoder}[component]
    with _parameters_on_meta():
        return wrap(build(MODEL_OF[component], config)).eval()


def parameter_names(component: str, module: nn.Module) -> dict[str, str]:
    """The state-dict key of weight files → the parameter of `architecture`'s module it fills."""
    names = [name for name, _ in module.named_parameters()]
    return {canonical_key(component, name.removeprefix("model.")): name for name in names}


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made here have parameters without storage; buffers (position ids) stay real.

    `torch.device("meta")` would lose the buffers, and values nobody uses cost gigabytes.
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _distinct_values(module: nn.Module, dtype: DTypeName) -> dict[str, Tensor]:
    """Seeded values in [0, 1) for every parameter: random bit patterns, so that even a bias of
    three numbers is like no other."""
    rng = np.random.default_rng(0)
    below_one = np.array(1, NUMPY_DTYPES[dtype])
    bits = below_one.view(f"u{below_one.itemsize}")
    return {
        name: torch.from_numpy(
            rng.integers(0, bits, tuple(p.shape), bits.dtype).view(below_one.dtype)
        )
        for name, p in module.named_parameters()
    }


def _trace(
    module: nn.Module,
    spec: ComponentSpec,
    config: Mapping[str, Any],
    dtype: DTypeName,
    opset: int,
) -> ir.Model:
    # Sizes above one at the lowest resolution too, and none equal: one and equality would be
    # taken for facts about the architecture.
    inputs = make_inputs(spec, config, dtype, height=4 * spec.multiple, width=6 * spec.multiple)
    return trace(
        module,
        [torch.from_numpy(a) for a in inputs.values()],
        opset_version=opset,
        dynamic_shapes=_dynamic_shapes(spec),
        input_names=[t.name for t in spec.inputs],
        output_names=[t.name for t in spec.outputs],
    )


def trace(
    module: nn.Module, inputs: Sequence[Tensor], opset_version: int = OPSET, **how: Any
) -> ir.Model:
    """The graph that torch's exporter makes of a module; `how` are its own arguments."""
    with _quiet():
        program = torch.onnx.export(
            module, tuple(inputs), dynamo=True, opset_version=opset_version, verbose=False, **how
        )
    assert program is not None
    return program.model


def _dynamic_shapes(spec: ComponentSpec) -> tuple[dict[int, Any], ...]:
    def dim(axis: str) -> Any:
        if axis == "batch":
            # diffusers copies a tensor from 64 images on; torch.export wants to know that it
            # does not follow that branch. The graph itself has no such limit.
            return torch.export.Dim(axis, max=63)
        free = torch.export.Dim(axis)
        return spec.multiple * free if axis in ("height", "width") and spec.multiple > 1 else free

    dims = {a: dim(a) for t in spec.inputs for a in t.axes if isinstance(a, str)}
    return tuple(
        {i: dims[a] for i, a in enumerate(t.axes) if isinstance(a, str)} for t in spec.inputs
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about its own internals; errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip(model: ir.Model) -> None:
    """Remove stack traces with this machine's paths, and shapes that only the tracer named."""
    interface = {*model.graph.inputs, *model.graph.outputs}
    holders: list[Any] = [model, model.graph, *model.graph.all_nodes()]
    for holder in holders:
        holder.metadata_props.clear()
        holder.doc_string = None
    values = [v for node in model.graph.all_nodes() for v in node.outputs]
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *values):
        value.metadata_props.clear()
        value.doc_string = None
        if value not in interface:
            value.type = value.shape = None


def _name_axes(graph: ir.Graph, spec: ComponentSpec) -> None:
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.shape = ir.Shape(tensor.axes)


def _externalise(
    graph: ir.Graph,
    weights: Mapping[str, np.ndarray[Any, Any]],
    component: str,
    dtype: DTypeName,
    opset: int,
) -> WeightMap:
    """Name each weight's initializer after its key and point it into the external data file."""
    arrays = {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }
    found = match_by_value(arrays, weights)
    if lost := [key for key in weights if key not in {k for k, _ in found.values()}]:
        raise InputError(
            f"{component}: the exporter folded {lost[0]} into another tensor; "
            "use the tested versions in constraints.txt"
        )
    laid = lay_out(found, arrays, weights)
    for old, (name, entry) in laid.items():
        value = graph.initializers[old]
        value.name = name
        value.const_value = ir.ExternalTensor(
            DATA,
            entry.offset,
            entry.nbytes,
            ir.DataType.from_numpy(arrays[old].dtype),
            shape=ir.Shape(entry.shape),
            name=name,
            base_dir="",
        )
    return WeightMap(
        component=component, dtype=dtype, opset=opset, initializers=dict(laid.values())
    )


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
    model = onnx.load_from_string(skeleton.model)
    scores = attention_scores(model) if upcast_attention else set()
    if not (scores or kept):
        return skeleton
    layers = [
        layer_of(node, skeleton.weight_map)
        for node in touching(model, {*kept} - scores)
        if node.op_type not in MOVES
    ]
    model = keep_in_fp32(model, {*kept, *scores})
    products = tuple(fp32_products(model))
    assert not wrong_product_dtypes(model, skeleton.weight_map.dtype, products)
    return Skeleton(
        model.SerializeToString(deterministic=True),
        skeleton.weight_map,
        fp32_layers=tuple(dict.fromkeys(layers)),
        fp32_products=products,
    )


def layer_of(node: onnx.NodeProto, weight_map: WeightMap) -> str:
    """The module whose weight a node reads, or the node's own name if it reads none."""
    for name in node.input:
        if entry := weight_map.initializers.get(name):
            return entry.key.rpartition(".")[0]
    return node.name


# The weights: safetensors → external data.


def fill(
    skeleton: Skeleton,
    weights: Mapping[str, TensorInfo],
    directory: Path,
    *,
    pruned: Collection[str] = (),
    progress: Progress = _silent,
) -> Filled:
    """Write graph, map and data of one component to `directory`, one tensor in memory at a time.

    `weights` is the source's state dict; records of those in `pruned` say where the zeros are.

    Raises:
        InputError: a tensor is missing, unknown, of another shape, or not finite after the cast.
    """
    weight_map = skeleton.weight_map
    component = weight_map.component
    entries = weight_map.by_key()
    chosen = _choose(weights, weight_map)
    directory.mkdir(parents=True, exist_ok=True)
    records: dict[str, TensorRecord] = {}
    underflow: dict[str, int] = {}
    with (directory / DATA).open("xb") as file:
        for key, places in entries.items():
            info = chosen[key]
            weight = read_finite(info)
            cast = _cast(weight, weight_map.dtype, info)
            if zeros := int(((cast == 0) & (weight != 0)).sum()):
                underflow[info.name] = zeros
            records[info.name] = record_tensor(
                cast, RECORD_DTYPES[weight_map.dtype], pruned=info.name in pruned
            )
            for entry in places:
                stored = torch.from_numpy(entry.from_key(cast.numpy()))
                file.write(b"\0" * (entry.offset - file.tell()))
                file.write(raw_bytes(stored))
            progress(f"writing {component}", info.nbytes)
    (directory / MODEL).write_bytes(skeleton.model)
    weight_map.write(directory)
    return Filled(records, underflow)


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


def _cast(weight: Tensor, dtype: DTypeName, info: TensorInfo) -> Tensor:
    cast = weight.to(TORCH_DTYPES[dtype])
    if not bool(cast.isfinite().all()):
        raise InputError(
            f"{info.file}: {info.name} holds weights beyond the range of {dtype}; export as fp32"
        )
    return cast
