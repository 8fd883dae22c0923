"""What a user installs and reads: metadata, dependencies, package data, documents, layers."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires
from pathlib import Path

import pytest

import sdcompress

ROOT = Path(__file__).parent.parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PACKAGES = ("sdcompress", "export")
# Import name → the distribution that brings it, where the two differ.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
# These come with a direct dependency that could not do without them.
COME_WITH = {"google": "onnx", "markupsafe": "jinja2", "onnx_ir": "onnxscript"}
# What some people want and nobody has to have.
OPTIONAL = ("rtx", "tensorrt", "optimum", "ray", "tensorboard", "fid", "lpips")
RUNTIMES = {"onnxruntime", "onnxruntime-gpu"}


def requirements(extra: str | None = None) -> dict[str, str]:
    """Distribution (lower case) → requirement, of the base or of one extra."""
    found = {}
    for line in requires("sdcompress") or []:
        name = re.match(r"[\w.-]+", line)
        assert name
        marker = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if (marker[1] if marker else None) == extra:
            found[name[0].lower().replace("_", "-")] = line
    return found


def brought_by(distribution: str) -> list[str]:
    try:
        return requires(distribution) or []
    except PackageNotFoundError:  # an environment without that extra
        return []


def sources() -> list[Path]:
    return sorted(f for package in PACKAGES for f in (ROOT / package).rglob("*.py"))


def test_version_and_changelog_are_in_step() -> None:
    assert metadata("sdcompress")["Version"] == sdcompress.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == sdcompress.__version__


def test_metadata() -> None:
    found = metadata("sdcompress")
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.10"
    (script,) = entry_points(group="console_scripts", name="sdcompress")
    assert script.value == "sdcompress.commands:main"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("package", PACKAGES)
def test_types_are_shipped(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_extras() -> None:
    extras = set(metadata("sdcompress").get_all("Provides-Extra") or [])
    assert extras == {"cpu", "gpu", "test", "dev", *OPTIONAL}
    assert requirements("cpu").keys() == {"onnxruntime"}
    assert requirements("gpu").keys() == {"onnxruntime-gpu"}


def test_only_cpu_and_gpu_bring_a_runtime() -> None:
    """The two runtimes install the same files over each other: nothing else may choose one."""
    for extra in (None, "test", "dev", *OPTIONAL):
        assert not RUNTIMES & requirements(extra).keys()
    # optimum-onnx's own extras would bring one; the plain package does not
    assert "[" not in requirements("optimum")["optimum-onnx"]
    for line in brought_by("optimum-onnx"):
        assert not re.match(r"onnxruntime", line) or "extra ==" in line


def test_every_import_is_a_dependency_and_every_dependency_is_used() -> None:
    imported = set()
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - set(PACKAGES)
    base = requirements().keys()
    extras = {name for extra in ("cpu", "gpu", *OPTIONAL) for name in requirements(extra)}
    needed = {
        DISTRIBUTIONS.get(name, name).lower().replace("_", "-")
        for name in third_party - COME_WITH.keys()
    }
    assert needed <= base | extras, f"not declared: {sorted(needed - base - extras)}"
    assert set(COME_WITH.values()) <= base
    # torch's exporter and diffusers' loader use these on our behalf
    assert base - needed <= {"accelerate", "onnxscript"}


def test_constraints_pin_every_dependency() -> None:
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([^;]+)(;.*)?", line).group(1, 2)  # type: ignore[union-attr]
            pins.setdefault(name.lower().replace("_", "-"), []).append(version)
    assert pins["torch"] == ["2.13.0"]
    for extra in (None, "cpu", "gpu", "rtx", "optimum", "ray", "tensorboard", "test", "dev"):
        for name in requirements(extra):
            assert name in pins, f"{name} has no pin"


def test_package_data_is_in_the_packages() -> None:
    """A wheel holds what lies in the two packages, so data anywhere else would be lost."""
    for pattern in ("recipes/*.yaml", "models/sd2/tokenizer/*.gz", "report/*.jinja*"):
        assert list((ROOT / "sdcompress").glob(pattern)), pattern


def commands() -> list[str]:
    import click

    from sdcompress.commands import cli

    return cli.list_commands(click.Context(cli))


def test_every_command_is_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [name for name in commands() if not re.search(rf"sdcompress {name}\b", readme)]
    assert not missing, f"README.md does not name: {missing}"


@pytest.mark.parametrize("folder", ["criteria", "allocation", "tuning", "evaluation/metrics"])
def test_every_plugin_is_documented(folder: str) -> None:
    readme = (ROOT / "README.md").read_text()
    names = [f.stem for f in (ROOT / "sdcompress" / folder).glob("*.py") if f.stem[0] != "_"]
    assert names
    missing = [name for name in names if not re.search(rf"\b{name}\b", readme)]
    assert not missing, f"README.md does not name: {missing}"


def test_the_readme_begins_with_the_two_commands() -> None:
    first = re.search(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == [
        "make demo",
        "make test",
    ]


def test_makefile_and_readme_test_the_same() -> None:
    tested = "tests/unit tests/integration tests/gpu"
    for file in ("Makefile", "README.md"):
        assert f"pytest -n 2 --dist loadfile {tested}" in (ROOT / file).read_text()
    assert json.dumps(tested.split()).strip("[]") in PYPROJECT


def test_ci_runs_everything_and_skips_nothing_silently() -> None:
    script = (ROOT / ".ci/run").read_text()
    for target in ("make test", "make lint", "make wheel-check"):
        assert re.search(rf"^{target}$", script, re.MULTILINE)
    assert "SDCOMPRESS_REQUIRE_CHROMIUM=1" in script
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_help_of_make_names_every_target() -> None:
    made = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    for target in set(phony[1].split()) - {"help"}:
        assert f"make {target}" in made.stdout


def test_nothing_names_this_machine_or_unfinished_work() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b|/(root/|home/\w)")
    for file in (*sources(), *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"):
        assert not marks.search(file.read_text()), file
