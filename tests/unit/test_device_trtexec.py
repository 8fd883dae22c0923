"""The way through trtexec alone, with a program that checks what it is asked. Its words are
synthetic: written by hand after the documented options and formats."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from export.device.errors import DeviceError
from export.device.telemetry import NOTHING, Watch
from export.device.trtexec import TrtexecRoute
from export.device_results import read_results
from tests.sample_device import make_sample

pytest.importorskip("onnx")

script = importlib.import_module("export.device.__main__")

FAKE = '''\
#!{python}
"""Stands for trtexec: builds a "plan", doubles vectors, and refuses what it does not know."""
import json, os, struct, sys
from pathlib import Path

BUILD = {{"--onnx", "--saveEngine", "--sparsity", "--timingCacheFile", "--shapes", "--verbose",
         "--profilingVerbosity", "--skipInference", "--memPoolSize", "--builderOptimizationLevel",
         *{more!r}}}
RUN = {{"--loadEngine", "--shapes", "--loadInputs", "--exportOutput", "--exportTimes", "--duration",
       "--iterations", "--warmUp", "--useCudaGraph"}}
print("&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # trtexec")
if sys.argv[1:] == ["--help"]:
    print("  ".join(sorted(BUILD | RUN)))
    sys.exit(0)
options = dict((a.partition("=")[0], a.partition("=")[2]) for a in sys.argv[1:])
with open({record!r}, "a") as file:
    file.write(json.dumps(options) + "\\n")
known = RUN if "--loadEngine" in options else BUILD
if unknown := set(options) - known:
    print(f"[E] Unknown option: {{sorted(unknown)}}")
    sys.exit(1)
if {says!r}:
    print({says!r})
if {code}:
    sys.exit({code})
if "--onnx" in options:
    assert options["--sparsity"] == "enable" and os.path.isfile(options["--onnx"])
    print("[V] [TRT] (Sparsity) Found 7 layer(s) eligible to use sparse tactics: a, b")
    print("[V] [TRT] (Sparsity) Chose 2 layer(s) using sparse tactics: a")
    Path(options["--saveEngine"]).write_bytes(Path(options["--onnx"]).read_bytes())
    sys.exit(0)
assert options["--shapes"] == "x:1x3" and os.path.isfile(options["--loadEngine"])
print("[I] Engine deserialized in 0.25 sec.")
name, _, file = options["--loadInputs"].partition(":")
values = [2 * x for x in struct.unpack("<3e", Path(file).read_bytes())]
if "--exportOutput" in options:
    text = ", ".join({values} or map(str, values))
    document = '[\\n  {{ "name" : "y"\\n, "dimensions" : "1x3"\\n, "values" : [ %s ]\\n}}\\n]\\n'
    Path(options["--exportOutput"]).write_text(document % text)
if "--exportTimes" in options:
    times = [{{"startComputeMs": 1.0, "endComputeMs": 3.5, "computeMs": 2.5, "latencyMs": 3.0}}]
    Path(options["--exportTimes"]).write_text(json.dumps(times * int(options["--iterations"])))
'''


class Fake:
    """The program and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.path, self._record = folder / "trtexec", folder / "asked"
        self.make()

    def make(
        self,
        *,
        version: str = "100300",
        more: tuple[str, ...] = ("--stronglyTyped",),
        says: str = "",
        code: int = 0,
        values: tuple[str, ...] = (),
    ) -> None:
        text = FAKE.format(
            python=sys.executable,
            version=version,
            more=more,
            record=str(self._record),
            says=says,
            code=code,
            values=values,
        )
        self.path.write_text(text)
        self.path.chmod(0o755)

    @property
    def asked(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self._record.read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_sample(tmp_path / "a bundle, of: mine")  # its lists are cut at commas and colons


def run(bundle: Path, fake: Fake, *more: str) -> int:
    small = ["--rounds", "2", "--budget", "0.01", "--trtexec", str(fake.path)]
    return int(script.main(["--root", str(bundle), "-o", "results.json", *small, *more]))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_job(job: dict[str, Any], **how: Any) -> dict[str, Any]:
        raise DeviceError("no CUDA runtime")

    monkeypatch.setattr(script, "run_job", run_job)
    monkeypatch.chdir(tmp_path)


def test_the_whole_way(bundle: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, fake, "--cuda-graph", "--level", "4") == 0
    build = fake.asked[0]
    assert build["--memPoolSize"] == "workspace:64M"
    assert build["--builderOptimizationLevel"] == "4"
    assert build["--shapes"] == "x:1x3"
    assert "--stronglyTyped" in build
    assert build["--timingCacheFile"].endswith("engines/trtexec-10.3.0.cache")
    assert [a for a in fake.asked if "--onnx" in a][2]["--onnx"].endswith("sparse/unet/model.onnx")
    check = next(a for a in fake.asked if "--exportOutput" in a)
    assert check["--loadInputs"] == "x:golden/inputs/text_encoder/x.bin"
    timed = [a for a in fake.asked if "--exportTimes" in a]
    assert len(timed) == 3 * (2 + 2 * 3)  # components x (trials, rounds of each contestant)
    assert all("--useCudaGraph" in a for a in timed)

    results = read_results(Path("results.json"))
    unet = results.measures["unet_step"]
    assert unet.dense.rounds == (2.5, 2.5)
    assert unet.sparse_to_dense.verdict == "no difference"
    assert results.measures["picture"].dense.median == 12.5  # 2.5 + 3 x 2.5 + 2.5
    assert results.measures["load"].dense.median == 750.0
    assert "peak_memory" not in results.measures
    sparse = results.engines["sparse"]
    assert sparse.backend == "trtexec"
    assert sparse.sparse_kernels.used == 6
    assert sparse.sparse_kernels.of == 21
    assert sparse.device_memory is None
    assert results.setup.residency == "sequential"  # whatever the target suggests
    assert "added up" in results.setup.timer
    assert "the GPU could not be asked (no CUDA runtime)" in capsys.readouterr().err


def test_options_that_this_trtexec_has_not_are_left_out(bundle: Path, fake: Fake) -> None:
    fake.make(version="110401", more=())
    assert run(bundle, fake, "--only", "build") == 0
    assert all("--stronglyTyped" not in a for a in fake.asked)


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ({"version": "8602"}, 1, "TensorRT 8.6.2 is too old for this bundle; upgrade to JetPack"),
        ({"code": 1, "says": "[11/22] [E] no kernel"}, 1, "trtexec failed (no kernel)"),
        ({"code": 7}, 1, "building text_encoder: trtexec failed (code 7)"),
        ({"values": ("1", "-nan", "2")}, 3, "dense text_encoder: y holds NaN or infinity"),
        ({"values": ("inf", "1", "2")}, 3, "dense text_encoder: y holds NaN or infinity"),
        ({"values": ("2", "-4", "2")}, 3, "differs by 2.2e-01 of the host's output, 0.02 allowed"),
        ({"values": ("1", "2")}, 3, "differs by inf"),
        ({"values": ("oops",)}, 1, "output.json cannot be read"),
        (
            {"says": "Skipping tactic 0 due to insufficient memory on requested size of 9"},
            1,
            "trtexec ran short of memory",
        ),
    ],
)
def test_what_can_go_wrong(
    how: dict[str, Any],
    code: int,
    words: str,
    bundle: Path,
    fake: Fake,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.make(**how)
    assert run(bundle, fake) == code
    (line,) = (
        x for x in capsys.readouterr().err.splitlines() if x.startswith("sdcompress_device: ")
    )
    assert words in line
    assert not Path("results.json").exists()


def test_a_graph_that_was_not_used_is_no_graph(
    bundle: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.make(says="[W] The specified --useCudaGraph flag has been ignored.")
    assert run(bundle, fake, "--cuda-graph") == 1
    assert "sparse text_encoder: trtexec cannot run it as a CUDA graph" in capsys.readouterr().err
    assert not Path("results.json").exists()


def test_no_program_and_another_one(
    bundle: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.path.write_text("#!/bin/sh\necho hello\n")
    assert run(bundle, fake) == 1
    assert "so it may be no trtexec" in capsys.readouterr().err
    fake.path.unlink()
    assert run(bundle, fake) == 1
    assert "on a Jetson it is /usr/src/tensorrt/bin/trtexec" in capsys.readouterr().err


def test_a_changed_plan_is_not_given_to_it(bundle: Path, fake: Fake, tmp_path: Path) -> None:
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"changed")
    route = TrtexecRoute(str(fake.path), bundle)
    engine = {"name": "dense unet", "component": "unet", "calls": 1, "plan": str(plan),
              "sha256": "0" * 64, "inputs": [], "outputs": []}  # fmt: skip
    with pytest.raises(DeviceError, match="sha256 differs") as error:
        route.errors(engine)
    assert error.value.exit_code == 3
    job = {"engines": [engine], "iterations": {"unet_step": 1}, "warm_up": 0, "cuda_graph": False,
           "residency": "sequential"}  # fmt: skip
    with pytest.raises(DeviceError, match="sha256 differs"):
        route.measure(job, Watch(lambda pid: NOTHING))
