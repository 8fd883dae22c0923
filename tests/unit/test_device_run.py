"""The whole script on a small bundle, in this process, on a fake of every TensorRT from 10.3 on."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.device import module, preflight, process, telemetry, worker
from export.device.builder import build
from export.device.cuda import Cuda
from export.device.telemetry import NOTHING
from export.device_results import read_results
from tests.fake_cuda import FakeLibrary
from tests.fake_tensorrt import VERSIONS, fake_tensorrt
from tests.sample_device import make_sample, write_manifest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

script = importlib.import_module("export.device.__main__")
Run = Callable[..., int]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_sample(tmp_path / "bundle")


class Device:
    """What a test may change of the device, and what has happened on it."""

    def __init__(self) -> None:
        self.trt = fake_tensorrt("10.3.0")
        self.gpu: dict[str, Any] = {"real_time": True}
        self.built: list[str] = []

    def run_job(self, job: dict[str, Any], **how: Any) -> dict[str, Any]:
        return {**worker.JOBS[job["job"]](job), "peak_anonymous_bytes": 1 << 20}

    def build(self, request: Any, command: Any, progress: Any) -> dict[str, Any]:
        progress("Building engine", 1, 2)
        self.built.append(Path(request.onnx).parent.parent.name + " " + request.onnx.split("/")[-2])
        made = build(self.trt, request)
        limits = {k: getattr(request, k) for k in ("workspace_mb", "optimization_level")}
        return {**made, **limits}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    made = Device()
    monkeypatch.setattr(module, "run_job", made.run_job)
    monkeypatch.setattr(script, "run_job", made.run_job)
    monkeypatch.setattr(module, "build_in_process", made.build)
    monkeypatch.setattr(worker, "load_tensorrt", lambda name: made.trt)
    monkeypatch.setattr(Cuda, "load", classmethod(lambda cls: Cuda(FakeLibrary(**made.gpu))))
    monkeypatch.setattr(telemetry.Telemetry, "watch", lambda self: telemetry.Watch(read, 0.001))
    monkeypatch.chdir(tmp_path)
    return made


def read(pid: int | None) -> dict[str, float | None]:
    return {**NOTHING, "power_w": 9.5, "temperature_c": 51.0}


def run(bundle: Path, *more: str) -> int:
    small = ["--rounds", "2", "--budget", "0.01"]
    return int(script.main(["--root", str(bundle), "-o", "results.json", *small, *more]))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("held", ["resident", "sequential"])
def test_it_builds_checks_measures_and_the_host_reads_it(
    version: str, held: str, bundle: Path, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    device.trt = fake_tensorrt(version)
    assert run(bundle, "--residency", held, "--cuda-graph") == 0
    assert device.built == [  # what is the same in both twins, once
        "dense text_encoder",
        "dense unet",
        "sparse unet",
        "dense vae_decoder",
    ]
    results = read_results(Path("results.json"))
    assert list(results.measures) == [
        "picture", "text_encoder", "unet_step", "vae_decoder", "load", "peak_memory",
    ]  # fmt: skip
    dense, sparse = results.engines["dense"], results.engines["sparse"]
    assert dense.backend == "tensorrt"
    assert dense.providers["unet"] == f"TensorRT {device.trt.__version__} SM87"
    assert dense.plans["unet"] != sparse.plans["unet"]
    assert dense.plans["vae_decoder"] == sparse.plans["vae_decoder"]
    assert results.plans_identical is False
    assert dense.device_memory is not None
    assert dense.device_memory_sequential is not None
    assert dense.device_memory.context == 3 << 20
    assert dense.device_memory_sequential.context == 1 << 20
    # Two buffers of three halfs in each of the engines; the fake counts nothing else.
    assert dense.device_memory.peak == 36
    assert dense.device_memory_sequential.peak == 12
    assert dense.peak_memory == {"resident": 1 << 20, "sequential": 1 << 20}
    assert results.setup.residency == held
    assert results.setup.rounds == 2
    assert results.setup.steps == 3
    assert [t.process for t in results.telemetry] == [0, 1, 2, 3, 4, 5]
    assert {t.contestant for t in results.telemetry} == {"dense", "sparse", "control"}
    assert results.environment.versions == {
        "tensorrt": device.trt.__version__, "cuda": "12.6", "driver": "12.6",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "unet_step" in said
    assert "unet: 0 layers use sparse kernels" in said
    assert "vae_decoder: the sparse plan is byte-identical to the dense one" in said


def test_finished_engines_are_used_again_and_damaged_ones_are_not(
    bundle: Path, device: Device
) -> None:
    assert run(bundle, "--only", "build") == 0
    assert len(device.built) == 4
    assert run(bundle, "--only", "build") == 0
    assert len(device.built) == 4
    plan = next(bundle.glob("work/engines/vae_decoder-*/engine.plan"))
    plan.write_bytes(plan.read_bytes() + b" ")
    assert run(bundle, "--only", "build") == 0
    assert device.built[4:] == ["dense vae_decoder"]
    device.trt = fake_tensorrt("10.16.1")  # another TensorRT: other engines
    assert run(bundle, "--only", "build") == 0
    assert len(device.built) == 9
    assert not Path("results.json").exists()


def test_long_builds_say_how_far_they_are(
    bundle: Path,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(bundle, "--only", "build") == 0
    assert "Building engine" not in capsys.readouterr().err
    monkeypatch.setattr(module, "SAY_EVERY_S", 0)
    assert run(bundle, "--only", "build", "--workspace", "32") == 0
    assert capsys.readouterr().err.count("Building engine: 1 of 2") == 4


def test_one_thing_at_a_time(
    bundle: Path, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bundle, "--only", "check") == 1
    assert "there is no finished engine: building dense text_encoder; run it with --only build" in (
        capsys.readouterr().err
    )
    assert run(bundle, "--only", "build") == 0
    assert run(bundle, "--only", "check") == 0
    assert "sparse  unet          differs by 0.0e+00" in capsys.readouterr().out
    assert run(bundle, "--only", "measure") == 0
    assert len(read_results(Path("results.json")).measures) == 6


def test_both_twins_are_built_alike_when_one_has_to_do_with_less(
    bundle: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sparse UNet runs out of memory with a workspace of 64 MiB: the dense one gets 32 too."""

    def build_smaller(request: Any, *more: Any) -> dict[str, Any]:
        made = device.build(request, *more)
        if "onnx/sparse" in request.onnx:
            made["workspace_mb"] = min(32, made["workspace_mb"])
        return made

    monkeypatch.setattr(module, "build_in_process", build_smaller)
    assert run(bundle) == 0
    assert device.built.count("dense unet") == 2
    assert device.built.count("sparse unet") == 1  # it has what it needs already
    for twin in ("dense", "sparse"):
        options = read_results(Path("results.json")).engines[twin].options  # type: ignore[index]
        assert options["workspace_mb"] == {"text_encoder": 64, "unet": 32, "vae_decoder": 64}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([2.0, np.nan, 1.0], "sparse unet: y holds NaN or infinity, which is seen as a black"),
        ([2.0, -4.0, 1.5], "sparse unet: y differs by 1.1e-01 of the host's output, 0.02 allowed"),
    ],
)
def test_wrong_outputs_end_it(
    wrong: list[float],
    words: str,
    bundle: Path,
    device: Device,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def execute(model: str, feeds: dict[str, bytes]) -> dict[str, bytes]:
        right = np.frombuffer(feeds["x"], np.float16) * np.float16(2)
        return {"y": np.array(wrong if "sparse" in model else right, np.float16).tobytes()}

    device.trt = fake_tensorrt("10.3.0", execute=execute)
    assert run(bundle) == 3
    err = capsys.readouterr().err
    assert words in err
    assert "nothing was measured" in err
    assert not Path("results.json").exists()


REFUSED = {
    "another GPU": (
        {"gpu": {"compute_capability": "8.9"}},
        1,
        "this is Fake GPU (compute capability 8.9), the bundle is for Jetson Orin Nano 8 GB (8.7)",
    ),
    "no GPU": ({"gpu": {"devices": 0}}, 1, "no CUDA-capable device is detected"),
    "old TensorRT": (
        {"version": "8.6.2"},
        1,
        "TensorRT 8.6.2 is too old for this bundle; upgrade to JetPack 6.1 or newer, which brings",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_device_it_is_not_for(
    name: str,
    bundle: Path,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    how, code, words = REFUSED[name]
    device.gpu |= how.get("gpu", {})
    if "version" in how:
        device.trt.__version__ = how["version"]
    assert run(bundle) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line[0] != "["]
    assert len(lines) == 1
    assert words in lines[0]
    assert device.built == []


def test_too_little_memory_and_disk(
    bundle: Path,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["components"]["unet"]["twins"]["dense"]["weights"] = 2000 << 20
    write_manifest(bundle, manifest)
    monkeypatch.setattr(preflight, "available_memory", lambda: 5000 << 20)
    assert run(bundle) == 1
    assert (
        "building needs about 6064 MiB of memory, 5000 MiB are available" in capsys.readouterr().err
    )
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100 << 20})
    )
    assert run(bundle, "--no-memory-check") == 1
    assert "the engines need about 2200 MiB of disk, 100 MiB are free" in capsys.readouterr().err
    assert device.built == []


def test_results_that_could_not_be_written_are_refused_before_the_work(
    bundle: Path, device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (tmp_path / "none" / "results.json", tmp_path):
        assert run(bundle, "-o", str(output)) == 1
        assert f"{output}: cannot be written there; choose another" in capsys.readouterr().err
    assert device.built == []


def damage(bundle: Path, name: str) -> None:
    file = bundle / name
    file.write_bytes(file.read_bytes()[:-1] + b"\0")


@pytest.mark.parametrize(
    ("harm", "code", "words"),
    [
        (lambda b: (b / "onnx/dense/unet/model.onnx").unlink(), 1, "model.onnx: is missing; "),
        (lambda b: damage(b, "onnx/sparse/unet/model.onnx"), 3, "its sha256 differs"),
        (lambda b: damage(b, "golden/dense/unet/y.bin"), 3, "its sha256 differs"),
        (lambda b: (b / "manifest.json").unlink(), 1, "run the script where the tar was unpacked"),
        (lambda b: (b / "manifest.json").write_text("{"), 1, "is damaged"),
        (lambda b: (b / "manifest.json").write_text("[]"), 1, "expected a sdcompress device"),
    ],
)
def test_a_damaged_bundle_is_found_before_anything_is_loaded(
    harm: Callable[[Path], object],
    code: int,
    words: str,
    bundle: Path,
    device: Device,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(bundle)
    assert run(bundle) == code
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x[0] != "[")
    assert words in line
    assert device.built == []
    assert device.trt.touched == set()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "golden/none.bin"])
