"""Sweeps of the tiny pipeline: cached, killed, failing, and over several processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdcompress.bundle import Bundle, locked
from sdcompress.errors import InputError, SdcompressError, UsageError
from sdcompress.evaluation.pictures import dense_pictures
from sdcompress.evaluation.quality import QualitySettings, evaluate
from sdcompress.models.sources import resolve
from sdcompress.sweep import points as sweep_points
from sdcompress.sweep.grid import grid
from sdcompress.sweep.points import Part, Point, measure_point, point_recipe
from sdcompress.sweep.processes import run_here
from sdcompress.sweep.run import sweep

SETTINGS = QualitySettings(
    prompts=("a red cat", "a cat", "a rat", "red"),
    steps=2,
    guidance=2.0,
    batch=2,
    metrics=("psnr",),
)
POINTS = grid(["text_encoder"], ["magnitude"], ["unstructured", "2:4"], [0.3, 0.6, 0.9])
COMMAND = "from sdcompress.commands import main; main()"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as each of two processes has: sums of floats depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tiny_source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("sweeps") / "undisturbed"
    sweep(tiny_source, POINTS, SETTINGS, out, keep={"psnr": 20})
    return out


def _table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_says_what_was_asked_and_what_is_zero(undisturbed: Path, tiny_source: Bundle) -> None:
    rows = _table(undisturbed)
    assert [row["asked"] for row in rows] == ["0.3", "0.6", "0.9", "0.5"]
    assert [row["pattern"] for row in rows] == ["unstructured"] * 3 + ["N:4"]
    assert [row["text_encoder_pattern"] for row in rows] == ["unstructured"] * 3 + ["2:4"]
    for row in rows:
        asked, pruned, components, pipeline = (
            float(row[f]) for f in ("asked", "of_layers_pruned", "of_components_pruned",
                                    "of_pipeline")
        )  # fmt: skip
        assert abs(pruned - asked) < 1e-3
        assert asked > components > pipeline > 0
    drift = [float(row["psnr"]) for row in rows]
    assert drift[0] > drift[1] > drift[2]
    assert [row["failed"] for row in rows] == [""] * 4


def test_the_document_and_the_page_hold_every_point(undisturbed: Path) -> None:
    document = json.loads((undisturbed / "sweep.json").read_text())
    assert [p["sparsity"] for p in document["points"]] == [0.3, 0.6, 0.9, 0.5]
    assert [c["metric"] for c in document["cliffs"]] == ["psnr", "psnr"]
    page = (undisturbed / "report.html").read_text()
    assert page.count('src="data:image/png') == 2 + 4  # a strip of the dense model for each curve
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert (undisturbed / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_measured_twice(
    undisturbed: Path, tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in undisturbed.glob("points/*")}
    kept = {f: (undisturbed / f).read_bytes() for f in ("results.csv", "plot.svg", "report.html")}
    monkeypatch.setattr(sweep_points, "compute_point", refuse)
    sweep(tiny_source, POINTS, SETTINGS, undisturbed, keep={"psnr": 20})
    assert len(before) == 4
    assert before == {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in before}
    assert kept == {f: (undisturbed / f).read_bytes() for f in kept}
    recipe = point_recipe(Point(parts={"text_encoder": Part(sparsity=0.6)}))
    found = measure_point(tiny_source, recipe, SETTINGS, undisturbed)  # as `search` asks
    assert f"{found.digest}.json" in {f.name for f in before}


def test_dense_pictures_are_those_a_measurement_looks_for(
    undisturbed: Path, tiny_source: Bundle, pruned: Bundle, tmp_path: Path
) -> None:
    folders = {p.folder.name for p in dense_pictures(tiny_source, SETTINGS, undisturbed)}
    evaluate(pruned, tiny_source, SETTINGS, work=tmp_path)
    made = {folder.name for folder in (tmp_path / "pictures").iterdir()}
    assert len(folders) == 2
    assert len(made - folders) == 1


def test_a_killed_sweep_goes_on(undisturbed: Path, tiny_sd: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, with two processes at work: none stays, and no point is lost."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(SETTINGS.prompts))
    arguments = ["sweep", tiny_sd, "-o", out, "--component", "text_encoder"]
    arguments += ["--pattern", "unstructured,2:4", "--sparsity", "0.3:0.9:0.3", "--jobs", "2"]
    arguments += ["--steps", "2", "--guidance", "2", "--batch", "2", "--metric", "psnr"]
    arguments += ["--prompts", prompts, "--keep", "psnr=20", "--samples", "4"]
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    with subprocess.Popen(command, env=environment) as process:
        deadline = time.monotonic() + 120
        while not (done := list(out.glob("points/*.json"))):
            assert process.poll() is None, "ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = [
            int(child)
            for task in Path(f"/proc/{process.pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        process.send_signal(signal.SIGKILL)
    before = {f: f.stat().st_mtime_ns for f in done}
    assert 1 <= len(before) < 4
    assert not (out / "report.html").exists()
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a process outlived the sweep"
        time.sleep(0.05)

    resolved = resolve(str(tiny_sd))
    source = Bundle.of_source(resolved.directory, resolved.source)
    found = sweep(source, POINTS, SETTINGS, out, keep={"psnr": 20})
    assert [row.failed for row in found.points] == [None] * 4
    assert {f: f.stat().st_mtime_ns for f in before} == before
    # The digests name two sources, one with its licence; every figure is the same.
    columns = [name for name in _table(out)[0] if name != "digest"]
    for ours, theirs in zip(_table(out), _table(undisturbed), strict=True):
        assert [ours[c] for c in columns] == [theirs[c] for c in columns]


def test_a_point_that_fails_does_not_end_the_others(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = sweep_points.compute_point
    broken = True

    def sometimes(dense: Bundle, recipe, *rest, **more):  # type: ignore[no-untyped-def]
        if broken and recipe.prune["text_encoder"].rules[0].sparsity == 0.6:
            raise SdcompressError("the weights are NaN; prune less")
        return compute(dense, recipe, *rest, **more)

    monkeypatch.setattr(sweep_points, "compute_point", sometimes)
    found = sweep(tiny_source, POINTS[:3], SETTINGS, tmp_path, keep={"psnr": 20})
    assert [row.failed for row in found.points] == [None, "the weights are NaN; prune less", None]
    assert [row.sparsity for row in found.points] == [0.3, 0.6, 0.9]
    assert found.cliffs[0].failed == (0.6,)
    assert _table(tmp_path)[1]["failed"] == "the weights are NaN; prune less"
    assert _table(tmp_path)[1]["psnr"] == ""
    page = (tmp_path / "report.html").read_text()
    assert "1 of 3 points failed" in page

    broken = False
    found = sweep(tiny_source, POINTS[:3], SETTINGS, tmp_path, keep={"psnr": 20})
    assert [row.failed for row in found.points] == [None] * 3


def test_the_command_says_that_points_failed(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from sdcompress.commands import cli

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(sweep_points, "compute_point", fail)
    arguments = ["sweep", str(tiny_sd), "-o", str(tmp_path / "out"), "--component", "text_encoder"]
    arguments += ["--pattern", "2:4", "--samples", "2", "--steps", "1", "--metric", "psnr"]
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert isinstance(done.exception, SdcompressError)
    assert done.exception.exit_code == 1
    assert "1 of 1 points failed (MemoryError: no room)" in str(done.exception)
    assert list(json.loads(done.stdout)["failed"].values()) == ["MemoryError: no room"]


def test_refused_before_any_work(tiny_source: Bundle, tmp_path: Path) -> None:
    impossible = grid(["text_encoder"], ["magnitude"], ["2:4"], [], scope="conv")
    with pytest.raises(UsageError, match="matches none of the .* prunable conv layers"):
        sweep(tiny_source, [*POINTS, *impossible], SETTINGS, tmp_path / "out")
    with pytest.raises(UsageError, match="--keep ssim: expected one of the metrics measured, psnr"):
        sweep(tiny_source, POINTS, SETTINGS, tmp_path / "out", keep={"ssim": 0.9})
    unable = SETTINGS.model_copy(update={"metrics": ("prompt_accuracy",)})
    with pytest.raises(UsageError, match="prompt_accuracy: reads mini-sd2's scenes only"):
        sweep(tiny_source, POINTS, unable, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with (
        locked(tmp_path),
        pytest.raises(InputError, match="another sweep or search is at work there; wait for it"),
    ):
        sweep(tiny_source, POINTS, SETTINGS, tmp_path)


def test_files_that_change_meanwhile_make_no_answer(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are of other files than were asked for, so they have other digests."""
    monkeypatch.setattr("sdcompress.sweep.run._run", lambda *_: iter(()))
    with pytest.raises(InputError, match="changed while points were measured; repeat"):
        sweep(tiny_source, POINTS, SETTINGS, tmp_path)
    assert not (tmp_path / "sweep.json").exists()


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_fails_its_point_alone(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system does where memory runs out; spawned processes see no monkeypatch, so the
    task itself is replaced by one that kills its process."""
    monkeypatch.setattr("sdcompress.sweep.processes.try_point", _die)
    recipe = point_recipe(POINTS[0])
    (answer,) = run_here([recipe], tiny_source, SETTINGS, tmp_path, jobs=2)
    assert answer.failed == "its process was killed; the machine may be out of memory"
    assert answer.sparsity == 0.3
