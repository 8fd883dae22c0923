"""The process of one build: what is refused, the ladder when memory runs out, the timing cache."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.device import builder
from export.device.builder import (
    OutOfMemoryError,
    Request,
    build,
    build_in_process,
    check_version,
    ladder,
    run_in_process,
)
from export.device.errors import DeviceError
from export.device.process import command_of
from tests.fake_tensorrt import CACHE_MAGIC, MAGIC, fake_tensorrt, install
from tests.tiny_onnx import write_graph

ARGV = command_of("builder")
SHAPES = {"sample": (2, 4, 8, 8), "timestep": (), "encoder_hidden_states": (2, 8, 4)}
Install = Callable[..., None]


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    model = write_graph(tmp_path / "unet", "unet")
    return Request(
        module="tensorrt",
        onnx=str(model),
        plan=str(tmp_path / "engine.plan"),
        log=str(tmp_path / "build.log"),
        shapes=SHAPES,
        workspace_mb=1024,
    )


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a fake of some behaviour where child processes find it."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def put(version: str = "10.3.0", **behaviour: Any) -> None:
        install(folder, version, **behaviour)

    return put


def test_the_device_package_needs_the_standard_library_only() -> None:
    folder = Path(builder.__file__).parent
    for file in (folder / "builder.py", folder / "evidence.py", folder / "errors.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.partition(".")[0] for a in node.names} <= sys.stdlib_module_names
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").partition(".")[0] in sys.stdlib_module_names
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1


@pytest.mark.parametrize("version", ["8.6.2", "10.2.0.19"])
def test_old_versions_are_refused_with_the_upgrade(version: str) -> None:
    with pytest.raises(DeviceError, match="10.3 or newer, on a Jetson to JetPack 6.1 or newer"):
        check_version("tensorrt", version)


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106"])
def test_newer_versions_are_not(version: str) -> None:
    check_version("tensorrt", version)
    check_version("tensorrt_rtx", "1.7.1.116")


def test_a_request_survives_json(request_: Request) -> None:
    profile = {"sample": ((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 16, 16))}
    asked = replace(request_, profiles=(profile,), refit=True, compute_capability="8.9")
    assert Request.from_json(asked.to_json()) == asked


def test_the_ladder_is_the_stated_one(request_: Request) -> None:
    rungs = [(r.workspace_mb, r.optimization_level) for r in ladder(request_)]
    assert rungs == [(1024, None), (512, None), (256, None), (256, 2), (256, 1)]
    free = replace(request_, workspace_mb=None, optimization_level=1)
    rungs = [(r.workspace_mb, r.optimization_level) for r in ladder(free)]
    assert rungs == [(None, 1), (1024, 1), (512, 1), (512, 0)]


def test_nothing_asked_for_is_ignored(request_: Request) -> None:
    trt = fake_tensorrt("10.3.0")
    cases: dict[str, dict[str, Any]] = {
        "hardware compatibility SAME_COMPUTE_CAPABILITY": {
            "hardware_compatible": "SAME_COMPUTE_CAPABILITY"
        },
        "building for another GPU": {"compute_capability": "8.9"},
    }
    for what, options in cases.items():
        with pytest.raises(DeviceError, match=f"tensorrt 10.3.0 has no {what}"):
            build(trt, replace(request_, **options))
    less = fake_tensorrt("11.4.0", without={"BuilderFlag.WEIGHT_STREAMING"})
    with pytest.raises(DeviceError, match="has no BuilderFlag.WEIGHT_STREAMING; leave that option"):
        build(less, replace(request_, weight_streaming=True))
    assert not Path(request_.plan).exists()


def test_stripped_and_sparse_exclude_each_other(request_: Request) -> None:
    with pytest.raises(DeviceError, match="set sparse: off, or strip: false"):
        build(fake_tensorrt("10.3.0"), replace(request_, strip=True))


def test_a_missing_data_file_is_named(request_: Request) -> None:
    Path(request_.onnx).with_name("model.onnx_data").unlink()
    with pytest.raises(DeviceError, match="its data file model.onnx_data is missing"):
        build(fake_tensorrt("10.3.0"), request_)


def test_a_file_that_is_no_onnx(request_: Request) -> None:
    Path(request_.onnx).write_bytes(b"\xff" * 100)
    with pytest.raises(DeviceError, match="cannot read it: Failed to parse the ONNX model"):
        build(fake_tensorrt("10.3.0"), request_)


def test_an_unknown_input_and_free_shapes(request_: Request) -> None:
    trt = fake_tensorrt("10.3.0")
    with pytest.raises(DeviceError, match="has no input 'x', only encoder_hidden_states, sample"):
        build(trt, replace(request_, shapes={"x": (1,)}))
    with pytest.raises(DeviceError, match="could not build it: Network has dynamic inputs"):
        build(trt, replace(request_, shapes={}))


def test_a_failed_build_leaves_no_plan_and_an_old_one_alone(request_: Request) -> None:
    Path(request_.plan).write_bytes(b"old")
    with pytest.raises(DeviceError):
        build(fake_tensorrt("10.3.0"), replace(request_, shapes={}))
    assert Path(request_.plan).read_bytes() == b"old"
    assert not list(Path(request_.plan).parent.glob("*.partial"))


def test_the_log_is_kept_and_names_no_folder(request_: Request) -> None:
    trt = fake_tensorrt(
        "10.3.0", log=[("INFO", "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: a")]
    )
    made = build(trt, request_)
    text = Path(request_.log).read_text()
    assert "[INFO] (Sparsity) Found 3 layer(s)" in text
    assert str(Path(request_.onnx).parent) not in text
    assert made["layers_eligible"] == 3
    assert made["layers_sparse"] == 0  # the engine names all its tactics, and none is sparse


def test_sparse_tactics_of_the_engine_are_reported(request_: Request) -> None:
    layers = [
        {"Name": "a", "TacticName": "sm80_xmma_sparse_conv"},
        {"Name": "b", "TacticName": "fmha_v2_flash_attention_fp16"},
        {"Name": "c", "TacticName": ""},
    ]
    made = build(fake_tensorrt("10.3.0", layers=layers), request_)
    assert made["layers_sparse"] == 1
    assert made["sparse_tactics"] == ["sm80_xmma_sparse_conv"]
    assert (made["tactics"], made["fused_attention"]) == (3, 1)


def test_an_engine_that_cannot_be_looked_into_is_built_all_the_same(request_: Request) -> None:
    made = build(fake_tensorrt("10.3.0", loads=False), request_)
    assert made["context_from"] == "log"
    assert made["context_bytes"] == 1 << 20
    assert any("could not be loaded to look into it" in w for w in made["warnings"])


def test_no_gpu_is_said_in_one_line(request_: Request) -> None:
    """The bindings answer a null pointer with a TypeError, after saying why in the log."""
    trt = fake_tensorrt("10.3.0")

    def cannot(logger: Any) -> None:
        severity = trt.made["ILogger"].Severity.__members__["ERROR"]
        logger.log(severity, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.made["Builder"] = cannot
    with pytest.raises(DeviceError, match=r"failed \(CUDA initialization failure with error: 35\)"):
        build(trt, request_)


def test_refitting_checks_the_digest_before_it_loads_anything(request_: Request) -> None:
    trt = fake_tensorrt("10.3.0")
    digest = build(trt, replace(request_, refit=True))["plan_sha256"]
    plan = Path(request_.plan)
    plan.write_bytes(plan.read_bytes().replace(MAGIC, MAGIC.lower()))
    loaded = len(trt.touched)
    trt.touched.discard("Runtime.deserialize_cuda_engine")
    with pytest.raises(DeviceError, match="is not the plan its manifest describes") as caught:
        build(trt, replace(request_, refit_from=str(plan), refit_sha256=digest))
    assert caught.value.exit_code == 3
    assert loaded
    assert "Runtime.deserialize_cuda_engine" not in trt.touched


def test_an_engine_not_made_for_it_is_not_refitted(request_: Request) -> None:
    trt = fake_tensorrt("10.3.0")
    digest = build(trt, request_)["plan_sha256"]
    with pytest.raises(DeviceError, match="build it with refit: true"):
        build(trt, replace(request_, refit_from=request_.plan, refit_sha256=digest))


# The timing cache.


def test_the_timing_cache_is_one_file_for_each_version_and_gpu(
    request_: Request, tmp_path: Path
) -> None:
    asked = replace(request_, timing_cache=str(tmp_path / "timing"), device="NVIDIA Orin/1")
    build(fake_tensorrt("10.3.0"), asked)
    build(fake_tensorrt("11.4.0"), asked)
    assert sorted(p.name for p in (tmp_path / "timing").iterdir()) == [
        "tensorrt-10.3.0-NVIDIA-Orin-1.cache",
        "tensorrt-11.4.0.106-NVIDIA-Orin-1.cache",
    ]
    first = (tmp_path / "timing" / "tensorrt-10.3.0-NVIDIA-Orin-1.cache").read_bytes()
    made = build(fake_tensorrt("10.3.0"), asked)
    assert made["warnings"] == []
    second = (tmp_path / "timing" / "tensorrt-10.3.0-NVIDIA-Orin-1.cache").read_bytes()
    assert first != second  # the fake counts what it was given


@pytest.mark.parametrize("stored", [b"\0garbage", CACHE_MAGIC + b"10.3.0 9.9 0"])
def test_a_timing_cache_that_does_not_fit_is_begun_anew(
    stored: bytes, request_: Request, tmp_path: Path
) -> None:
    """Corrupt, or of another GPU."""
    file = tmp_path / "tensorrt-10.3.0-gpu.cache"
    file.write_bytes(stored)
    made = build(fake_tensorrt("10.3.0"), replace(request_, timing_cache=str(tmp_path)))
    assert f"the timing cache {file.name} did not fit and was begun anew" in made["warnings"]
    assert file.read_bytes() == CACHE_MAGIC + b"10.3.0 8.7 0"


# In processes of their own.


def test_a_build_in_its_own_process(request_: Request, installed: Install) -> None:
    installed()
    heard: list[tuple[str, int, int]] = []
    made = build_in_process(request_, ARGV, lambda *told: heard.append(told))
    assert heard == [("Building engine", n, 2) for n in (0, 1, 2)]
    assert made["plan_bytes"] == Path(request_.plan).stat().st_size
    assert made["ladder"] == []
    assert made["workspace_mb"] == 1024
    assert made["flag_changed_plan"] is None
    assert made["peak_build_bytes"] > 1 << 20


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("fail", "TensorRT ran out of memory: .*Cuda Runtime"),
        ("raise", "the build ran out of memory"),
        ("kill", "the build was killed, as systems do when memory runs out"),
        ("skip", "TensorRT left out tactics for lack of memory: .*requested size of 67108864"),
    ],
)
def test_the_ladder_ends_where_memory_is_enough(
    way: str, said: str, request_: Request, installed: Install
) -> None:
    installed(needs={"workspace_mb": 512}, out_of_memory=way)
    made = build_in_process(request_, ARGV)
    assert made["workspace_mb"] == 512
    assert [(s["workspace_mb"], s["optimization_level"]) for s in made["ladder"]] == [(1024, None)]
    with pytest.raises(OutOfMemoryError, match=said):
        raise OutOfMemoryError(made["ladder"][0]["failed"])


def test_the_ladder_goes_on_to_lower_levels(request_: Request, installed: Install) -> None:
    installed(needs={"level": 2}, out_of_memory="fail")
    made = build_in_process(request_, ARGV)
    assert (made["workspace_mb"], made["optimization_level"]) == (256, 2)
    assert len(made["ladder"]) == 3


def test_tactics_left_out_on_every_rung_are_an_error(request_: Request, installed: Install) -> None:
    installed(needs={"workspace_mb": 1}, out_of_memory="skip")
    with pytest.raises(OutOfMemoryError, match="out of memory on each of 5 attempts"):
        build_in_process(request_, ARGV)
    assert not Path(request_.plan).exists()


def test_tactics_over_our_own_limit_are_not(request_: Request, installed: Install) -> None:
    installed(needs={"workspace_mb": 1}, out_of_memory="skip")
    made = build_in_process(replace(request_, workspace_mb=63), ARGV)
    assert made["ladder"] == []
    assert "1 lines tell of tactics left out because of the workspace limit" in made["warnings"]


def test_other_failures_are_not_tried_again(request_: Request, installed: Install) -> None:
    installed(parses=False)
    with pytest.raises(DeviceError, match="at node node_3") as caught:
        build_in_process(request_, ARGV)
    assert not isinstance(caught.value, OutOfMemoryError)
    assert Path(request_.log).read_text().count("[ERROR]") <= 1


def test_a_build_that_crashes_is_told_by_its_signal(request_: Request, tmp_path: Path) -> None:
    crash = (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(DeviceError, match=r"was ended by SIGSEGV; its last words are in .*log"):
        run_in_process(request_, crash)


def test_a_missing_module_is_said(request_: Request) -> None:
    with pytest.raises(DeviceError, match="tensorrt_nowhere cannot be imported"):
        run_in_process(replace(request_, module="tensorrt_nowhere"), ARGV)


@pytest.mark.parametrize(
    ("changes", "noisy", "found"), [(True, False, True), (False, False, False), (False, True, None)]
)
def test_whether_the_flag_changed_the_plan(
    changes: bool, noisy: bool, found: bool | None, request_: Request, installed: Install
) -> None:
    installed(flag_changes_plan=changes, noisy=noisy)
    made = build_in_process(replace(request_, check_flag=True), ARGV)
    assert made["flag_changed_plan"] is found
    plan = json.loads(Path(request_.plan).read_bytes()[len(MAGIC) :])
    assert ("SPARSE_WEIGHTS" in plan["flags"]) == changes


def test_what_the_process_prints_is_in_the_log(request_: Request, installed: Install) -> None:
    code = (
        "import sys; print('from stdout'); print('from stderr', file=sys.stderr);"
        "from export.device.builder import main; raise SystemExit(main(sys.argv[1:]))"
    )
    installed()
    run_in_process(request_, (sys.executable, "-c", code))
    text = Path(request_.log).read_text()
    assert "from stdout" in text
    assert "from stderr" in text


def test_nothing_in_the_current_directory_is_imported(
    request_: Request, installed: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed()
    (tmp_path / "json.py").write_text("raise SystemExit('somebody else')")
    monkeypatch.chdir(tmp_path)
    assert run_in_process(request_, ARGV)["plan_bytes"] > 0