def test_a_manifest_names_only_what_is_in_the_bundle(
    name: str, bundle: Path, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["components"]["unet"]["inputs"][0]["file"] = name
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert run(bundle) == 1
    assert f"names {name!r}" in capsys.readouterr().err


def test_a_plan_that_was_changed_after_the_check_is_not_loaded(
    bundle: Path, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    def tamper(job: dict[str, Any], **how: Any) -> dict[str, Any]:
        plan = Path(job["engines"][0]["plan"])
        plan.write_bytes(plan.read_bytes() + b" ")
        return worker.measure({**job, "module": "tensorrt"})

    job = {"warm_up": 0, "cuda_graph": False, "residency": "resident", "iterations": {}}
    assert run(bundle, "--only", "build") == 0
    plan = next(bundle.glob("work/engines/unet-*/engine.plan"))
    engine = {"plan": str(plan), "sha256": "0" * 64, "built_for": "", "component": "unet"}
    with pytest.raises(script.DeviceError, match="its sha256 differs") as error:
        tamper({**job, "engines": [engine]})
    assert error.value.exit_code == 3


def test_usage() -> None:
    for wrong in (
        ["--compute-capability", "8.9"],
        ["--rounds", "1"],
        ["--rounds", "0"],
        ["--budget", "0"],
        ["--budget", "-1"],
        ["--budget", "nan"],
        ["--budget", "inf"],
        ["--workspace", "0"],
        ["--residency", "both"],
        ["--residency", "resident", "--trtexec", "trtexec"],
    ):
        with pytest.raises(SystemExit) as end:
            script.main(wrong)
        assert end.value.code == 2


def test_the_module_is_the_first_that_is_there(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = {"backends": ["tensorrt_rtx", "tensorrt"], "compute_capability": "8.7"}
    bundle = make_sample(tmp_path / "rtx", target=target)
    asked: list[str] = []

    def probe(job: dict[str, Any], **how: Any) -> dict[str, Any]:
        asked.append(job["module"])
        raise script.DeviceError("enough")

    monkeypatch.setattr(script, "run_job", probe)
    for installed in ({"tensorrt"}, {"tensorrt_rtx"}, {"tensorrt", "tensorrt_rtx"}, set()):
        monkeypatch.setattr(script, "find_spec", lambda name, i=installed: name in i or None)
        assert run(bundle) == 1
    assert run(bundle, "--module", "tensorrt") == 1
    assert asked == ["tensorrt", "tensorrt_rtx", "tensorrt_rtx", "tensorrt_rtx", "tensorrt"]


def test_it_builds_ahead_for_its_own_target_only(
    bundle: Path, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bundle, "--only", "build", "--compute-capability", "8.9") == 2
    assert "(compute capability 8.7), found --compute-capability 8.9" in capsys.readouterr().err
    assert device.built == []
    # Allowed, but not possible with this module.
    assert run(bundle, "--only", "build", "--compute-capability", "8.7") == 1
    assert "tensorrt 10.3.0 has no building for another GPU" in capsys.readouterr().err


def test_no_module_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(worker.platform, "machine", lambda: "aarch64")
    with pytest.raises(script.DeviceError, match="sudo apt install nvidia-jetpack.*--trtexec"):
        worker.load_tensorrt("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(script.DeviceError, match="pip install tensorrt-rtx"):
        worker.load_tensorrt("tensorrt_rtx")


def test_an_isolated_python_starts_isolated_ones() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from export.device.process import command_of; print(command_of('worker')[1])"
    )
    root = str(Path(__file__).parents[2])
    for flags, first in (["-I"], "-I"), ([], "-c"):
        command = [sys.executable, *flags, "-c", code, root]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == first


def test_jobs_run_in_processes_whose_errors_come_back() -> None:
    with pytest.raises(script.DeviceError, match="module no_such cannot be imported"):
        process.run_job({"job": "probe", "module": "no_such", "gpu": False})
    with pytest.raises(script.DeviceError, match="^probing: failed with exit code 1: KeyError"):
        process.run_job({"job": "probe", "name": "probing"})


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("# R35 (release), REVISION: 4.1, GCID: 1, BOARD: x", True),  # synthetic, JetPack 5.1.2
        ("# R36 (release), REVISION: 3.0, GCID: 1, BOARD: x", True),  # JetPack 6.0
        ("# R36 (release), REVISION: 4.0, GCID: 1, BOARD: x", False),  # JetPack 6.1
        ("# R38 (release), REVISION: 2.0, GCID: 1, BOARD: x", False),
    ],
)
def test_old_jetpacks_are_told_from_their_release_file(
    text: str, refused: bool, tmp_path: Path
) -> None:
    file = tmp_path / "nv_tegra_release"
    file.write_text(text)
    if refused:
        with pytest.raises(script.DeviceError, match=r"is too old.*upgrade to JetPack 6\.1"):
            preflight.check_system({"jetpack": "6.1"}, file)
    else:
        preflight.check_system({"jetpack": "6.1"}, file)


def test_swap_counts_as_memory_and_nonsense_as_unknown(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 9 kB\nMemAvailable: 3 kB\nSwapFree: 2 kB\n")
    assert preflight.available_memory(file) == 5 * 1024
    file.write_text("nonsense")
    assert preflight.available_memory(file) is None
