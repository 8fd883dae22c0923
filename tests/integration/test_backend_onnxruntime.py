"""The onnxruntime backend on the CPU: builds, runs, refuses, and claims no sparse kernels."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from export.backends import Tensor, load_backend, names, open_component
from export.specs import component_spec, make_inputs
from sdcompress.bundle import MANIFEST, Bundle
from sdcompress.errors import InputError, UsageError, VerificationError

COMPONENTS = ["text_encoder", "unet", "vae_decoder"]


@pytest.mark.parametrize("name", names())
def test_every_backend_says_whether_it_runs_here(name: str) -> None:
    backend = load_backend(name)
    assert backend.name == name
    why = backend.available()
    assert why is None or len(why) > 20


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match=r"there are: .*onnxruntime"):
        load_backend("abacus")


def test_an_engine_is_the_graphs_and_how_to_load_them(onnx_dense: Bundle, engine: Bundle) -> None:
    manifest = engine.manifest
    assert manifest.stage == "engine"
    assert manifest.parent == onnx_dense.digest
    assert manifest.files == onnx_dense.manifest.files
    assert manifest.details["backend"] == "onnxruntime"
    assert manifest.details["components"] == COMPONENTS
    assert set(manifest.details["providers"].values()) == {"CPUExecutionProvider"}
    engine.check_files()
    model = Path("unet", "model.onnx")
    assert not (engine.path / model).samefile(onnx_dense.path / model)  # either may be edited


def test_onnx_still_reads_the_graphs_an_engine_was_built_from(
    onnx_dense: Bundle, engine: Bundle
) -> None:
    """onnx refuses external data with a second hard link, so a build must not make one."""
    import onnx

    for bundle in (onnx_dense, engine):
        model = onnx.load(bundle.path / "unet" / "model.onnx")
        assert all(i.raw_data for i in model.graph.initializer)


def test_it_claims_no_sparse_kernels(engine_sparse: Bundle) -> None:
    plan = engine_sparse.manifest.plan
    assert plan is not None
    kernels = engine_sparse.manifest.details["sparse_kernels"]
    assert kernels["used"] == 0
    assert kernels["of"] == sum(layer.pruned for layer in plan.layers) > 0
    assert "zeros" in kernels["how"]


def test_the_same_input_gives_the_same_bundle(
    onnx_dense: Bundle, engine: Bundle, tmp_path: Path
) -> None:
    options = {"provider": "cpu"}
    again = load_backend("onnxruntime").build(onnx_dense, tmp_path / "again", options=options)
    assert again.digest == engine.digest


@pytest.mark.parametrize("component", COMPONENTS)
def test_it_runs_and_describes_what_it_takes(engine: Bundle, component: str) -> None:
    import json

    config = json.loads((engine.path / component / "config.json").read_text())
    spec = component_spec(component, config)
    feeds = make_inputs(spec, config, "fp32", batch=3)
    with open_component(engine.path, component) as runner:
        assert list(runner.inputs) == [t.name for t in spec.inputs]
        outputs = runner.infer(feeds)
        assert list(outputs) == list(runner.outputs) == [t.name for t in spec.outputs]
        assert all(np.isfinite(o).all() and o.shape[0] == 3 for o in outputs.values())
        assert runner.device_memory() is None


def test_feeds_are_cast_to_what_the_graph_takes(engine: Bundle) -> None:
    with open_component(engine.path, "unet") as runner:
        assert runner.inputs["timestep"] == Tensor(np.dtype("int64"), ())
        feeds = {
            "sample": np.ones((1, 4, 8, 8)),
            "timestep": np.float32(3),
            "encoder_hidden_states": np.ones((1, 77, 32), np.float16),
        }
        assert runner.infer(feeds)["out_sample"].dtype == np.float32


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"provider": "gpu"}, "'provider'"),
        ({"threads": 0}, "'threads'"),
        ({"speed": 11}, "'speed'.*there are: provider"),
    ],
)
def test_wrong_options_are_refused(
    onnx_dense: Bundle, tmp_path: Path, options: dict[str, object], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        load_backend("onnxruntime").build(onnx_dense, tmp_path / "out", options=options)
    assert not list(tmp_path.iterdir())


def test_a_provider_that_is_not_here_is_refused(onnx_dense: Bundle, tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UsageError, match="set provider: cpu"):
        load_backend("onnxruntime").build(
            onnx_dense, tmp_path / "out", options={"provider": "cuda"}
        )


def test_a_target_is_refused(onnx_dense: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="target"):
        load_backend("onnxruntime").build(onnx_dense, tmp_path / "out", target={"sm": 87})


def copied(bundle: Bundle, to: Path) -> Path:
    shutil.copytree(bundle.path, to)
    return to


def test_a_damaged_graph_builds_no_engine(onnx_dense: Bundle, tmp_path: Path) -> None:
    damaged = copied(onnx_dense, tmp_path / "damaged")
    data = damaged / "unet" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(VerificationError, match=r"unet/model\.onnx_data"):
        load_backend("onnxruntime").build(Bundle.open(damaged), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_engine_without_its_graph_says_so(engine: Bundle, tmp_path: Path) -> None:
    broken = copied(engine, tmp_path / "broken")
    (broken / "unet" / "model.onnx").write_bytes(b"no graph")
    with (
        pytest.raises(InputError, match="onnxruntime cannot load it") as caught,
        open_component(broken, "unet"),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_component_it_lacks_is_named(engine: Bundle) -> None:
    with pytest.raises(InputError, match="no component 'safety_checker', only text_encoder"):
        open_component(engine.path, "safety_checker")


def test_graphs_are_no_engine(onnx_dense: Bundle) -> None:
    assert (onnx_dense.path / MANIFEST).exists()
    with pytest.raises(InputError, match="sdcompress build"):
        open_component(onnx_dense.path, "unet")
