"""onnxruntime's CUDA provider: the same answers as on the CPU, and its memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from export.backends import load_backend, open_component
from export.bench import bench
from export.specs import COMPONENTS, component_spec, make_inputs
from sdcompress.bundle import Bundle
from sdcompress.catalog import read_config

ort = pytest.importorskip("onnxruntime")
CUDA = "CUDAExecutionProvider"
pytestmark = pytest.mark.skipif(
    CUDA not in ort.get_available_providers(),
    reason="this onnxruntime has no CUDA provider; pip install 'sdcompress[gpu]'",
)


@pytest.fixture(scope="module")
def engines(
    onnx_fp16: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    """Of the dense export, by provider, and the sparse one for CUDA."""
    place, backend = tmp_path_factory.mktemp("engines"), load_backend("onnxruntime")
    made = {
        provider: backend.build(
            onnx_fp16["dense"], place / provider, options={"provider": provider}
        )
        for provider in ("cpu", "cuda")
    }
    sparse = backend.build(onnx_fp16["sparse"], place / "sparse", options={"provider": "cuda"})
    return {**made, "sparse": sparse}


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_gpu_computes_what_the_cpu_computes(engines: dict[str, Bundle], component: str) -> None:
    config = read_config(engines["cpu"].path / component)
    feeds: dict[str, Any] = make_inputs(component_spec(component, config), config, "fp16")
    answers = {}
    for provider in ("cpu", "cuda"):
        with open_component(engines[provider].path, component) as runner:
            answers[provider] = next(iter(runner.infer(feeds).values())).astype(float)
    difference = answers["cuda"] - answers["cpu"]
    assert np.square(difference).mean() < 4e-4 * np.square(answers["cpu"]).mean()


def test_the_engine_says_where_it_runs_and_what_it_holds(engines: dict[str, Bundle]) -> None:
    engine = engines["cuda"]
    assert set(engine.manifest.details["providers"].values()) == {CUDA}
    with open_component(engine.path, "unet") as runner:
        memory = runner.device_memory()
        assert memory is not None
        assert memory["weights"] > 100_000
        assert runner.gpu_milliseconds is None  # it gives no events


def test_bench(engines: dict[str, Bundle]) -> None:
    results = bench(engines["cuda"], engines["sparse"], rounds=2, steps=2, budget=0.01)
    assert results.setup.timer == "wall clock"
    for engine in results.engines.values():
        assert engine.device_memory is not None
        assert engine.device_memory_sequential is not None
        assert engine.device_memory.peak is None or engine.device_memory.peak > 0
