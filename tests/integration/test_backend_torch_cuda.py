"""torch_cuda on a real export: what it builds, and what its module computes, here on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.backends import load_backend, torch_cuda
from export.backends.torch_cuda import BACKEND, Options, TorchRunner
from export.specs import Sizes, component_spec, make_inputs
from export.to_onnx import export_bundle
from sdcompress.bundle import Bundle
from sdcompress.catalog import read_config
from sdcompress.errors import InputError, UsageError
from tests.unit.test_torch_cuda import Dense24

SMALL = Sizes(height=24, width=16)


@pytest.fixture(scope="module")
def onnx(pruned: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(pruned, tmp_path_factory.mktemp("onnx") / "sparse", dtype="fp16")


@pytest.fixture(scope="module")
def built(onnx: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return BACKEND.build(onnx, tmp_path_factory.mktemp("engines") / "sparse", sizes=SMALL)


def inputs(engine: Path, component: str) -> dict[str, Any]:
    config = read_config(engine / component)
    return make_inputs(component_spec(component, config), config, "fp16", height=12, width=8)


def run(runner: Any, feeds: dict[str, Any]) -> dict[str, Any]:
    with runner:
        outputs: dict[str, Any] = runner.infer(feeds)
    return outputs


def test_the_engine_is_the_graphs_and_a_choice_of_layers(built: Bundle, onnx: Bundle) -> None:
    details = built.manifest.details
    assert built.manifest.stage == "engine"
    assert built.manifest.parent == onnx.digest
    assert built.manifest.files.keys() == onnx.manifest.files.keys()
    assert details["providers"]["unet"] == "torch CUDA"
    assert details["options"] == {"sparse": "auto", "cuda_graph": True, "channels_last": True}
    sparse = details["sparse_layers"]
    assert sparse["text_encoder"] == sparse["vae_decoder"] == []
    plan = built.manifest.plan
    assert plan is not None
    linear = {p.name for p in plan.of("unet") if p.pruned and p.kind == "linear"}
    assert set(sparse["unet"]) == linear
    share = details["sparse_mac_share"]["unet"]
    assert 0.05 < share < 0.5  # the convolutions stay dense
    kernels = details["sparse_kernels"]
    assert kernels["used"] == len(linear)
    assert kernels["of"] == sum(p.pruned for p in plan.layers)
    assert f"{share:.0%} in unet" in kernels["how"]
    assert "24×16 pixels" in kernels["how"]


def test_switched_off_nothing_runs_sparse(onnx: Bundle, tmp_path: Path) -> None:
    engine = BACKEND.build(onnx, tmp_path / "dense", options={"sparse": "off"})
    assert not any(engine.manifest.details["sparse_layers"].values())
    assert engine.manifest.details["sparse_kernels"]["used"] == 0
    assert "switched off" in engine.manifest.details["sparse_kernels"]["how"]


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_module_computes_what_the_graph_computes(
    onnx: Bundle, component: str, channels_last: bool
) -> None:
    feeds = inputs(onnx.path, component)
    options = Options(channels_last=channels_last)
    found = run(TorchRunner(onnx.path, component, options, device="cpu"), feeds)
    details = {"components": [component], "providers": {component: "CPUExecutionProvider"}}
    reference = load_backend("onnxruntime").open(onnx.path, component, {**details, "options": {}})
    expected = run(reference, feeds)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == np.float16
        error = np.square(value.astype(float) - expected[name]).mean()
        assert error < 4e-4 * np.square(expected[name].astype(float)).mean()


def test_packed_weights_change_nothing(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = built.manifest.details["sparse_layers"]["unet"]
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(Dense24, "seen", seen, raising=False)
    monkeypatch.setattr(Dense24, "_PROTOTYPE_WARNING_SHOWN", True)
    Dense24._load_dispatch_table()
    monkeypatch.setattr(
        torch_cuda, "_pack", lambda w: Dense24(w.shape, w.clone(), None, None, None, None)
    )
    feeds = inputs(built.path, "unet")
    sparse = run(TorchRunner(built.path, "unet", Options(), keys, "cpu"), feeds)["out_sample"]
    assert len(seen) == len(keys)
    dense = run(TorchRunner(built.path, "unet", Options(), (), "cpu"), feeds)["out_sample"]
    scale = float(np.abs(dense).max())
    np.testing.assert_allclose(sparse, dense, rtol=0, atol=2e-3 * scale)


def test_weights_that_are_not_sparse_are_not_packed(
    tiny_source: Bundle, built: Bundle, tmp_path: Path
) -> None:
    """cuSPARSELt would silently drop what does not fit the pattern."""
    dense = export_bundle(tiny_source, tmp_path / "dense", dtype="fp16", components=("unet",))
    keys = built.manifest.details["sparse_layers"]["unet"]
    with pytest.raises(InputError, match="to be 2:4, found [0-9,]+ groups"):
        TorchRunner(dense.path, "unet", Options(), keys, "cpu").load()


def test_outputs_outlive_the_next_run(built: Bundle) -> None:
    feeds = inputs(built.path, "text_encoder")
    with TorchRunner(built.path, "text_encoder", Options(), device="cpu") as runner:
        first = runner.infer(feeds)["last_hidden_state"]
        kept = first.copy()
        other = {"input_ids": feeds["input_ids"][::-1]}
        assert not np.array_equal(runner.infer(other)["last_hidden_state"], kept)
        np.testing.assert_array_equal(first, kept)
        assert runner.gpu_milliseconds is None
        assert runner.device_memory() is None


def test_any_shape_is_taken(built: Bundle) -> None:
    with TorchRunner(built.path, "vae_decoder", Options(), device="cpu") as runner:
        for height, width in ((4, 6), (6, 4), (4, 6)):
            latents = np.zeros((1, 4, height, width))
            image = runner.infer({"latent_sample": latents})["sample"]
            assert image.shape == (1, 3, 2 * height, 2 * width)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_neither_bench_nor_generate_starts(built: Bundle) -> None:
    from export.bench import bench
    from export.pipeline import generate

    with pytest.raises(UsageError, match="cannot run here: torch"):
        bench(built, built)
    with pytest.raises(UsageError, match="cannot run here: torch"):
        generate(built.path, ["a cat"], [0])
    with pytest.raises(UsageError, match="torch"):
        BACKEND.open(built.path, "unet", built.manifest.details).load()


def test_the_gpu_benchmark_asks_for_each_component(
    built: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks/gpu on the CPU: its events and its device memory are None here."""
    import json

    from benchmarks.gpu import full_size, worker

    batches: dict[str, int] = {}

    class Counted(TorchRunner):
        def infer(self, feeds: Any) -> Any:
            batches[self._component] = len(next(iter(feeds.values())))
            return super().infer(feeds)

    def on_cpu(self: Any, engine: Path, component: str, details: Any) -> TorchRunner:
        return Counted(engine, component, Options(), device="cpu")

    monkeypatch.setattr(type(BACKEND), "open", on_cpu)
    monkeypatch.setattr(type(BACKEND), "why_not_run", lambda self, details: None)
    job = {**full_size.job(built, pixels=16, batch=4), "warm_up": 0, "iterations": 2}
    (tmp_path / "job.json").write_text(json.dumps(job))
    worker.main(str(tmp_path / "job.json"), str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert batches == {"text_encoder": 4, "unet": 4, "vae_decoder": 2}
    assert result["unet"] == [None, None]
    assert set(result["memory"]) == {"text_encoder", "unet", "vae_decoder", "peak"}
