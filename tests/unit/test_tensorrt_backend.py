"""Engine bundles of the TensorRT backends, built and run with fakes of the library and the GPU."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from export.backends import load_backend, open_component
from export.backends import tensorrt as backend
from export.backends.tensorrt import (
    Gpu,
    Options,
    TensorRTBackend,
    parse_profile,
    refit,
    sparse_kernels,
)
from export.device import builder
from export.device import engine as device_engine
from export.specs import Sizes
from export.targets import Target, load_target
from sdcompress.build_report import BuildReport, Component, Runtime
from sdcompress.bundle import Bundle, seal
from sdcompress.commands import cli
from sdcompress.errors import InputError, UsageError, VerificationError
from tests.fake_cuda import fake_cuda
from tests.fake_tensorrt import MAGIC, install
from tests.tiny_onnx import tiny_onnx

ORIN = Gpu("Orin", "8.7")
NO_GPU = "no NVIDIA GPU is visible here"
Build = Callable[..., Bundle]


PROCESS = builder.run_in_process


def in_this_process(
    request: builder.Request, argv: Sequence[str], progress: builder.Progress | None = None
) -> dict[str, Any]:
    trt = importlib.import_module(request.module)
    return {**builder.build(trt, request, progress), "peak_build_bytes": 1}


@pytest.fixture
def source(tmp_path: Path) -> Bundle:
    return tiny_onnx(tmp_path / "onnx")


@pytest.fixture
def orin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A Jetson Orin with some TensorRT; may be called again for another version or GPU."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def put(version: str = "10.3.0", gpu: Gpu | str = ORIN, **behaviour: Any) -> None:
        name = behaviour.get("name", "tensorrt")
        install(folder, version, **behaviour)
        # Set first, so that what is imported meanwhile goes away with the test.
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(backend, "local_gpu", lambda: gpu)
        if isinstance(gpu, Gpu):
            cuda, _ = fake_cuda(compute_capability=gpu.compute_capability)
            monkeypatch.setattr(device_engine.Cuda, "load", lambda: cuda)

    # Processes of their own are tested with the builder; one test here has them, too.
    monkeypatch.setattr(builder, "run_in_process", in_this_process)
    put()
    return put


@pytest.fixture
def build(orin: Callable[..., None], source: Bundle, tmp_path: Path) -> Build:
    def make(name: str = "engine", of: Bundle | None = None, **arguments: Any) -> Bundle:
        return load_backend("tensorrt").build(of or source, tmp_path / name, **arguments)

    return make


@pytest.fixture
def jetson() -> Target:
    return load_target("jetson-orin-nano")


def check(options: Mapping[str, Any], target: Target | None = None) -> None:
    load_backend("tensorrt").check(options, target)


def test_what_a_bundle_holds(build: Build, source: Bundle, jetson: Target) -> None:
    engine = build(target=jetson)
    assert sorted(engine.manifest.files) == [
        "LICENSE",
        "build_report.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/build.log",
        "text_encoder/config.json",
        "text_encoder/engine.plan",
        "tokenizer/vocab.json",
        "unet/build.log",
        "unet/config.json",
        "unet/engine.plan",
        "vae_decoder/build.log",
        "vae_decoder/config.json",
        "vae_decoder/engine.plan",
    ]
    engine.check_files()
    details = engine.manifest.details
    assert engine.manifest.stage == "engine"
    assert engine.manifest.parent == source.digest
    assert engine.manifest.tools["tensorrt"] == "10.3.0"
    assert details["backend"] == "tensorrt"
    assert details["target"] == "jetson-orin-nano"
    assert details["providers"]["unet"] == "TensorRT 10.3.0 SM87"
    assert details["dtype"] == "fp16"
    assert details["sizes"] == {"images": 1, "guided": True, "height": None, "width": None}
    assert details["plans"]["unet"] == engine.manifest.files["unet/engine.plan"].sha256
    runtime = details["runtime"]
    assert (runtime["module"], runtime["version"]) == ("tensorrt", "10.3.0")
    assert runtime["compute_capability"] == "8.7"


def test_the_report_says_what_was_done(build: Build, jetson: Target) -> None:
    engine = build(target=jetson)
    report = BuildReport.read(engine.path)
    assert report is not None
    assert report.options["sparse"] == "on"
    assert report.options["workspace_mb"] == 1024  # the target's
    unet = report.components["unet"]
    assert unet.plan_sha256 == engine.manifest.files["unet/engine.plan"].sha256
    assert unet.plan_bytes == engine.manifest.files["unet/engine.plan"].size
    assert unet.workspace_mb == 1024
    assert unet.context_bytes == 1 << 20
    assert unet.ladder == ()
    assert unet.flag_changed_plan is None


def plan(engine: Bundle, component: str) -> dict[str, Any]:
    raw = (engine.path / component / "engine.plan").read_bytes()
    found: dict[str, Any] = json.loads(raw[len(MAGIC) :])
    return found


def shapes(engine: Bundle, component: str) -> list[list[int]]:
    return [i[2] for i in plan(engine, component)["inputs"]]


def test_shapes_are_pinned_to_the_sizes(build: Build) -> None:
    engine = build(sizes=Sizes(images=3, guided=True, height=32, width=16))
    assert shapes(engine, "text_encoder") == [[6, 8]]
    assert shapes(engine, "unet") == [[6, 4, 16, 8], [], [6, 8, 4]]
    assert shapes(engine, "vae_decoder") == [[3, 4, 16, 8]]
    distilled = build("distilled", sizes=Sizes(guided=False))
    assert shapes(distilled, "unet") == [[1, 4, 8, 8], [], [1, 8, 4]]


def test_profiles_leave_them_free(build: Build) -> None:
    engine = build(options={"profiles": ["1x16x16,1x16x16,2x32x32", "4x16x16,4x16x16,4x16x16"]})
    first, second = plan(engine, "unet")["profiles"]
    assert first["sample"] == [[2, 4, 8, 8], [2, 4, 8, 8], [4, 4, 16, 16]]
    assert second["encoder_hidden_states"] == [[8, 8, 4]] * 3
    assert "sizes" not in engine.manifest.details


def test_profiles_must_cover_what_is_asked_for(build: Build) -> None:
    with pytest.raises(UsageError, match="at 1x32x16, which is asked for; widen one of them"):
        build(sizes=Sizes(height=32), options={"profiles": "1x16x16,1x16x16,2x16x16"})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1x512x512", "expected MIN,USUAL,MAX"),
        ("1x512,1x512,1x512", "expected MIN,USUAL,MAX"),
        ("2x512x512,1x512x512,4x512x512", "expected sizes that grow"),
        ("0x64x64,1x64x64,1x64x64", "expected 1 or more of images and pixels, found '0x64x64,"),
        ("1x0x64,1x64x64,1x64x64", "expected 1 or more of images and pixels"),
        ("1x64x0,1x64x64,1x64x64", "expected 1 or more of images and pixels"),
    ],
)
def test_profiles_are_refused_with_their_form(text: str, why: str, orin: None) -> None:
    with pytest.raises(ValueError, match=why):
        parse_profile(text)
    with pytest.raises(UsageError, match=f"tensorrt option 'profiles': {why}"):
        check({"profiles": [text]})


def test_options_reach_the_plan(build: Build) -> None:
    engine = build(
        options={
            "version_compatible": True,
            "hardware_compatible": "ampere+",
            "refit": True,
            "weight_streaming": True,
            "sparse": "off",
        }
    )
    unet = plan(engine, "unet")
    assert unet["flags"] == ["REFIT", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"]
    assert unet["hardware"] == "AMPERE_PLUS"
    assert engine.manifest.details["sparse_kernels"] == {
        "used": 0,
        "of": 0,
        "how": "it was built without SPARSE_WEIGHTS, so that no kernel may skip zeros",
    }


def test_the_timing_cache_lies_in_the_home_directory(build: Build, tmp_path: Path) -> None:
    build()
    assert [p.name for p in (tmp_path / "home/.cache/sdcompress/timing").iterdir()] == [
        "tensorrt-10.3.0-Orin.cache"
    ]


def test_each_component_is_built_in_a_process_of_its_own(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "run_in_process", PROCESS)
    report = BuildReport.read(build().path)
    assert report is not None
    assert all((part.peak_build_bytes or 0) > 1 << 20 for part in report.components.values())


def test_progress_is_told_by_component(build: Build) -> None:
    heard: list[tuple[str, str, int, int]] = []
    build(progress=lambda *told: heard.append(told))
    assert ("unet", "Building engine", 1, 2) in heard
    assert {told[0] for told in heard} == {"text_encoder", "unet", "vae_decoder"}


# Refusals before anything slow.


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"nonsense": 1}, "tensorrt option 'nonsense': .*there are: sparse, profiles"),
        ({"strip": True}, "a stripped plan .* set sparse: off, or strip: false"),
        ({"optimization_level": 6}, "option 'optimization_level': expected 5 or less, found 6$"),
        ({"optimization_level": "x"}, "'optimization_level': expected a whole number, found 'x'$"),
        ({"sparse": "of"}, "'sparse': expected 'auto', 'on' or 'off', found 'of'$"),
        ({"compute_capability": 8}, "expected a number such as 8.7, found '8'$"),
        ({"compute_capability": "8.9"}, "asked is compute capability 8.9, and the Orin here has"),
        ({"weight_budget_mb": 100}, "weight_budget_mb needs weight_streaming: true"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], why: str, orin: None) -> None:
    with pytest.raises(UsageError, match=why):
        check(options)


def test_targets_that_cannot_be(orin: Callable[..., None], jetson: Target) -> None:
    with pytest.raises(UsageError, match="asked is compute capability 8.9, and the Orin here"):
        check({}, load_target("rtx-4090"))
    with pytest.raises(UsageError, match="is not served by tensorrt_rtx; use backend tensorrt"):
        load_backend("tensorrt_rtx").check({}, jetson)
    orin("11.4.0")
    with pytest.raises(UsageError, match="TensorRT 11.4.0.106 does not serve Jetson Orin Nano"):
        check({}, jetson)


def test_a_jetson_is_built_for_on_the_jetson(
    orin: Callable[..., None], monkeypatch: pytest.MonkeyPatch, jetson: Target
) -> None:
    """On a PC no advice helps that would make the PC build; on a Jetson it does."""
    way = (
        "; build on the device, with what `sdcompress device DENSE SPARSE --target "
        "jetson-orin-nano -o device.tar` packs for it"
    )

    def refused(target: Target | None = jetson) -> str:
        with pytest.raises(UsageError) as error:
            check({}, target)
        return str(error.value)

    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
    orin(gpu=Gpu("RTX 4090", "8.9"), sm="8.9")
    assert refused().endswith(way)
    orin(gpu=NO_GPU)
    assert refused() == f"TensorRT builds on the GPU it builds for: {NO_GPU}{way}"
    assert "--target TARGET -o" in refused(jetson.model_copy(update={"name": "mine"}))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert refused().startswith("the Python module tensorrt ")
    assert refused().endswith(way)
    assert "rtx" not in refused()
    assert "pip install 'sdcompress[rtx]'" in refused(load_target("rtx-4090"))
    monkeypatch.setattr(backend.platform, "machine", lambda: "aarch64")
    assert "sudo apt install nvidia-jetpack" in refused()


@pytest.mark.parametrize(
    ("sizes", "profiles", "why"),
    [
        (Sizes(height=30), [], "height 30 does not fit this model; give a multiple of 4"),
        (Sizes(height=32), ["1x16x16,1x16x16,2x16x16"], "none of the profiles"),
        (Sizes(), ["1x10x16,1x16x16,2x16x16"], "profile 1x10x16,1x16x16,2x16x16: height 10 does"),
    ],
)
def test_sizes_that_do_not_fit_are_told_before_building(
    build: Build, monkeypatch: pytest.MonkeyPatch, sizes: Sizes, profiles: list[str], why: str
) -> None:
    started: list[builder.Request] = []
    monkeypatch.setattr(builder, "run_in_process", lambda request, *more: started.append(request))
    with pytest.raises(UsageError, match=why):
        build(sizes=sizes, options={"profiles": profiles})
    assert started == []


def test_no_sparse_tensor_cores(orin: Callable[..., None], build: Build) -> None:
    orin(gpu=Gpu("RTX 2080", "7.5"), sm="7.5")
    with pytest.raises(UsageError, match="compute capability 7.5 has no sparse Tensor Cores"):
        check({"sparse": "on"})
    assert plan(build(), "unet")["flags"] == []


def test_no_gpu_and_no_module(orin: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    orin(gpu=NO_GPU)
    assert TensorRTBackend("tensorrt").available() == (
        "TensorRT builds on the GPU it builds for: no NVIDIA GPU is visible here"
    )
    for machine, how in (("aarch64", "JetPack 6.1 or newer"), ("x86_64", "container from NGC")):
        monkeypatch.setattr(backend.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        why = TensorRTBackend("tensorrt").available()
        assert why
        assert how in why
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    why = TensorRTBackend("tensorrt_rtx").available()
    assert why
    assert "pip install 'sdcompress[rtx]'" in why


def test_an_old_tensorrt_is_refused_with_the_upgrade(orin: None) -> None:
    importlib.import_module("tensorrt").__version__ = "8.6.2"  # type: ignore[attr-defined]
    why = TensorRTBackend("tensorrt").available()
    assert why
    assert "to JetPack 6.1 or newer" in why


def test_a_newer_opset_than_the_target_reads(orin: None, tmp_path: Path, jetson: Target) -> None:
    newer = tiny_onnx(tmp_path / "newer", opset=21)
    with pytest.raises(UsageError, match="have opset 21, and Jetson Orin Nano 8 GB reads up to 20"):
        load_backend("tensorrt").build(newer, tmp_path / "engine", target=jetson)


def test_a_missing_data_file_is_told_before_building(build: Build, source: Bundle) -> None:
    (source.path / "unet" / "model.onnx_data").unlink()
    with pytest.raises(VerificationError, match="unet/model.onnx_data is missing"):
        build()


def test_a_failed_build_leaves_its_log_and_nothing_else(
    orin: Callable[..., None], build: Build, tmp_path: Path
) -> None:
    orin(log=[["ERROR", "something"]], needs={"level": -1}, out_of_memory="fail")
    with pytest.raises(InputError, match="out of memory on each of 5 attempts.*allow_smaller"):
        build()
    assert not (tmp_path / "engine").exists()
    orin(parses=False)
    with pytest.raises(InputError, match="at node node_3"):
        build()
    assert not (tmp_path / "engine").exists()


def test_height_and_width_are_halved_only_if_allowed(
    orin: Callable[..., None], build: Build
) -> None:
    orin(needs={"pixels": 4}, out_of_memory="fail")
    with pytest.raises(InputError, match="add --option allow_smaller=true to have"):
        build()
    engine = build(options={"allow_smaller": True})
    assert shapes(engine, "unet")[0] == [2, 4, 4, 4]
    assert shapes(engine, "vae_decoder")[0] == [1, 4, 4, 4]
    assert engine.manifest.details["sizes"]["height"] == 8
    report = BuildReport.read(engine.path)
    assert report is not None
    assert "height and width were halved" in report.components["vae_decoder"].warnings[0]


def test_verify_compares_with_the_parent_what_can_be_compared(
    build: Build, source: Bundle, tmp_path: Path
) -> None:
    from export.verify import verify_bundle

    engine = build()

    def compared(parent: Bundle, of: Bundle = engine) -> dict[str, str]:
        report = verify_bundle(of.path, against=parent.path)
        assert [check.name for check in report.checks] == ["files", "lineage", "against"]
        return {c.name: c.detail for c in report.checks if c.passed == (of is engine)}

    assert compared(source) == {
        "files": "14 files have the digest recorded",
        "lineage": "the manifest names this parent",
        "against": "7 files have the digest they have in the parent; weights inside a plan cannot "
        "be read back and were not compared",
    }
    other = tiny_onnx(tmp_path / "other", weight=3.0)
    assert "lineage" not in compared(other)
    copy = Bundle(shutil.copytree(engine.path, tmp_path / "copy"), engine.manifest, "")
    (copy.path / "unet" / "config.json").write_text("{}")
    seal(copy.path, engine.manifest)
    assert compared(source, copy) == {"against": "unet/config.json"}
    data = source.path / "unet" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[::-1])
    assert "against" not in compared(source)


# Running.


def feeds() -> dict[str, Any]:
    return {
        "sample": np.ones((2, 4, 8, 8), np.float16),
        "timestep": np.array(500, np.int64),
        "encoder_hidden_states": np.zeros((2, 8, 4), np.float16),
    }


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_engine_runs(build: Build, cuda_graph: bool) -> None:
    engine = build(options={"cuda_graph": cuda_graph})
    with open_component(engine.path, "unet") as runner:
        assert runner.inputs["sample"].shape == (2, 4, 8, 8)
        assert runner.inputs["sample"].dtype == np.float16
        made = runner.infer(feeds())
        assert runner.gpu_milliseconds is not None
        memory = runner.device_memory()
    assert made["out_sample"].shape == (2, 4, 8, 8)
    assert (made["out_sample"] == 2).all()
    size = engine.manifest.files["unet/engine.plan"].size
    assert memory == {"weights": size, "context": 1 << 20}


def test_an_engine_with_profiles_takes_any_size_within(build: Build) -> None:
    engine = build(options={"profiles": ["1x16x16,1x16x16,2x32x32"]})
    with open_component(engine.path, "vae_decoder") as runner:
        assert runner.inputs["latent_sample"].shape == (None, 4, None, None)


def test_another_size_is_refused(build: Build) -> None:
    engine = build()
    with open_component(engine.path, "unet") as runner:
        wrong = feeds() | {"sample": np.ones((2, 4, 4, 4), np.float16)}
        with pytest.raises(UsageError, match=r"was built for sample \[2, 4, 8, 8\], got"):
            runner.infer(wrong)


def test_a_tampered_plan_is_never_loaded(build: Build, orin: Callable[..., None]) -> None:
    engine = build()
    file = engine.path / "unet" / "engine.plan"
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    trt: Any = importlib.import_module("tensorrt")
    trt.touched.clear()
    with pytest.raises(VerificationError, match="its sha256 differs"):
        open_component(engine.path, "unet").load()
    assert "Runtime.deserialize_cuda_engine" not in trt.touched


def test_it_says_where_an_engine_runs(build: Build, orin: Callable[..., None]) -> None:
    sizes = Sizes(images=2, guided=False, height=32, width=16)
    details = build(sizes=sizes, options={"optimization_level": 2}).manifest.details
    why = load_backend("tensorrt").why_not_run
    assert why(details) is None
    orin(gpu=Gpu("RTX 4090", "8.9"), sm="8.9")
    assert why(details) == (
        "the engine was built for compute capability 8.7 and the RTX 4090 here has 8.9; build it "
        "again here with `sdcompress build ONNX -o ENGINE --backend tensorrt --height 32 "
        "--width 16 --images 2 --no-guidance --option optimization_level=2`"
    )
    orin("11.4.0")
    assert (why(details) or "").startswith(
        "the engine was built by TensorRT 10.3.0 and 11.4.0.106 is installed here; build it again"
    )
    orin(gpu=NO_GPU)
    way = "; measure it on the card, or with the device bundle of `sdcompress device`"
    assert why(details) == NO_GPU + way
    orin()
    other = {**details, "runtime": {**details["runtime"], "os": "Windows"}}
    assert (why(other) or "").startswith("the engine was built for Windows and this is Linux;")


def test_the_target_is_in_the_command_while_it_is_this_machine(
    build: Build, orin: Callable[..., None], jetson: Target
) -> None:
    details = build(target=jetson).manifest.details
    orin("10.13.3")
    why = load_backend("tensorrt").why_not_run(details) or ""
    found = re.search(r"`(.*)`", why)
    assert found
    assert found[1] == (
        "sdcompress build ONNX -o ENGINE --backend tensorrt --target jetson-orin-nano"
    )


def test_compatible_plans_run_on_newer_versions_and_gpus(
    build: Build, orin: Callable[..., None]
) -> None:
    options = {"version_compatible": True, "hardware_compatible": "ampere+"}
    details = build(options=options).manifest.details
    why = load_backend("tensorrt").why_not_run
    orin("10.16.1", gpu=Gpu("RTX 4090", "8.9"), sm="8.9")
    assert why(details) is None
    orin("11.4.0")
    assert "10.3.0" in (why(details) or "")


def test_tensorrt_rtx_plans_run_under_any_system(orin: Callable[..., None], build: Build) -> None:
    details = build().manifest.details
    orin("11.4.0", gpu=Gpu("RTX 4090", "8.9"), name="tensorrt_rtx")
    runtime = {**details["runtime"], "module": "tensorrt_rtx", "os": "Windows"}
    runtime |= {"version": "11.4.0.106", "compute_capability": "8.9"}
    rtx = {**details, "backend": "tensorrt_rtx", "runtime": runtime}
    why = load_backend("tensorrt_rtx").why_not_run
    assert why(rtx) is None
    other = {**rtx, "runtime": {**runtime, "compute_capability": "8.6"}}
    assert (why(other) or "").endswith("--option compute_capability=8.9`")


# Refitting.


def test_refitting_changes_the_weights_and_nothing_else(build: Build, tmp_path: Path) -> None:
    engine = build(options={"refit": True})
    tuned = tiny_onnx(tmp_path / "tuned", weight=3.0)
    new = refit(engine, tuned, tmp_path / "refitted")
    assert new.manifest.parent == tuned.digest
    assert new.manifest.details["refitted_from"] == engine.digest
    assert new.manifest.tensors["unet"]["scale"].blake3 == "3.0"
    new.check_files()
    before, after = plan(engine, "unet"), plan(new, "unet")
    assert after["flags"] == before["flags"]
    assert after["weights"]["scale"] != before["weights"]["scale"]
    report = BuildReport.read(new.path)
    assert report is not None
    file = new.manifest.files["unet/engine.plan"]
    assert report.components["unet"].plan_sha256 == file.sha256


def test_refitting_refuses_zeros_at_other_places(build: Build, tmp_path: Path) -> None:
    engine = build(options={"refit": True})
    moved = tiny_onnx(tmp_path / "moved", weight=3.0, mask="bb")
    with pytest.raises(UsageError, match="unet scale has its zeros at other places"):
        refit(engine, moved, tmp_path / "refitted")
    assert not (tmp_path / "refitted").exists()


def test_refitting_refuses_what_was_not_built_for_it(build: Build, tmp_path: Path) -> None:
    other = tiny_onnx(tmp_path / "other", weight=3.0)
    with pytest.raises(UsageError, match="build it with refit=true"):
        refit(build(), other, tmp_path / "refitted")


def test_refitting_is_for_plans(build: Build, tmp_path: Path) -> None:
    engine = build()
    other = {**engine.manifest.details, "backend": "onnxruntime", "options": {"provider": "cpu"}}
    plain = Bundle(
        engine.path, engine.manifest.model_copy(update={"details": other}), engine.digest
    )
    with pytest.raises(UsageError, match="is an engine of onnxruntime, and only those of tensorrt"):
        refit(plain, tiny_onnx(tmp_path / "other"), tmp_path / "refitted")


@pytest.mark.parametrize(
    "more",
    [
        ["--backend", "tensorrt"],
        ["--target", "l4"],
        ["--option", "refit=true"],
        ["--height", "16"],
        ["--images", "2"],
        ["--no-guidance"],
    ],
)
def test_refitting_takes_nothing_else(more: list[str], tmp_path: Path) -> None:
    command = ["build", "onnx", "-o", str(tmp_path / "out"), "--refit", "engine", *more]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 2
    assert "--refit takes the engine's own backend, target, sizes and options" in done.output


def test_a_stripped_engine_takes_back_its_own_weights_only(
    build: Build, source: Bundle, tmp_path: Path
) -> None:
    engine = build(options={"strip": True, "sparse": "off"})
    assert plan(engine, "unet")["weights"]["scale"] == ""
    other = tiny_onnx(tmp_path / "other", weight=3.0)
    with pytest.raises(UsageError, match="a stripped engine takes back its own only"):
        refit(engine, other, tmp_path / "no")
    whole = refit(engine, source, tmp_path / "whole")
    assert plan(whole, "unet")["weights"]["scale"] != ""


def test_refitting_checks_the_files_first(build: Build, tmp_path: Path) -> None:
    engine = build(options={"refit": True})
    file = engine.path / "unet" / "engine.plan"
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(VerificationError, match="unet/engine.plan is not the file"):
        refit(engine, tiny_onnx(tmp_path / "tuned", weight=3.0), tmp_path / "refitted")


# What is said of sparse kernels.

PART = Component(
    plan_bytes=1,
    plan_sha256="a",
    seconds=1.0,
    layers_eligible=None,
    layers_sparse=None,
    log_generation=None,
    tactics=5,
    sparse_tactics=(),
    fused_attention=None,
    context_bytes=None,
    context_from=None,
    peak_build_bytes=None,
    workspace_mb=None,
    optimization_level=None,
    ladder=(),
    warnings=(),
    missing=(),
    flag_changed_plan=None,
)


@pytest.mark.parametrize(
    ("facts", "used", "how"),
    [
        (
            {"layers_eligible": 56, "layers_sparse": 0},
            0,
            "the verbose log says 0 of 112 layers use sparse tactics",
        ),
        (
            {"layers_eligible": 56, "layers_sparse": 3, "sparse_tactics": ("spmma",)},
            6,
            "the verbose log and the engine's tactics say 6 of 112 layers use sparse tactics",
        ),
        (
            {"layers_sparse": 1},
            2,
            "2 of the 10 tactics the engines list are sparse ones by their names",
        ),
        (
            {"flag_changed_plan": False},
            0,
            "TensorRT-RTX ignores the flag ahead of time: the plans are the same bytes without it",
        ),
        (
            {"flag_changed_plan": True},
            None,
            "SPARSE_WEIGHTS changed the plan, but neither the log nor the engine tells which of "
            "its kernels are sparse",
        ),
        ({}, None, "neither the log nor the engine tells which of its kernels are sparse"),
    ],
)
def test_what_is_said_of_sparse_kernels(
    facts: dict[str, Any], used: int | None, how: str, source: Bundle
) -> None:
    part = PART.model_copy(update=facts)
    report = BuildReport(
        backend="tensorrt_rtx",
        runtime=Runtime(module="tensorrt_rtx", version="1.7", os="Linux", machine="x86_64"),
        options=Options(sparse="on").model_dump(mode="json"),
        components={"text_encoder": part, "unet": part},
    )
    assert sparse_kernels(report, source) == {"used": used, "of": 0, "how": how}


def test_a_report_of_another_version_is_refused(tmp_path: Path) -> None:
    assert BuildReport.read(tmp_path) is None
    (tmp_path / "build_report.json").write_text('{"schema_version": 9}')
    with pytest.raises(InputError, match="not a build report of schema version 1"):
        BuildReport.read(tmp_path)
