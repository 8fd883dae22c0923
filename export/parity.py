"""onnxruntime against torch: does the graph compute what the model computes?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from export.graph import Graph
from export.ranges import LIMIT, Watched
from export.specs import DTypeName, component_spec, make_inputs
from export.torch_module import torch_module
from export.weight_map import layer_of
from sdcompress.errors import VerificationError
from sdcompress.results import Check

# Root mean square of onnxruntime's difference from torch in fp32, relative to torch's output.
# fp32 differs by the order of sums; fp16 also by rounding every intermediate result to 11 bits.
PARITY_TOLERANCE: dict[DTypeName, float] = {"fp32": 1e-4, "fp16": 2e-2}
NAMED = 20  # values named in a failed check
Feeds = dict[str, Any]


def check_parity(graph: Graph) -> list[Check]:
    """Run both on seeded inputs of two shapes; the graph must take any batch, height and width.

    Of an fp16 graph the range is checked on the same inputs.
    """
    dtype, spec = graph.weight_map.dtype, component_spec(graph.component, graph.config)
    low, high = max(8, 2 * spec.multiple), max(12, 3 * spec.multiple)
    inputs = [
        make_inputs(spec, graph.config, dtype, batch=batch, height=height, width=width, seed=seed)
        for seed, (batch, height, width) in enumerate(((2, low, high), (1, high, low)))
    ]
    checks = [_parity(graph, inputs, [t.name for t in spec.outputs])]
    return checks + ([_range(graph, inputs)] if dtype == "fp16" else [])


def _parity(graph: Graph, inputs: Sequence[Feeds], outputs: list[str]) -> Check:
    module, session = torch_module(graph, torch.float32), graph.session()
    errors = [
        _relative_error(found, expected)
        for feeds in inputs
        for found, expected in zip(
            session.run(outputs, feeds), _run_torch(module, feeds), strict=True
        )
    ]
    tolerance = PARITY_TOLERANCE[graph.weight_map.dtype]
    worst = float(np.max(errors))  # a NaN stays one in np.max
    return Check(
        name=f"parity {graph.component}",
        passed=worst <= tolerance,
        detail=f"onnxruntime differs from torch in fp32 by {worst:.1e} of the output, "
        f"{tolerance:.0e} allowed",
        tensors=() if worst <= tolerance else (graph.component,),
        tolerance=tolerance,
    )


def _range(graph: Graph, inputs: Sequence[Feeds]) -> Check:
    """Every value of the graph that is fp16 stays in its range.

    onnxruntime computes fp16 graphs in fp32 on a CPU, so only this tells that a GPU would overflow
    to infinity and draw black pictures.
    """
    runner = Watched(graph)
    try:
        with runner:
            for feeds in inputs:
                runner.infer(feeds)
    except VerificationError as e:
        return Check(
            name=f"range {graph.component}",
            passed=False,
            detail=str(e),
            tensors=(graph.component,),
            tolerance=LIMIT,
        )
    where, largest = max(runner.largest.items(), key=lambda item: item[1])
    maker = next(node for node in graph.proto.graph.node if where in node.output)
    beyond = [value for value, met in runner.largest.items() if met > LIMIT]
    fix = "; export with --calibrate" if beyond else ""
    return Check(
        name=f"range {graph.component}",
        passed=not beyond,
        detail=f"the largest fp16 number is {largest:.3g} (out of "
        f"{layer_of(maker, graph.weight_map)}), fp16 ends at {LIMIT:.0f}{fix}",
        tensors=tuple(f"{graph.component}/{value}" for value in beyond[:NAMED]),
        tolerance=LIMIT,
    )


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
