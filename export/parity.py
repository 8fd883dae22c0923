"""onnxruntime against torch: does the graph compute what the model computes?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from export.graph import Graph
from export.specs import DTypeName, component_spec, make_inputs
from export.to_onnx import MODEL, architecture, parameter_names
from sdcompress.errors import InputError
from sdcompress.results import Check

# Root mean square of onnxruntime's difference from torch in fp32, relative to torch's output.
# fp32 differs by the order of sums; fp16 also by rounding every intermediate result to 11 bits.
PARITY_TOLERANCE: dict[DTypeName, float] = {"fp32": 1e-4, "fp16": 2e-2}


def check_parity(graph: Graph) -> list[Check]:
    """Run both on seeded inputs of two shapes; the graph must take any batch, height and width."""
    dtype, spec = graph.weight_map.dtype, component_spec(graph.component, graph.config)
    module, session = _torch_module(graph), _session(graph)
    low, high = max(8, 2 * spec.multiple), max(12, 3 * spec.multiple)
    errors, largest = [], _Largest()
    for seed, (batch, height, width) in enumerate(((2, low, high), (1, high, low))):
        inputs = make_inputs(
            spec, graph.config, dtype, batch=batch, height=height, width=width, seed=seed
        )
        found = session.run([t.name for t in spec.outputs], inputs)
        with largest:
            expected = _run_torch(module, inputs)
        errors += [_relative_error(f, e) for f, e in zip(found, expected, strict=True)]
    worst, tolerance = float(np.max(errors)), PARITY_TOLERANCE[dtype]  # a NaN stays one in np.max
    checks = [
        Check(
            name=f"parity {graph.component}",
            passed=worst <= tolerance,
            detail=f"onnxruntime differs from torch in fp32 by {worst:.1e} of the output, "
            f"{tolerance:.0e} allowed",
            tensors=() if worst <= tolerance else (graph.component,),
            tolerance=tolerance,
        )
    ]
    return checks + ([largest.check(graph.component)] if dtype == "fp16" else [])


class _Largest(TorchFunctionMode):
    """Watches what goes into and comes out of layers, and attention scores, for the largest number.

    onnxruntime computes fp16 graphs in fp32 on a CPU, so only this tells that a GPU would overflow
    to infinity and draw black pictures. Masks of minus infinity go through none of these.
    """

    LAYERS = frozenset({"linear", "conv2d", "group_norm", "layer_norm"})

    def __init__(self) -> None:
        super().__init__()
        self.value, self.where = 0.0, "nowhere"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.__name__ in self.LAYERS:
            self._look(f"what goes into {func.__name__}", args[0])
            self._look(f"what comes out of {func.__name__}", out)
        elif func is torch.nn.functional.scaled_dot_product_attention:
            query, key = args[:2] if args else (kwargs["query"], kwargs["key"])
            self._look("attention scores", query @ key.mT / math.sqrt(query.shape[-1]))
        return out

    def _look(self, where: str, tensor: Tensor) -> None:
        value = float(tensor.abs().max())
        if not (value <= self.value or math.isnan(self.value)):  # true of NaN, which then stays
            self.value, self.where = value, where

    def check(self, component: str) -> Check:
        limit = float(np.finfo(np.float16).max)
        return Check(
            name=f"range {component}",
            passed=self.value <= limit,
            detail=f"the largest intermediate number is {self.value:.3g} ({self.where}), "
            f"fp16 ends at {limit:.0f}",
            tensors=() if self.value <= limit else (component,),
            tolerance=limit,
        )


def _torch_module(graph: Graph) -> torch.nn.Module:
    module = architecture(graph.component, graph.config)
    names = parameter_names(graph.component, module)
    try:
        state = {names[entry.key]: graph.read(t).float() for t, entry in graph.weights()}
        module.load_state_dict(state, assign=True, strict=True)
    except (KeyError, RuntimeError) as e:
        raise InputError(
            f"{graph.directory}: the weights do not fit config.json; export the model again"
        ) from e
    return module


def _session(graph: Graph) -> Any:
    try:
        import onnxruntime
    except ImportError as e:
        raise InputError(
            "parity needs onnxruntime, which is not installed; `pip install sdcompress[cpu]`, or "
            "verify without parity"
        ) from e
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            str(graph.directory / MODEL), options, providers=["CPUExecutionProvider"]
        )
    except Exception as e:  # onnxruntime's own exceptions share no base class
        raise InputError(
            f"{graph.directory / MODEL}: onnxruntime cannot open it "
            f"({str(e).splitlines()[0]}); export the model again"
        ) from e


def _run_torch(module: torch.nn.Module, inputs: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    tensors = [torch.from_numpy(a) for a in inputs.values()]
    with torch.inference_mode():
        out = module(*(t.float() if t.is_floating_point() else t for t in tensors))
    return [o.numpy() for o in (out if isinstance(out, tuple) else (out,))]


def _relative_error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Root mean square of the difference over that of `expected`; NaN where either has one."""
    if found.shape != expected.shape:
        return math.inf
    difference = found.astype(np.float64) - expected
    return float(
        np.sqrt(np.square(difference).mean() / np.square(expected, dtype=np.float64).mean())
    )
