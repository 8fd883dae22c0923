"""The builder against the true API surfaces of four versions of TensorRT.

A surface without one of the names the builder uses must be noticed: by an error of one line, or by
the report saying what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.device.builder import Request, build
from export.device.errors import DeviceError
from tests.fake_tensorrt import MAGIC, SURFACES, VERSIONS, FakeModule, fake_tensorrt
from tests.tiny_onnx import write_graph

SHAPES = {"sample": (2, 4, 8, 8), "timestep": (), "encoder_hidden_states": (2, 8, 4)}
LARGE = {"sample": (2, 4, 16, 16), "timestep": (), "encoder_hidden_states": (2, 8, 4)}
PROFILE = {name: (shape, shape, LARGE[name]) for name, shape in SHAPES.items()}
# Without these a build can be done, and its report says that they are missing.
OPTIONAL = {
    "the progress monitor",
    "the timing cache",
    "detailed layer names",
    "the engine inspector",
    "the engine's context memory",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_graph(folder / "unet", "unet")
    write_graph(folder / "other", "unet", weight=3.0)
    return folder


def use_everything(trt: FakeModule, models: Path, work: Path) -> dict[str, Any]:
    """One build of every kind the builder knows, a refit, and a file that cannot be read."""
    unet = Request(
        module="tensorrt",
        onnx=str(models / "unet" / "model.onnx"),
        plan=str(work / "engine.plan"),
        log=str(work / "build.log"),
        shapes=SHAPES,
    )
    every = replace(
        unet,
        workspace_mb=512,
        optimization_level=4,
        timing_cache=str(work / "timing"),
        version_compatible=True,
        hardware_compatible="AMPERE_PLUS",
        refit=True,
        weight_streaming=True,
    )
    heard: list[tuple[str, int, int]] = []
    results = {"every": build(trt, every, lambda *told: heard.append(told))}
    if heard:
        assert heard == [("Building engine", n, 2) for n in (0, 1, 2)]
    results["profiles"] = build(trt, replace(unet, shapes={}, profiles=(PROFILE,)))
    stripped = replace(unet, strip=True, sparse=False, plan=str(work / "stripped.plan"))
    results["strip"] = build(trt, stripped)
    refit = replace(
        unet,
        onnx=str(models / "other" / "model.onnx"),
        plan=str(work / "refitted.plan"),
        refit_from=every.plan,
        refit_sha256=build(trt, every)["plan_sha256"],
    )
    results["refit"] = build(trt, refit)
    empty = replace(refit, onnx=str(models / "empty" / "model.onnx"))
    results["foreign"] = {"refused": refused(trt, empty), "missing": []}
    trt.behaviour.parses = False
    results["unread"] = {"refused": refused(trt, unet), "missing": []}
    return results


def refused(trt: FakeModule, request: Request) -> str:
    try:
        build(trt, request)
    except DeviceError as error:
        return str(error).rpartition("TensorRT cannot read it")[2]
    return ""


@pytest.fixture(scope="module", autouse=True)
def _empty(models: Path) -> None:
    """A graph that has none of the engine's weights."""
    import onnx

    path = write_graph(models / "empty", "unet")
    model = onnx.load(str(path))
    model.graph.initializer[0].name = "another"
    model.graph.node[0].input[1] = "another"
    onnx.save(model, str(path))


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_works(version: str, models: Path, tmp_path: Path) -> None:
    results = use_everything(fake_tensorrt(version), models, tmp_path)
    assert not any(result["missing"] for result in results.values())
    assert results["every"]["tactics"] == 1
    assert results["every"]["context_bytes"] == 1 << 20
    assert results["every"]["context_from"] == "engine"
    advice = "; export it again, or use a newer TensorRT"
    assert results["foreign"]["refused"] == f": no weights scale{advice}"
    assert results["unread"]["refused"] == f" at node node_3 (Frobnicate): Plugin not found{advice}"


