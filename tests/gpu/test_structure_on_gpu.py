"""Narrower models on torch_cuda: the same numbers, in the time that a table foretells."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from export.backends.torch_cuda import BACKEND, FIRST_CAPABILITY, Options, TorchRunner
from export.latency import measure_latency
from export.pipeline import generate
from export.specs import COMPONENTS, Sizes, component_spec, make_inputs
from export.to_onnx import export_bundle
from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.catalog import read_config
from sdcompress.prune import prune
from sdcompress.recipe import Recipe
from sdcompress.structure import read_record
from tests.narrowed import narrow_bundle, thinned
from tests.tiny_sd import make_tiny_sd

FP16 = 2e-2  # of root mean squares; as `verify` allows fp16 to differ


@pytest.fixture(scope="module")
def engine(
    tiny_sd: Path, tiny_source: Bundle, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The tiny pipeline with half of every block gone, and then 2:4 in the UNet."""
    place = tmp_path_factory.mktemp("narrow")
    kept = thinned(tiny_sd, "text_encoder", "unet", "vae")
    narrow = narrow_bundle(tiny_source, place / "narrow", kept)
    both = prune(tiny_source, recipe, place / "both", before=narrow)
    onnx = export_bundle(both, place / "onnx", dtype="fp16")
    return BACKEND.build(onnx, place / "engine")


def inputs(engine: Path, component: str, batch: int = 2, side: int = 16) -> dict[str, Any]:
    config = read_config(engine / component)
    spec = component_spec(component, config)
    return make_inputs(spec, config, "fp16", batch=batch, height=side, width=side)


def run(runner: TorchRunner, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    with runner:
        for _ in range(2):  # the second replays the graph
            outputs = runner.infer(feeds)
    return next(iter(outputs.values())).astype(float)


def error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_the_gpu_computes_what_the_cpu_computes(
    engine: Bundle, component: str, cuda_graph: bool
) -> None:
    feeds, options = inputs(engine.path, component), Options(cuda_graph=cuda_graph)
    on_gpu = run(TorchRunner(engine.path, component, options), feeds)
    on_cpu = run(TorchRunner(engine.path, component, options, device="cpu"), feeds)
    assert error(on_gpu, on_cpu) < FP16


def test_sparse_layers_of_narrower_blocks(engine: Bundle) -> None:
    if not torch.backends.cusparselt.is_available():
        pytest.skip("this torch comes without cuSPARSELt")
    if torch.cuda.get_device_capability() < FIRST_CAPABILITY:
        pytest.skip("this GPU has no sparse Tensor Cores")
    keys = engine.manifest.details["sparse_layers"]["unet"]
    assert [key for key in keys if ".ff." in key]
    options, feeds = Options(), inputs(engine.path, "unet")
    sparse = run(TorchRunner(engine.path, "unet", options, keys), feeds)
    dense = run(TorchRunner(engine.path, "unet", options), feeds)
    assert error(sparse, dense) < FP16


def test_it_paints(engine: Bundle) -> None:
    (picture,) = generate(engine.path, ["a red cat"], [1], steps=2)
    assert picture.size == (16, 16)


WIDE: dict[str, Any] = {
    "block_out_channels": (640, 1280),
    "attention_head_dim": [10, 20],
    "norm_num_groups": 32,
    "sample_size": 64,
}


def seconds(onnx: Bundle, out: Path, side: int) -> float:
    """The median time of a UNet step."""
    engine = BACKEND.build(onnx, out)
    feeds = inputs(engine.path, "unet", side=side)
    with TorchRunner(engine.path, "unet", Options()) as runner:
        times = []
        for _ in range(30):
            runner.infer(feeds)
            assert runner.gpu_milliseconds is not None
            times.append(runner.gpu_milliseconds / 1000)
    return median(times[5:])


def test_a_narrower_model_is_faster_as_a_table_foretells(tmp_path: Path) -> None:
    """At widths that fill a GPU: half of every block of the UNet at 64×64 latents."""
    dense = Bundle.of_source(
        make_tiny_sd(tmp_path / "wide", dtype=torch.float16, unet=WIDE),
        SourceRecord(id="wide", kind="directory"),
    )
    narrow = narrow_bundle(dense, tmp_path / "narrow", thinned(dense.path, "unet"))
    table = measure_latency(
        dense,
        "unet",
        backend="torch_cuda",
        dtype="fp16",
        sizes=Sizes(height=128, width=128),
        rounds=3,
    )
    blocks = read_record(narrow.manifest.details)["unet"].blocks
    saved = sum(table.seconds(n, b.width) - table.seconds(n, b.kept) for n, b in blocks.items())
    foretold = (table.total - saved) / table.total
    taken = {}
    for name, bundle in (("dense", dense), ("narrow", narrow)):
        onnx = export_bundle(bundle, tmp_path / f"onnx-{name}", dtype="fp16", components=["unet"])
        taken[name] = seconds(onnx, tmp_path / f"engine-{name}", side=64)
    measured = taken["narrow"] / taken["dense"]
    assert measured < 0.85
    assert foretold == pytest.approx(measured, abs=0.1)
