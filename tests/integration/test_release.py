"""docker/release.sh on a small model, from the weights to the tar or to the reason why not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.release import real, release

RECIPE: dict[str, Any] = {
    "name": "release",
    "prune": {"unet": {"rules": [{"scope": "linear", "pattern": "2:4"}]}},
    "export": {"dtype": "fp32"},
    "engine": {"options": {"provider": "cpu"}},
    "sampling": {"steps": 2, "guidance": 2},
    "bench": {"rounds": 2, "budget": 0.05},
    "pictures": {"prompts": ["a red cat"]},
    # Nothing here depends on how busy the machine is.
    "gates": {"size": 1.01, "psnr": 5, "sparse_layers": 0},
}


def started(
    place: Path, model: Path, results: Path | None = None, **changes: Any
) -> subprocess.CompletedProcess[str]:
    recipe = place / "recipe.yaml"
    content = {k: v for k, v in {**RECIPE, **changes}.items() if v is not None}
    recipe.write_text(yaml.safe_dump(content))
    brought = ("--results", str(results)) if results else ()
    return release(*brought, str(recipe), str(model), str(place / "out"), path=real(place))


@pytest.fixture(scope="module")
def place(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a release has been made."""
    directory = tmp_path_factory.mktemp("release")
    done = started(directory, tiny_sd)
    assert done.returncode == 0, done.stderr
    assert "passed psnr" in done.stderr
    return directory


def unpack(place: Path, directory: Path) -> Path:
    subprocess.run(["tar", "-xf", place / "out/release.tar", "-C", directory], check=True)
    return directory / "release"


def test_what_is_packed(place: Path, tmp_path: Path) -> None:
    out = place / "out"
    assert sorted(p.name for p in out.iterdir()) == ["release.tar", "release.tar.sha256", "run"]
    digest = hashlib.sha256((out / "release.tar").read_bytes()).hexdigest()
    assert (out / "release.tar.sha256").read_text() == f"{digest}  release.tar\n"

    with tarfile.open(out / "release.tar") as tar:
        assert all((m.mtime, m.uid, m.gid) == (0, 0, 0) for m in tar.getmembers())
        assert all(m.isreg() or m.isdir() for m in tar.getmembers())
    unpacked = unpack(place, tmp_path)
    sums = dict(
        reversed(line.split("  ", 1)) for line in (unpacked / "SHA256SUMS").read_text().splitlines()
    )
    files = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    assert set(sums) == files - {"SHA256SUMS"}
    for name, expected in sums.items():
        assert hashlib.sha256((unpacked / name).read_bytes()).hexdigest() == expected, name
    papers = {"gate.json", "plan.json", "recipe.yaml", "report.html", "results.json", "verify.json"}
    assert papers <= files
    assert "engine/sparse/manifest.json" in files

    gate = json.loads((unpacked / "gate.json").read_text())
    assert gate["passed"]
    assert [check["name"] for check in gate["checks"]] == ["size", "psnr", "sparse_layers"]
    assert json.loads((unpacked / "verify.json").read_text())["passed"]


def test_the_engine_in_the_tar_paints(place: Path, tmp_path: Path) -> None:
    from sdcompress.bundle import Bundle

    engine = Bundle.open(unpack(place, tmp_path) / "engine/sparse", stages=("engine",))
    engine.check_files()
    painted = subprocess.run(
        [str(place / "bin/sdcompress"), "generate", str(engine.path), "--prompt", "a red cat",
         "--steps", "1", "-o", str(tmp_path / "pictures")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert painted.returncode == 0, painted.stderr
    assert list((tmp_path / "pictures").glob("*.png"))


def test_a_limit_that_is_not_met(place: Path, tiny_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    assert (tmp_path / "out/release.tar").is_file()
    done = started(tmp_path, tiny_sd, gates={"size": 0.5, "sparse_layers": 1})
    assert done.returncode == 3
    assert "FAILED size: engine files 1.000 of the dense engine's is above 0.5" in done.stderr
    assert "FAILED sparse_layers: 0 of" in done.stderr
    assert "bench          unchanged" in done.stderr  # only the limits were new
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["run"]


def test_a_release_needs_limits(tiny_sd: Path, tmp_path: Path) -> None:
    done = started(tmp_path, tiny_sd, gates=None)
    assert done.returncode == 2
    assert "a release needs limits" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_mistake_ends_before_slow_work(tiny_sd: Path, tmp_path: Path) -> None:
    done = started(tmp_path, tiny_sd, target="jetson-nano")
    assert done.returncode == 2
    assert "no target 'jetson-nano'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_results_that_are_none_or_of_something_else(
    place: Path, tiny_sd: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    broken, other = tmp_path / "broken.json", tmp_path / "other.json"
    broken.write_bytes(b"\xff\xfe\x00")
    found = json.loads((place / "out/run/results.json").read_text())
    digest = found["engines"]["sparse"]["digest"]
    found["engines"]["sparse"]["digest"] = "0" * 64
    found["setup"]["prompt"] = digest  # it names the engine, and is not of it
    other.write_text(json.dumps(found))
    for file, code, why in (
        (broken, 1, "not a results.json of schema version 1"),
        (other, 3, "measured something else than what is in"),
    ):
        done = started(tmp_path, tiny_sd, results=file)
        assert done.returncode == code
        assert f"{file}: {why}" in done.stderr
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["run"]
