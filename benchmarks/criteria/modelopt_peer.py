"""NVIDIA ModelOpt's 2:4, on the activations that our own criteria are calibrated on.

    python benchmarks/criteria/modelopt_peer.py sparse_magnitude OUT

The dense model paints our calibration prompts; what every call of its text encoder and UNet is
given is recorded and replayed to ModelOpt. Writes the weights that ModelOpt prunes, as OUT/
weights.safetensors, and OUT/report.json: what it left out and why, what a sparse kernel could use.
"""

from __future__ import annotations

import io
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.criteria.points import CALIBRATION, COMPONENTS, TWO_FOUR, dense_model
from sdcompress.bundle import staging, write_json
from sdcompress.calibrate import Calibrator
from sdcompress.calibrate._layers import find_module
from sdcompress.catalog import Layer, read_catalog
from sdcompress.evaluation.images import load_pipeline
from sdcompress.patterns import parse_pattern, violations
from sdcompress.recipe import Calibration

WEIGHTS, REPORT = "weights.safetensors", "report.json"
Layers = Mapping[str, Sequence[Layer]]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def main(mode: str, out: Path) -> None:
    from safetensors.torch import save_file

    dense = dense_model()
    catalog = read_catalog(dense.path)
    layers = {c: [p for p in catalog.of(c) if p.why_not is None] for c in COMPONENTS["both"]}
    calls = recorded_calls(layers)
    before, pipeline = (load_pipeline(dense.path) for _ in range(2))
    start = time.process_time()
    told = {c: sparsify(getattr(pipeline, c), mode, calls[c]) for c in layers}
    seconds = time.process_time() - start
    weights: dict[str, Any] = {}
    report = {}
    for component, ours in layers.items():
        pruned = {}
        for layer in ours:
            old, new = (
                find_module(getattr(p, component), layer.name).weight.detach()
                for p in (before, pipeline)
            )
            if not bool((new == old).all()):
                pruned[layer.name] = new.half().contiguous()
        weights |= {f"{component}/{name}": weight for name, weight in pruned.items()}
        report[component] = describe(ours, pruned, told[component])
    with staging(out, replace=True) as work:
        save_file(weights, work / WEIGHTS)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        write_json(
            work / REPORT,
            {
                "version": version("nvidia-modelopt"),
                "cpu_seconds": round(seconds, 1),
                "peak_mib": round(peak),
                "components": report,
            },
        )


def recorded_calls(layers: Layers) -> dict[str, list[Call]]:
    """What the calls of each component are given while the dense model is calibrated on."""
    calibrator = Calibrator(dense_model(), Calibration.model_validate(CALIBRATION))
    calls: dict[str, list[Call]] = {component: [] for component in layers}

    def listen(component: str) -> Any:
        def keep(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls[component].append((args, named))

        module = getattr(calibrator.pipeline, component)
        return module.register_forward_pre_hook(keep, with_kwargs=True)

    hooks = [listen(component) for component in layers]
    # Asked of one layer, our own calibration paints all its prompts.
    calibrator.record({"unet": {layers["unet"][0].name: frozenset({"input_sq_norm"})}})
    for hook in hooks:
        hook.remove()
    return calls


def sparsify(model: Any, mode: str, calls: Sequence[Call]) -> list[str]:
    """Prune a loaded component in place; returns what ModelOpt warned of."""
    import modelopt.torch.sparsity as mts
    import torch

    def replay(model: Any) -> None:
        with torch.no_grad():
            for args, named in calls:
                model(*args, **named)

    with _quiet() as warned:
        mts.export(mts.sparsify(model, mode, config={"forward_loop": replay}))
    return sorted({str(warning.message) for warning in warned})


@contextmanager
def _quiet() -> Iterator[list[Any]]:
    """It prints a line a layer, and says by warnings what it leaves out."""
    with warnings.catch_warnings(record=True) as warned, redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        yield warned


def describe(ours: Sequence[Layer], pruned: Mapping[str, Any], warned: Sequence[str]) -> Any:
    """What became of the layers that we prune. Groups are along the input channels."""
    pattern = parse_pattern(TWO_FOUR)
    rows = {"linear": [0, 0, 0, 0], "conv": [0, 0, 0, 0]}
    for layer in ours:
        if (weight := pruned.get(layer.name)) is not None:
            found = (
                weight.numel(),
                int((weight == 0).sum()),
                weight.numel() // 4,
                violations(weight, pattern),
            )
            rows[layer.kind] = [a + b for a, b in zip(rows[layer.kind], found, strict=True)]
    names = ("weights", "zeros", "groups", "groups_violated")
    return {
        "layers": sorted(pruned),
        "left_out": {p.name: why(p.name, warned) for p in ours if p.name not in pruned},
        "kinds": {kind: dict(zip(names, row, strict=True)) for kind, row in rows.items()},
    }


def why(layer: str, warned: Sequence[str]) -> str:
    """ModelOpt's own words, as far as they speak of the layer."""
    name = f" {layer.removesuffix('.weight')} "
    return next((text for text in warned if name in text), "it gave no reason")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