def plan_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    assert raw.startswith(MAGIC)
    plan: dict[str, Any] = json.loads(raw[len(MAGIC) :])
    return plan


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_asked_for_reaches_the_plan(version: str, models: Path, tmp_path: Path) -> None:
    use_everything(fake_tensorrt(version), models, tmp_path)
    every = plan_of(tmp_path / "engine.plan")
    assert every["flags"] == ["REFIT", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"]
    assert every["hardware"] == "AMPERE_PLUS"
    assert every["detailed"]
    assert [i[2] for i in every["inputs"]] == [[2, 4, 8, 8], [], [2, 8, 4]]
    stripped = plan_of(tmp_path / "stripped.plan")
    assert stripped["flags"] == ["REFIT_IDENTICAL", "STRIP_PLAN"]
    refitted = plan_of(tmp_path / "refitted.plan")
    assert refitted["weights"]["scale"] not in ("", every["weights"]["scale"])


@pytest.mark.parametrize("version", VERSIONS)
def test_profiles_reach_the_plan(version: str, models: Path, tmp_path: Path) -> None:
    trt = fake_tensorrt(version)
    request = Request(
        module="tensorrt",
        onnx=str(models / "unet" / "model.onnx"),
        plan=str(tmp_path / "plan"),
        log=str(tmp_path / "log"),
        profiles=(PROFILE, {**PROFILE, "sample": (LARGE["sample"],) * 3}),
    )
    build(trt, request)
    profiles = plan_of(tmp_path / "plan")["profiles"]
    assert profiles[0]["sample"] == [[2, 4, 8, 8], [2, 4, 8, 8], [2, 4, 16, 16]]
    assert profiles[1]["sample"] == [[2, 4, 16, 16]] * 3


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_enum_value_is_relied_on(version: str, seed: int, models: Path, tmp_path: Path) -> None:
    use_everything(fake_tensorrt(version, seed=seed), models, tmp_path)
    plan = plan_of(tmp_path / "engine.plan")
    assert plan["flags"] == ["REFIT", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_that_is_used_is_missed(
    version: str, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    known = fake_tensorrt(version)
    expected = use_everything(known, models, tmp_path_factory.mktemp("all"))
    # Python's own object has an __init__, too: without that one nothing changes.
    used = sorted(known.touched - {"ILogger.__init__", "IProgressMonitor.__init__"})
    assert len(used) > 60
    unnoticed = []
    for name in used:
        trt = fake_tensorrt(version, without={name})
        try:
            results = use_everything(trt, models, tmp_path_factory.mktemp("less"))
        except DeviceError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017
            continue
        missing = {m for result in results.values() for m in result["missing"]}
        assert missing <= OPTIONAL
        differs = any(
            results[kind]["refused"] != expected[kind]["refused"] for kind in ("foreign", "unread")
        )
        if not missing and not differs:
            unnoticed.append(name)
    assert unnoticed == []


def test_each_optional_means_is_named_when_it_is_missing(models: Path, tmp_path: Path) -> None:
    absent = {
        "IBuilderConfig.progress_monitor": "the progress monitor",
        "IBuilderConfig.create_timing_cache": "the timing cache",
        "ProfilingVerbosity.DETAILED": "detailed layer names",
        "ICudaEngine.create_engine_inspector": "the engine inspector",
        "ICudaEngine.device_memory_size_v2": "the engine's context memory",
    }
    for i, (name, what) in enumerate(absent.items()):
        work = tmp_path / str(i)
        work.mkdir()
        trt = fake_tensorrt("10.3.0", without={name})
        assert use_everything(trt, models, work)["every"]["missing"] == [what]


# The fake itself: a test that stands on it is worth what it refuses.


@pytest.fixture
def trt() -> FakeModule:
    return fake_tensorrt("11.4.0")


@pytest.fixture
def make_builder(trt: FakeModule) -> Callable[[], Any]:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None: ...

    return lambda: trt.Builder(Log())


def test_the_fake_lacks_what_the_version_lacks(
    trt: FakeModule, make_builder: Callable[[], Any]
) -> None:
    assert not hasattr(trt.BuilderFlag, "FP16")
    assert hasattr(fake_tensorrt("10.3.0").BuilderFlag, "FP16")
    assert not hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
    builder = make_builder()
    assert not hasattr(builder, "platform_has_fast_fp16")
    assert not hasattr(builder.create_builder_config(), "int8_calibrator")
    assert not hasattr(trt, "ComputeCapability")


def test_the_fake_refuses_wrong_arguments(trt: FakeModule, make_builder: Callable[[], Any]) -> None:
    builder = make_builder()
    for arguments, named in (((0, 0), {}), ((), {"flag": 0}), (("0",), {}), ((True,), {})):
        with pytest.raises(TypeError, match="incompatible arguments"):
            builder.create_network(*arguments, **named)
    config = builder.create_builder_config()
    with pytest.raises(TypeError, match="incompatible arguments"):
        config.set_flag(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(TypeError, match="no constructor"):
        trt.IBuilderConfig()


def test_the_fake_guards_its_properties(make_builder: Callable[[], Any]) -> None:
    network = make_builder().create_network(flags=0)
    with pytest.raises(AttributeError):
        network.num_inputs = 3
    with pytest.raises(AttributeError):
        network.anything = 3


def test_the_fake_wants_base_classes_to_be_made(trt: FakeModule) -> None:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None: ...

    with pytest.raises(TypeError, match="ILogger.__init__"):
        trt.Builder(Log())


def test_enum_values_are_shuffled() -> None:
    flags = fake_tensorrt("10.3.0").BuilderFlag
    members = json.loads((SURFACES / "10.3.0.json").read_text())["enums"]["BuilderFlag"]
    values = [int(getattr(flags, m)) for m in members]
    assert sorted(values) == list(range(len(members)))
    assert values != sorted(values)
    other = fake_tensorrt("10.3.0", seed=1).BuilderFlag
    assert values != [int(getattr(other, m)) for m in members]
