"""An exported component back as a torch module, and what its layers cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from export.graph import Graph
from export.specs import component_spec, static_shapes
from export.tracing import architecture, parameter_names
from sdcompress.errors import InputError


def torch_module(graph: Graph, dtype: torch.dtype | None = None) -> nn.Module:
    """The module that was exported, with the graph's weights: in `dtype`, or as they are stored.

    Stored weights stay backed by the graph's file until they are moved.

    Raises:
        InputError: the weights do not fit `config.json`.
    """
    module = architecture(graph.component, graph.config)
    names = parameter_names(graph.component, module)
    try:
        state = {names[entry.key]: graph.read(t).to(dtype) for t, entry in graph.weights()}
        module.load_state_dict(state, assign=True, strict=True)
    except (KeyError, RuntimeError) as e:
        raise InputError(
            f"{graph.directory}: the weights do not fit config.json; export the model again"
        ) from e
    return module


def layer_macs(
    component: str,
    config: Mapping[str, Any],
    *,
    batch: int,
    height: int,
    width: int,
    tokens: int = 77,
) -> dict[str, int]:
    """Multiply-adds of one run in each Linear and Conv layer, by the key of its weight.

    `height` and `width` are those of the latents. A Linear multiplies `in` numbers for each number
    it gives, a Conv C / groups · R · S. Products inside attention belong to no layer. Nothing is
    computed: shapes alone are sent through the module.
    """
    module = architecture(component, config).to("meta")
    keys = {name: key for key, name in parameter_names(component, module).items()}
    macs: dict[str, int] = {}

    def counting(key: str, each: int) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            macs[key] = macs.get(key, 0) + output.numel() * each

        return hook

    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            each = math.prod(layer.weight.shape[1:])  # of a Conv, C / groups · R · S
            layer.register_forward_hook(counting(keys[f"{name}.weight"], each))
    run_on_meta(module, component, config, batch=batch, height=height, width=width, tokens=tokens)
    return macs


def run_on_meta(module: nn.Module, component: str, config: Mapping[str, Any], **sizes: int) -> None:
    """Send shapes through a component's module on the meta device; see `static_shapes`."""
    shapes = static_shapes(component, config, **sizes)
    inputs = [
        torch.empty(
            shapes[t.name],
            dtype=torch.float32 if t.dtype == "float" else torch.int64,
            device="meta",
        )
        for t in component_spec(component, config).inputs
    ]
    with torch.inference_mode():
        module(*inputs)
