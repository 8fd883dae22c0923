"""Config → graph and weight map, and the graph with more of it in fp32: what `graph_cache` keeps.

A module made from the config alone is filled with seeded values that are all distinct, because the
exporter merges equal tensors and because a weight is recognised by its values afterwards. Graph and
map depend on config, dtype, opset and tool versions only. Everything slow to load is needed here,
and only here: a graph that is known is exported without this file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from export.graph_cache import Skeleton
from export.precision import (
    MOVES,
    attention_scores,
    fp32_products,
    keep_in_fp32,
    touching,
    wrong_product_dtypes,
)
from export.specs import (
    MODEL_OF,
    NUMPY_DTYPES,
    OPSET,
    ComponentSpec,
    DTypeName,
    canonical_key,
    component_spec,
    make_inputs,
)
from export.weight_map import DATA, WeightMap, lay_out, layer_of, match_by_value
from sdcompress.errors import InputError
from sdcompress.models.modules import build

TORCH_DTYPES: dict[DTypeName, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}


def trace_skeleton(
    component: str, config: Mapping[str, Any], dtype: DTypeName, opset: int
) -> Skeleton:
    """The graph of the architecture that `config` describes, without anybody's weights.

    Raises:
        InputError: the exporter folded a weight away or left another dtype in a product.
    """
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
    for parameter in module.parameters():
        parameter.data = torch.empty(0)  # the optimizer's rules hold on to the last graph they saw
    proto = ir.to_proto(model)
    if wrong := wrong_product_dtypes(proto, dtype):
        raise InputError(
            f"{component}: expected {dtype} in every product, found another type in {wrong[0]}; "
            "export as fp32, or use the tested versions in constraints.txt"
        )
    return Skeleton(model=proto.SerializeToString(deterministic=True), weight_map=weight_map)


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
    """Seeded values in [0, 2) for every parameter: random bit patterns, so that even a bias of
    three numbers is like no other."""
    number = np.dtype(NUMPY_DTYPES[dtype])
    counts = [p.numel() for p in module.parameters()]
    # In one piece, so that all of it goes back to the system afterwards.
    raw = np.random.PCG64(0).random_raw(-(-sum(counts) * number.itemsize // 8))
    bits = raw.view(f"u{number.itemsize}")
    bits >>= 2  # neither a sign nor an exponent above that of one
    parts = np.split(bits.view(number), np.cumsum(counts))
    return {
        name: torch.from_numpy(part).reshape(tuple(parameter.shape))
        for (name, parameter), part in zip(module.named_parameters(), parts, strict=False)
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
    with _quiet(), _rules_by_operator():
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


@contextmanager
def _rules_by_operator() -> Iterator[None]:
    """The exporter's optimizer tries a rule only where its operator is, with the same result.

    It tries every rule at every node, and rules with several outputs look through the whole graph
    before they look at the node: a third of all the time that a UNet takes.
    """
    try:
        from onnxscript.rewriter import RewriteRule
    except ImportError:  # another version: it may take its time
        yield
        return
    kind: Any = RewriteRule
    try_rewrite = kind.try_rewrite

    def where_it_may_fit(self: Any, model: Any, graph: Any, node: Any, **how: Any) -> Any:
        try:
            fits = self._target_pattern.output_nodes[0].op.matches(node.op_type)
        except (AttributeError, IndexError):
            fits = True
        return try_rewrite(self, model, graph, node, **how) if fits else None

    kind.try_rewrite = where_it_may_fit
    try:
        yield
    finally:
        kind.try_rewrite = try_rewrite


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


def in_fp32(skeleton: Skeleton, kept: Collection[str], *, upcast_attention: bool) -> Skeleton:
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
        model=model.SerializeToString(deterministic=True),
        weight_map=skeleton.weight_map,
        fp32_layers=tuple(dict.fromkeys(layers)),
        fp32_products=products,
    )
