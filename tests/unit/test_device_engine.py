"""Loading and running plans, on a fake of every TensorRT from 10.3 on, and fake GPU memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.device.builder import Request, build
from export.device.engine import Engine
from export.device.errors import DeviceError
from tests.fake_cuda import fake_cuda
from tests.fake_tensorrt import VERSIONS, fake_tensorrt

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x + x for x of [batch, 3], in fp16."""
    half = onnx.TensorProto.FLOAT16
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [onnx.helper.make_tensor_value_info("x", half, ["batch", 3])],
        [onnx.helper.make_tensor_value_info("y", half, ["batch", 3])],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    made.ir_version = 10
    path: Path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    onnx.save(made, path)
    return path


def make_plan(trt: Any, model: Path, folder: Path, monkeypatch: Any, **how: Any) -> dict[str, Any]:
    monkeypatch.chdir(folder)  # the builder changes the directory of its process
    request = Request(
        module="tensorrt",
        onnx=str(model),
        plan=str(folder / "engine.plan"),
        log=str(folder / "build.log"),
        sparse=False,
        **(how or {"shapes": {"x": (2, 3)}}),
    )
    made = build(trt, request)
    return {"plan": folder / "engine.plan", "sha256": made["plan_sha256"]}


X = np.array([[1, 2, 3], [4, 5, 60]], np.float16)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_it_computes(
    version: str, cuda_graph: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = fake_tensorrt(version)
    cuda, library = fake_cuda()
    made = make_plan(trt, model, tmp_path, monkeypatch)
    with Engine(trt, **made, cuda=cuda, cuda_graph=cuda_graph) as engine:
        assert engine.inputs == {"x": ("float16", (2, 3))}
        assert engine.outputs == {"y": ("float16", (2, 3))}
        assert engine.memory == {"weights": made["plan"].stat().st_size, "context": 1 << 20}
        assert engine.gpu_milliseconds is None
        found = engine.run({"x": X})
        assert np.frombuffer(found["y"], np.float16).tolist() == [2, 4, 6, 8, 10, 120]
        assert isinstance(found["y"], bytearray)
        assert engine.gpu_milliseconds == 0.0  # the fake takes no time
        assert library.used == 24
    engine.close()
    assert library.allocated == {}
    assert library.alive == set()


def test_its_time_is_that_between_the_events(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, library = fake_cuda()

    def execute(path: str, feeds: dict[str, bytes]) -> dict[str, bytes]:
        library.enqueue(lambda: None, milliseconds=7.5)
        return {"y": feeds["x"]}

    trt = fake_tensorrt("10.3.0", execute=execute)
    with Engine(trt, **make_plan(trt, model, tmp_path, monkeypatch), cuda=cuda) as engine:
        engine.upload({"x": X})
        engine.launch()
        assert engine.wait() == 7.5
        assert bytes(engine.read()["y"]) == X.tobytes()


def test_a_graph_repeats_what_was_captured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, library = fake_cuda()
    ran = []

    def execute(path: str, feeds: dict[str, bytes]) -> dict[str, bytes]:
        library.enqueue(lambda: ran.append(1))
        return {"y": feeds["x"]}

    trt = fake_tensorrt("10.3.0", execute=execute)
    made = make_plan(trt, model, tmp_path, monkeypatch)
    with Engine(trt, **made, cuda=cuda, cuda_graph=True) as engine:
        engine.upload({"x": X})
        engine.launch()
        assert len(ran) == 2  # once without the graph, then the graph
        engine.launch()
        assert len(ran) == 3


@pytest.mark.parametrize("version", VERSIONS)
def test_free_sizes_take_the_profile_that_fits(
    version: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = fake_tensorrt(version)
    cuda, library = fake_cuda()
    profiles = ({"x": ((1, 3), (1, 3), (1, 3))}, {"x": ((2, 3), (3, 3), (4, 3))})
    made = make_plan(trt, model, tmp_path, monkeypatch, profiles=profiles)
    with Engine(trt, **made, cuda=cuda) as engine:
        assert engine.inputs == {"x": ("float16", (-1, 3))}
        for rows in (3, 1, 4):
            data = np.full((rows, 3), 2, np.float16)
            found = engine.run({"x": data}, {"x": data.shape})
            assert np.frombuffer(found["y"], np.float16).tolist() == [4] * rows * 3
        assert library.used == 2 * 4 * 3 * 2
        with pytest.raises(DeviceError, match=r"built for other sizes than x \[9, 3\]; build"):
            engine.run({"x": X}, {"x": (9, 3)})
        with pytest.raises(DeviceError, match="x has free sizes; give its shape"):
            Engine(trt, **made, cuda=cuda).run({"x": X})


def test_the_same_shapes_keep_buffers_and_graph(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = fake_tensorrt("10.3.0")
    cuda, library = fake_cuda()
    made = make_plan(trt, model, tmp_path, monkeypatch, profiles=({"x": ((1, 3), (2, 3), (4, 3))},))
    with Engine(trt, **made, cuda=cuda, cuda_graph=True) as engine:
        engine.run({"x": X}, {"x": X.shape})
        before = set(library.allocated), set(library.alive)
        engine.run({"x": X}, {"x": X.shape})
        assert (set(library.allocated), set(library.alive)) == before
        engine.run({"x": X[:1]}, {"x": (1, 3)})
        assert library.alive != before[1]  # another graph
        assert library.used == 2 * 3 * 2
    assert library.alive == set()


def test_memory_that_is_short_once_is_asked_for_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = fake_tensorrt("10.3.0")
    cuda, library = fake_cuda(memory=20)
    made = make_plan(trt, model, tmp_path, monkeypatch, profiles=({"x": ((1, 3), (2, 3), (4, 3))},))
    with Engine(trt, **made, cuda=cuda) as engine:
        with pytest.raises(DeviceError, match="out of memory"):
            engine.run({"x": X}, {"x": X.shape})
        library.memory = 24
        found = engine.run({"x": X}, {"x": X.shape})
        assert np.frombuffer(found["y"], np.float16).tolist() == [2, 4, 6, 8, 10, 120]


def test_a_wrong_digest_is_found_before_anything_else(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = fake_tensorrt("10.3.0")
    made = make_plan(trt, model, tmp_path, monkeypatch)
    made["plan"].write_bytes(made["plan"].read_bytes() + b" ")
    trt.touched.clear()
    with pytest.raises(DeviceError, match="its sha256 differs.*was not loaded") as error:
        Engine(trt, **made, cuda=fake_cuda()[0])
    assert error.value.exit_code == 3
    assert not {name for name in trt.touched if name.startswith("Runtime")}


@pytest.mark.parametrize(
    ("version", "sm", "reason"),
    [
        ("10.13.3", "8.7", "version mismatch"),
        ("10.3.0", "8.9", "another compute capability"),
    ],
)
def test_a_plan_of_another_version_or_gpu(
    version: str,
    sm: str,
    reason: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_plan(fake_tensorrt("10.3.0", sm="8.7"), model, tmp_path, monkeypatch)
    cuda, library = fake_cuda(compute_capability=sm)
    trt = fake_tensorrt(version, sm=sm)
    with pytest.raises(DeviceError) as error:
        Engine(
            trt,
            **made,
            cuda=cuda,
            built_for="TensorRT 10.3.0 on compute capability 8.7",
        )
    message = str(error.value)
    assert (
        f"cannot be loaded by tensorrt {trt.__version__} on Fake GPU (compute capability {sm})"
        in message
    )
    assert reason in message
    assert "it was built for TensorRT 10.3.0 on compute capability 8.7; " in message
    assert "build it again for this one" in message
    assert "\n" not in message
    assert library.alive == set()


def test_a_version_compatible_plan_loads_only_where_its_code_is_allowed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = fake_tensorrt("10.3.0"), fake_tensorrt("10.13.3")
    shapes = {"x": (2, 3)}
    made = make_plan(old, model, tmp_path, monkeypatch, shapes=shapes, version_compatible=True)
    with pytest.raises(DeviceError, match="cannot be loaded"):
        Engine(new, **made, cuda=fake_cuda()[0])
    with Engine(new, **made, cuda=fake_cuda()[0], allow_host_code=True) as engine:
        assert np.frombuffer(engine.run({"x": X})["y"], np.float16)[0] == 2


def test_no_plan_and_an_empty_one(tmp_path: Path) -> None:
    trt = fake_tensorrt("10.3.0")
    with pytest.raises(DeviceError, match="cannot be read"):
        Engine(trt, tmp_path / "none", sha256="0" * 64)
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(DeviceError, match="cannot be read"):
        Engine(trt, empty, sha256=hashlib.sha256(b"").hexdigest())


def test_too_little_memory_leaves_nothing_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = fake_tensorrt("10.3.0")
    made = make_plan(trt, model, tmp_path, monkeypatch)
    cuda, library = fake_cuda(memory=20)
    with pytest.raises(DeviceError, match=r"out of memory \(cudaMalloc, code 2\); close other"):
        Engine(trt, **made, cuda=cuda)
    assert library.allocated == {}
    assert library.alive == set()


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "takes x, got nothing"),
        ({"z": b""}, "takes x, got z"),
        ({"x": b"123"}, r"x takes 12 bytes \(float16 \[2, 3\]\), got 3"),
    ],
)
def test_wrong_inputs(
    feeds: dict[str, bytes],
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trt = fake_tensorrt("10.3.0")
    made = make_plan(trt, model, tmp_path, monkeypatch)
    with Engine(trt, **made, cuda=fake_cuda()[0]) as engine:
        with pytest.raises(DeviceError, match=message):
            engine.run(feeds)
        engine.run({"x": X})  # and goes on


def test_a_failed_run_says_what_tensorrt_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, stream_handle: int) -> bool:
        self._engine._log.log(trt.ILogger.Severity.ERROR, "no\n  kernel image")
        return False

    trt = fake_tensorrt("10.3.0")
    made = make_plan(trt, model, tmp_path, monkeypatch)
    monkeypatch.setattr(trt.made["IExecutionContext"], "execute_async_v3", fail)
    heard: list[tuple[str, str]] = []
    with (
        Engine(trt, **made, cuda=fake_cuda()[0], log=lambda *said: heard.append(said)) as engine,
        pytest.raises(DeviceError, match=r"TensorRT could not run it \(no kernel image\)$"),
    ):
        engine.run({"x": X})
    assert heard == [("ERROR", "no\n  kernel image")]


def test_tensorrt_rtx_keeps_its_cache_and_records_its_own_graphs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for what TensorRT-RTX alone has: the real module needs a GPU to run."""

    class Cache:
        content = b""

        def serialize(self) -> bytes:
            return self.content + b"kernel;"

        def deserialize(self, blob: bytes) -> bool:
            self.content = blob
            return True

    class Config:
        cuda_graph_strategy: Any = None

        def create_runtime_cache(self) -> Cache:
            return Cache()

        def set_runtime_cache(self, cache: Cache) -> bool:
            return True

    trt, config = fake_tensorrt("11.4.0"), Config()
    made = make_plan(trt, model, tmp_path, monkeypatch)
    trt.made["IRuntimeConfig"].create_runtime_cache = Config.create_runtime_cache
    monkeypatch.setattr(trt.made["ICudaEngine"], "create_runtime_config", lambda self: config)
    real = trt.made["ICudaEngine"].create_execution_context
    monkeypatch.setattr(
        trt.made["ICudaEngine"], "create_execution_context", lambda self, config: real(self)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trt.CudaGraphStrategy = type("CudaGraphStrategy", (), {"WHOLE_GRAPH_CAPTURE": "whole"})
    for times in (1, 2):
        cuda, library = fake_cuda()
        with Engine(trt, **made, cuda=cuda, cuda_graph=times == 2) as engine:
            engine.run({"x": X})
            assert len(library.alive) == 3  # a stream and two events, but no graph of ours
            assert config.cuda_graph_strategy == (None if times == 1 else "whole")
        (file,) = (tmp_path / "cache" / "sdcompress").iterdir()
        assert file.read_bytes() == b"kernel;" * times
    assert file.name == f"tensorrt-{trt.__version__}-{made['sha256'][:16]}.cache"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_it_uses_is_needed(
    version: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version without one of these names cannot be served, and no test may overlook that."""
    trt = fake_tensorrt(version)
    profiles = ({"x": ((1, 3), (1, 3), (1, 3))}, {"x": ((2, 3), (2, 3), (4, 3))})
    every = {"profiles": profiles, "weight_streaming": True, "version_compatible": True}
    made = make_plan(trt, model, tmp_path, monkeypatch, **every)

    def use_everything(trt: Any) -> dict[str, int]:
        how: dict[str, Any] = {"weight_budget": 1 << 12, "allow_host_code": True}
        with Engine(trt, **made, cuda=fake_cuda()[0], **how) as engine:
            engine.run({"x": X}, {"x": X.shape})
            return engine.memory

    trt.touched.clear()
    held = made["plan"].stat().st_size - (1 << 16) + (1 << 12)
    assert use_everything(trt) == {"weights": held, "context": 1 << 20}
    used = {name for name in trt.touched if "." in name and not name.endswith(".__init__")}
    assert used == NAMES
    for name in used - {"ILogger.log"}:  # which is ours, and called by the real library only
        with pytest.raises((AttributeError, DeviceError, KeyError)):
            use_everything(fake_tensorrt(version, without={name}))


NAMES = {
    "ICudaEngine.create_execution_context",
    "ICudaEngine.device_memory_size_v2",
    "ICudaEngine.get_tensor_dtype",
    "ICudaEngine.get_tensor_mode",
    "ICudaEngine.get_tensor_name",
    "ICudaEngine.get_tensor_profile_shape",
    "ICudaEngine.get_tensor_shape",
    "ICudaEngine.num_io_tensors",
    "ICudaEngine.num_optimization_profiles",
    "ICudaEngine.streamable_weights_size",
    "ICudaEngine.weight_streaming_budget_v2",
    "IExecutionContext.active_optimization_profile",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.get_tensor_shape",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_optimization_profile_async",
    "IExecutionContext.set_tensor_address",
    "ILogger.log",
    "Runtime.deserialize_cuda_engine",
    "Runtime.engine_host_code_allowed",
    "TensorIOMode.INPUT",
}
