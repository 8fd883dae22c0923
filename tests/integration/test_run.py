"""`run` from the model to the page: what it leaves, what it skips, what it makes again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from export.device import builder
from export.ranges import Ranges
from export.run import KINDS, STAGES, TWINS, Workspace, _engines, _Job, run
from sdcompress.build_report import BuildReport
from sdcompress.bundle import Bundle, locked
from sdcompress.commands._common import open_model
from sdcompress.errors import InputError, UsageError, VerificationError
from sdcompress.recipe import Recipe
from sdcompress.results import Check, Results, VerifyReport
from tests.conftest import TWO_TO_FOUR
from tests.unit.test_device_results import document

SMALL: dict[str, Any] = {
    **TWO_TO_FOUR,
    "export": {"dtype": "fp32"},
    "engine": {"options": {"provider": "cpu"}},
    "sampling": {"steps": 2},
    "bench": {"rounds": 2, "budget": 0.05},
    "pictures": {"prompts": ["a red cat"]},
}
# Without a target, calibration, tuning and a measured quality.
WHEN_ASKED = ("device", "tuned", "quality")
USUAL = [s for s in STAGES if s not in WHEN_ASKED and not s.startswith(("ranges/", "latency/"))]
BUNDLES = ("pruned", "onnx/dense", "onnx/sparse", "engine/dense", "engine/sparse")


def _run(source: Bundle, out: Path, **changes: Any) -> tuple[list[str], list[str]]:
    """The stages that were done, and those that were skipped."""
    stages: dict[bool, list[str]] = {False: [], True: []}
    recipe = Recipe.model_validate({**SMALL, **changes})
    run(source, recipe, out, command="test", announce=lambda s, before: stages[before].append(s))
    return stages[False], stages[True]


@pytest.fixture(scope="module")
def finished(tiny_source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    done, skipped = _run(tiny_source, out)
    assert (done, skipped) == ([*USUAL, "report"], [])
    return out


def _digests(out: Path) -> dict[str, str]:
    return {name: Bundle.open(out / name).digest for name in BUNDLES}


def test_a_run_leaves_everything(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "two-to-four" in page
    assert Results.read(finished / "results.json").setup.rounds == 2
    assert json.loads((finished / "verify.json").read_text())["passed"] is True
    assert (finished / "images/dense/00.png").is_file()
    for name in BUNDLES:
        Bundle.open(finished / name).check_files()
    sparse, pruned = (Bundle.open(finished / n) for n in ("onnx/sparse", "pruned"))
    assert sparse.manifest.parent == pruned.digest
    assert not list(finished.glob(".*"))


def test_a_second_run_does_nothing_but_the_page(tiny_source: Bundle, finished: Path) -> None:
    assert _run(tiny_source, finished) == (["report"], USUAL)


def test_only_what_a_change_touches_is_done_again(tiny_source: Bundle, finished: Path) -> None:
    done, _ = _run(tiny_source, finished, bench={"rounds": 3, "budget": 0.05})
    assert done == ["bench", "report"]
    done, _ = _run(tiny_source, finished)
    assert done == ["bench", "report"]


def test_tuning_and_quality_are_stages_of_their_own(
    tiny_source: Bundle, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    asked = {
        "tune": {"steps": 2, "batch": 2, "sampling_steps": 2},
        "quality": {"samples": 3, "metrics": ["psnr"]},
    }
    sparse = [s for s in USUAL if s.endswith("/sparse")]
    done, _ = _run(tiny_source, out, **asked)
    assert done == ["tuned", *sparse, "bench", "quality", "report"]

    tuned, onnx = (Bundle.open(out / name) for name in ("tuned", "onnx/sparse"))
    assert tuned.manifest.parent == Bundle.open(out / "pruned").digest
    assert onnx.manifest.parent == tuned.digest
    assert json.loads((out / "verify.json").read_text())["passed"] is True
    quality = json.loads((out / "quality.json").read_text())
    assert quality["model"] == tuned.digest
    assert quality["metrics"]["psnr"]["samples"] == 3
    page = (out / "report.html").read_text()
    assert "What it cost in quality" in page
    assert not list(out.glob(".*"))

    # Quality is the weights' own: it outlives engines that are built or measured anew.
    done, _ = _run(tiny_source, out, **asked, bench={"rounds": 3, "budget": 0.05})
    assert done == ["bench", "report"]
    done, _ = _run(tiny_source, out)
    assert done == [*sparse, "bench", "report"]
    assert not (out / "tuned").exists()
    assert not (out / "quality.json").exists()


def test_a_tuning_that_was_stopped_goes_on_unless_it_is_another(
    tiny_source: Bundle, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sdcompress.tuning

    found: list[list[str]] = []

    def stop(*_: Any, checkpoints: Path, **__: Any) -> None:
        found.append([f.name for f in checkpoints.glob("*")])
        checkpoints.mkdir(exist_ok=True)
        (checkpoints / "checkpoint.pt").touch()
        raise InputError("stopped")

    monkeypatch.setattr(sdcompress.tuning, "tune", stop)
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for tuning in ({"steps": 2}, {"steps": 2, "on_divergence": "keep"}, {"steps": 3}):
        with pytest.raises(InputError, match="stopped"):
            _run(tiny_source, out, tune=tuning)
    assert found == [[], ["checkpoint.pt"], []]
    assert len(list(out.glob(".tuning-*"))) == 1
    with Workspace.open(out, fresh=True):
        assert not list(out.glob(".tuning-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality": {"metrics": ["prompt_accuracy"]}}, "prompt_accuracy"),
        ({"tune": {"components": ["vae"]}}, "component vae cannot be tuned"),
        ({"tune": {"method": "finetune", "images": "nowhere"}}, "expected a folder of pictures"),
    ],
)
def test_what_cannot_run_is_refused_before_anything(
    tiny_source: Bundle, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        _run(tiny_source, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_what_was_damaged_is_made_again(tiny_source: Bundle, finished: Path) -> None:
    before = _digests(finished)
    (finished / "pruned/LICENSE").unlink()
    (finished / "engine/sparse/unet/model.onnx_data").unlink()
    done, _ = _run(tiny_source, finished)
    # the pruned model comes out as it was, so its exports would too; what was measured on
    # engines that had to be built again is measured again
    assert done == [s for s in USUAL if not s.endswith("/dense")] + ["report"]
    assert _digests(finished) == before


def test_a_failed_verification_stops_the_run_and_leaves_no_page_that_lies(
    tiny_source: Bundle, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import export.verify

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    failed = Check(name="zeros", passed=False, detail="unet/conv_in.weight")
    report = VerifyReport(bundle="x", stage="onnx", checks=(failed,))
    monkeypatch.setattr(export.verify, "verify_bundle", lambda *a, **k: report)
    for _ in range(2):  # and is not taken for done the second time
        with pytest.raises(VerificationError, match="zeros failed: unet/conv_in.weight"):
            _run(tiny_source, out, seed=1)
    assert json.loads((out / "verify.json").read_text())["passed"] is False
    for stale in ("report.html", "results.json", "engine/sparse", "images/sparse"):
        assert not (out / stale).exists()
    assert (out / "engine/dense").is_dir()


def test_pictures_nobody_asks_for_any_more_go_away(
    tiny_source: Bundle, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    _run(tiny_source, tmp_path / "out", pictures={})
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"options": {"thread": 2}}}, "thread"),
        ({"engine": {"options": {"provider": "cuda"}}}, "provider 'cuda' is not in"),
        ({"prune": {"unet": {"rules": [{"layers": "no", "sparsity": 0.1}]}}}, "matches none"),
        ({"export": {"calibrate": 2}}, "paints as many prompts, found 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tiny_source: Bundle, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "cuda" in message and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is here")
    with pytest.raises(UsageError, match=message):
        _run(tiny_source, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_size_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="height 24 does not fit this model"):
        _run(open_model("mini-sd2"), tmp_path / "out", sampling={"height": 24})
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_eat_its_own_source(finished: Path) -> None:
    before = Bundle.open(finished / "pruned").digest
    with pytest.raises(UsageError, match="lies inside the output"):
        _run(open_model(str(finished / "pruned")), finished)
    assert Bundle.open(finished / "pruned").digest == before


def test_two_runs_do_not_meet(tiny_source: Bundle, finished: Path) -> None:
    with locked(finished), pytest.raises(InputError, match="another run is at work"):
        _run(tiny_source, finished)


@pytest.mark.parametrize("state", ["{}", "[]", "x", '{"sdcompress_run": 2}'])
def test_a_state_of_somebody_else_is_refused(
    tiny_source: Bundle, tmp_path: Path, state: str
) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(InputError, match="not written by this version"):
        _run(tiny_source, tmp_path)


def test_somebody_elses_directory_is_left_alone(tiny_source: Bundle, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not the output of `sdcompress run`"):
        _run(tiny_source, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_killed_run_goes_on_to_the_same_bytes(
    tiny_sd: Path, finished: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(SMALL))
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from sdcompress.commands import main; main()"]
    command += ["run", str(recipe), "--model", str(tiny_sd), "-o", str(out)]
    moments = random.Random(3)
    for _ in range(3):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while not (out / "state.json").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 15))
            os.kill(process.pid, signal.SIGKILL)
    _run(open_model(str(tiny_sd)), out)
    expected = {n: Bundle.open(finished / n).manifest.files for n in BUNDLES}
    for name in BUNDLES:
        bundle = Bundle.open(out / name)
        bundle.check_files()
        assert bundle.manifest.files == expected[name]
    assert not list(out.rglob("*.partial*"))


def test_an_engine_for_another_device_is_built_and_packed_and_not_measured(
    tiny_source: Bundle, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "out"
    changes = {
        "target": "rtx-4090",
        "export": {"dtype": "fp16", "calibrate": 1},
        "engine": {"backend": "tensorrt_rtx", "options": {"check_flag": False}},
    }
    done, skipped = _run(tiny_source, out, **changes)
    elsewhere = ["pruned", *(s for s in STAGES if s.split("/")[0] in KINDS[:-1]), "device"]
    assert (done, skipped) == ([*elsewhere, "report"], [])
    assert not (out / "results.json").exists()
    assert not (out / "images").exists() or not any((out / "images").iterdir())
    dense, sparse = (Bundle.open(out / "engine" / twin) for twin in ("dense", "sparse"))
    assert sparse.manifest.details["target"] == "rtx-4090"
    assert sparse.manifest.details["options"] == dense.manifest.details["options"]
    assert sparse.manifest.details["sizes"]["images"] == 1
    page = (out / "report.html").read_text()
    assert "Built and not measured here" in page
    assert "What the builder did" in page
    assert Ranges.read(out / "ranges-dense.json").beyond_fp16() == {}
    with tarfile.open(out / "device.tar") as tar:
        assert "sdcompress_device.pyz" in tar.getnames()
    assert _run(tiny_source, out, **changes) == (["report"], elsewhere)
    # What the device has measured may be put beside it, and stays.
    (out / "results.json").write_text(json.dumps(document()))
    assert _run(tiny_source, out, **changes) == (["report"], elsewhere)
    assert json.loads((out / "results.json").read_text()) == document()
    assert "Built and not measured here" not in (out / "report.html").read_text()


def test_a_backend_for_other_machines_and_no_target_pack_nothing(
    tiny_source: Bundle, finished: Path
) -> None:
    assert not (finished / "device.tar").exists()
    assert not list(finished.glob("ranges*"))


def test_an_unknown_target_is_refused_before_anything(tiny_source: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no target 'jetson-nano'"):
        _run(tiny_source, tmp_path / "out", target="jetson-nano")
    assert not (tmp_path / "out").exists()


def test_results_hold_the_drift_of_the_pictures(finished: Path) -> None:
    decibels = Results.read(finished / "results.json").quality["psnr"]
    assert 5 < decibels < 60


def test_where_memory_ran_out_for_one_twin_both_are_built_with_less(
    tiny_source: Bundle,
    onnx_dense: Bundle,
    onnx_sparse: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = {"backend": "tensorrt_rtx", "options": {"workspace_mb": 64, "check_flag": False}}
    recipe = Recipe.model_validate({**SMALL, "target": "rtx-4090", "engine": engine})
    job = _Job.check(recipe, tiny_source)
    in_process = builder.run_in_process

    def short_of_memory(request: builder.Request, *rest: Any) -> dict[str, Any]:
        sparse = Path(request.onnx).is_relative_to(onnx_sparse.path)
        if sparse and "unet" in request.onnx and (request.workspace_mb or 0) > 16:
            raise builder.OutOfMemoryError("made up")
        return in_process(request, *rest)

    monkeypatch.setattr(builder, "run_in_process", short_of_memory)
    onnx = {"dense": onnx_dense, "sparse": onnx_sparse}
    stages: list[tuple[str, bool]] = []

    def engines() -> dict[str, Bundle]:
        stages.clear()
        with Workspace.open(tmp_path / "out") as place:
            return _engines(
                place, recipe, job, onnx, lambda *stage: stages.append(stage), lambda what: None
            )

    made = engines()
    assert [name for name, _ in stages] == ["engine/dense", "engine/sparse"] * 2
    reports = [BuildReport.read(made[twin].path) for twin in TWINS]
    assert [r and r.components["unet"].workspace_mb for r in reports] == [16, 16]
    assert made["dense"].manifest.details["options"] == made["sparse"].manifest.details["options"]
    assert engines()["dense"].digest == made["dense"].digest
    assert stages == [("engine/dense", True), ("engine/sparse", True)]
