"""`run` from the model to the page: what it leaves, what it skips, what it makes again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from export.run import run
from sdcompress.bundle import Bundle
from sdcompress.commands._common import open_model
from sdcompress.errors import InputError, VerificationError
from sdcompress.recipe import Recipe
from sdcompress.results import Results
from tests.conftest import TWO_TO_FOUR

SMALL: dict[str, Any] = {
    **TWO_TO_FOUR,
    "export": {"dtype": "fp32"},
    "engine": {"options": {"provider": "cpu"}},
    "sampling": {"steps": 2},
    "bench": {"rounds": 2, "budget": 0.05},
    "pictures": {"prompts": ["a red cat"]},
}
BUNDLES = ("pruned", "onnx/dense", "onnx/sparse", "engine/dense", "engine/sparse")
STAGES = [*BUNDLES[:3], "verify", *BUNDLES[3:], "images/dense", "images/sparse", "bench"]


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
    assert (done, skipped) == ([*STAGES, "report"], [])
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
    assert _run(tiny_source, finished) == (["report"], STAGES)


def test_only_what_a_change_touches_is_done_again(tiny_source: Bundle, finished: Path) -> None:
    done, _ = _run(tiny_source, finished, bench={"rounds": 3, "budget": 0.05})
    assert done == ["bench", "report"]
    done, _ = _run(tiny_source, finished)
    assert done == ["bench", "report"]


def test_what_was_damaged_is_made_again(tiny_source: Bundle, finished: Path) -> None:
    before = _digests(finished)
    (finished / "pruned/LICENSE").unlink()
    (finished / "engine/sparse/unet/model.onnx_data").unlink()
    done, _ = _run(tiny_source, finished)
    assert done == ["pruned", "engine/sparse", "report"]
    assert _digests(finished) == before


def test_a_failed_verification_stops_the_run(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import export.verify
    from sdcompress.results import Check, VerifyReport

    failed = Check(name="zeros", passed=False, detail="unet/conv_in.weight")
    monkeypatch.setattr(
        export.verify,
        "verify_bundle",
        lambda *a, **k: VerifyReport(bundle="x", stage="onnx", checks=(failed,)),
    )
    for _ in range(2):  # and is not taken for done the second time
        with pytest.raises(VerificationError, match="zeros failed: unet/conv_in.weight"):
            _run(tiny_source, tmp_path / "out")
    assert json.loads((tmp_path / "out/verify.json").read_text())["passed"] is False
    assert not (tmp_path / "out/engine").exists()


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
