"""torch_cuda where it is meant to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.backends.torch_cuda import BACKEND, FIRST_CAPABILITY, Options, TorchRunner
from export.bench import bench
from export.pipeline import generate
from export.specs import COMPONENTS, component_spec, make_inputs
from sdcompress.bundle import Bundle
from sdcompress.catalog import read_config
from sdcompress.evaluation.images import psnr

FP16 = 2e-2  # of root mean squares; as `verify` allows fp16 to differ


@pytest.fixture(scope="module")
def engines(
    onnx_fp16: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    place = tmp_path_factory.mktemp("engines")
    return {twin: BACKEND.build(onnx, place / twin) for twin, onnx in onnx_fp16.items()}


@pytest.fixture
def _sparse_cores() -> None:
    if not torch.backends.cusparselt.is_available():
        pytest.skip("this torch comes without cuSPARSELt")
    if torch.cuda.get_device_capability() < FIRST_CAPABILITY:
        pytest.skip("this GPU has no sparse Tensor Cores")


def inputs(engine: Path, component: str, batch: int = 2) -> dict[str, Any]:
    config = read_config(engine / component)
    spec = component_spec(component, config)
    return make_inputs(spec, config, "fp16", batch=batch, height=16, width=8)


def run(runner: TorchRunner, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    with runner:
        for _ in range(2):  # the second replays the graph
            outputs = runner.infer(feeds)
    return next(iter(outputs.values())).astype(float)


def error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_gpu_computes_what_the_cpu_computes(
    engines: dict[str, Bundle], component: str, channels_last: bool
) -> None:
    engine, feeds = engines["dense"].path, inputs(engines["dense"].path, component)
    options = Options(channels_last=channels_last)
    on_gpu = run(TorchRunner(engine, component, options), feeds)
    on_cpu = run(TorchRunner(engine, component, options, device="cpu"), feeds)
    assert error(on_gpu, on_cpu) < FP16


@pytest.mark.parametrize("component", COMPONENTS)
def test_graphs_change_nothing(engines: dict[str, Bundle], component: str) -> None:
    engine, feeds = engines["dense"].path, inputs(engines["dense"].path, component)
    eager = run(TorchRunner(engine, component, Options(cuda_graph=False)), feeds)
    assert error(run(TorchRunner(engine, component, Options()), feeds), eager) < 1e-3


@pytest.mark.usefixtures("_sparse_cores")
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sparse_computes_what_dense_computes(
    engines: dict[str, Bundle], cuda_graph: bool, batch: int
) -> None:
    engine = engines["sparse"]
    keys = engine.manifest.details["sparse_layers"]["unet"]
    assert len(keys) > 10
    options, feeds = Options(cuda_graph=cuda_graph), inputs(engine.path, "unet", batch)
    sparse = run(TorchRunner(engine.path, "unet", options, keys), feeds)
    dense = run(TorchRunner(engine.path, "unet", options), feeds)
    assert error(sparse, dense) < FP16


def test_a_graph_is_fed_anew_and_each_shape_has_its_own(engines: dict[str, Bundle]) -> None:
    engine = engines["dense"].path
    with TorchRunner(engine, "unet", Options()) as runner:
        feeds = {batch: inputs(engine, "unet", batch) for batch in (1, 2)}
        first = {b: runner.infer(f)["out_sample"] for b, f in feeds.items()}
        changed = runner.infer({**feeds[2], "timestep": np.array(1)})["out_sample"]
        assert error(changed.astype(float), first[2].astype(float)) > 1e-3
        for batch, expected in first.items():
            np.testing.assert_array_equal(runner.infer(feeds[batch])["out_sample"], expected)


def test_time_and_memory_are_reported_and_memory_is_given_back(
    engines: dict[str, Bundle],
) -> None:
    before = torch.cuda.memory_allocated()
    engine = engines["dense"].path
    with TorchRunner(engine, "unet", Options()) as runner:
        assert runner.gpu_milliseconds is None
        runner.infer(inputs(engine, "unet"))
        assert runner.gpu_milliseconds is not None
        assert 0 < runner.gpu_milliseconds < 1000
        memory = runner.device_memory()
        assert memory is not None
        on_disk = (engine / "unet" / "model.onnx_data").stat().st_size
        assert 0.5 * on_disk < memory["weights"] < 3 * on_disk  # torch rounds each tensor up
        assert memory["context"] > 0
    assert torch.cuda.memory_allocated() <= before + 64_000_000  # libraries keep workspaces


def test_pictures(engines: dict[str, Bundle], tiny_sd: Path) -> None:
    from sdcompress.evaluation.images import generate_from_weights

    settings: dict[str, Any] = {"prompts": ["a red cat"], "seeds": [1], "steps": 3}
    (ours,) = generate(engines["dense"].path, **settings)
    (theirs,) = generate_from_weights(tiny_sd, **settings)
    assert (psnr(ours, theirs) or 100) > 30
    (sequential,) = generate(engines["dense"].path, residency="sequential", **settings)
    assert (psnr(ours, sequential) or 100) > 50


@pytest.mark.usefixtures("_sparse_cores")
def test_bench_by_events_with_the_memory_of_both_residencies(engines: dict[str, Bundle]) -> None:
    results = bench(engines["dense"], engines["sparse"], rounds=2, steps=2, budget=0.01)
    assert results.setup.timer == "CUDA events"
    kernels = results.engines["sparse"].sparse_kernels
    assert kernels.used
    assert "cuSPARSELt" in kernels.how
    for engine in results.engines.values():
        resident, sequential = engine.device_memory, engine.device_memory_sequential
        assert resident is not None
        assert sequential is not None
        assert resident.weights is not None
        assert sequential.weights is not None
        assert 0 < sequential.weights < resident.weights
        assert resident.peak is None or resident.peak > 0
