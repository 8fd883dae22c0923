"""The command line as a person or a script meets it: processes, exit codes, one-line errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from sdcompress import registry
from sdcompress.bundle import Bundle
from sdcompress.commands import cli

HEAVY = ("numpy", "torch", "onnx", "onnxruntime", "diffusers", "transformers", "matplotlib")
PROBE = """
import sys
sys.argv = ["sdcompress", *sys.argv[1:]]
from sdcompress.commands import main
try:
    main()
except SystemExit as e:
    assert not e.code, e.code
loaded = {m.partition(".")[0] for m in sys.modules} & set(%r)
assert not loaded, f"imported {loaded}"
"""


def sdcompress(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from sdcompress.commands import main; main()"]
    return subprocess.run(
        [*command, *map(str, args)], capture_output=True, text=True, cwd=cwd, check=False
    )


def fails(code: int, *args: object) -> str:
    """Run, expect the exit code and a single line on stderr, and return that line."""
    done = sdcompress(*args)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Usage:")]
    if code == 1:
        assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[-1]


@pytest.mark.parametrize("name", ["", *registry.names("commands")])
def test_help_is_light_and_has_an_example(name: str) -> None:
    args = [name, "--help"] if name else ["--help"]
    done = subprocess.run(
        [sys.executable, "-c", PROBE % (HEAVY,), *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sdcompress " in done.stdout
    if name:
        assert "Example" in done.stdout
        assert "--json" in done.stdout


def test_plan_and_list_import_nothing_heavy() -> None:
    for args in (["plan", "demo"], ["list", "recipes"], ["list", "criteria"], ["list", "models"]):
        done = subprocess.run(
            [sys.executable, "-c", PROBE % (HEAVY,), *args, "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("allocation", "rule"),
    [("uniform", "sparsity: 0.5"), ("global", "sparsity: 0.5"), ("uniform", "pattern: 2:4")],
)
def test_pruning_by_magnitude_does_not_wait_for_torch(
    tiny_sd: Path, tmp_path: Path, allocation: str, rule: str
) -> None:
    recipe = tmp_path / "r.yaml"
    section = f"{{allocation: {allocation}, rules: [{{{rule}}}]}}"
    recipe.write_text(f"name: r\nprune: {{unet: {section}, text_encoder: {section}}}\n")
    arguments = ["prune", tiny_sd, "--recipe", recipe, "-o", tmp_path / "pruned", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", PROBE % (("torch", "diffusers"),), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["criteria", "allocations", "backends", "recipes", "models"])
def test_list_describes_everything(kind: str) -> None:
    items = json.loads(sdcompress("list", kind, "--json").stdout)["items"]
    assert items
    assert all(item["summary"] for item in items)


def test_every_commands_json_follows_its_schema(tiny_sd: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nprune: {unet: {rules: [{pattern: 2:4}]}}\n")
    out = tmp_path / "out"
    calls = {
        "plan": ["plan", recipe, "--model", tiny_sd],
        "prune": ["prune", tiny_sd, "--recipe", recipe, "-o", out / "pruned"],
        "export": ["export", out / "pruned", "-o", out / "onnx", "--dtype", "fp32"],
        "verify": ["verify", out / "onnx", "--against", out / "pruned"],
        "build": ["build", out / "onnx", "-o", out / "engine"],
        "generate": ["generate", out / "engine", "--prompt", "a red cat", "-o", out / "pictures",
                     "--steps", "2"],
        "list": ["list", "backends"],
        "doctor": ["doctor"],
    }  # fmt: skip
    for name, args in calls.items():
        done = sdcompress(*args, "--json")
        assert done.returncode == 0, (name, done.stderr)
        document = json.loads(done.stdout)
        schema = json.loads((Path("sdcompress/schemas") / f"{name}.json").read_text())
        jsonschema.validate(document, schema)
    assert (out / "pictures/00.png").is_file()
    # and the dense twin, so that the two can be measured
    dense = [
        ["export", tiny_sd, "-o", out / "onnx-dense", "--dtype", "fp32"],
        ["build", out / "onnx-dense", "-o", out / "engine-dense"],
    ]
    assert all(sdcompress(*args).returncode == 0 for args in dense)
    done = sdcompress(
        "bench", out / "engine-dense", out / "engine", "-o", out / "results.json",
        "--rounds", 2, "--steps", 2, "--budget", 0.05, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    schema = json.loads(Path("sdcompress/schemas/results.json").read_text())
    jsonschema.validate(json.loads((out / "results.json").read_text()), schema)
    jsonschema.validate(json.loads(done.stdout), schema)
    manifest = json.loads(Path("sdcompress/schemas/manifest.json").read_text())
    for bundle in ("pruned", "onnx", "engine"):
        jsonschema.validate(json.loads((out / bundle / "manifest.json").read_text()), manifest)


def test_the_shipped_schemas_are_those_of_the_code() -> None:
    from sdcompress.commands._schemas import schemas

    shipped = {f.stem: json.loads(f.read_text()) for f in Path("sdcompress/schemas").glob("*.json")}
    assert shipped == schemas(), "run `make schemas`"


def test_bad_input_is_one_line_with_the_right_code(tiny_sd: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: bad\nprune: {unet: {rules: [{sparsty: 0.5}]}}\n")
    prune = ["prune", tiny_sd, "--recipe"]
    assert "already exists" in fails(1, *prune, "sd2-magnitude-38", "-o", taken)
    assert "no recipe 'nope'" in fails(2, *prune, "nope", "-o", tmp_path / "o")
    assert "sparsty" in fails(2, *prune, bad, "-o", tmp_path / "o")
    assert "names no model" in fails(2, "plan", "sd2-2to4")
    assert "manifest.json" in fails(1, "verify", tmp_path)
    assert "expected a bundle of stage onnx" in fails(
        1, "build", _source(tiny_sd, tmp_path), "-o", tmp_path / "o"
    )
    assert "No such command" in fails(2, "prunne")
    assert "--recipe" in fails(2, "prune", tiny_sd, "-o", tmp_path / "o")
    assert "KEY=VALUE" in fails(2, "build", taken, "-o", tmp_path / "o", "--option", "x")
    assert "choose another" in fails(1, "run", "demo", "-o", _foreign(tmp_path))
    assert not (tmp_path / "o").exists()


def _source(tiny_sd: Path, tmp_path: Path) -> Path:
    out = tmp_path / "pruned"
    recipe = tmp_path / "good.yaml"
    recipe.write_text("name: good\nprune: {unet: {rules: [{sparsity: 0.5}]}}\n")
    assert sdcompress("prune", tiny_sd, "--recipe", recipe, "-o", out).returncode == 0
    return out


def _foreign(tmp_path: Path) -> Path:
    path = tmp_path / "foreign"
    path.mkdir()
    (path / "thesis.txt").write_text("x")
    return path


def test_every_command_is_in_the_readme() -> None:
    readme = Path("README.md").read_text()
    assert [n for n in cli.list_commands(None) if f"sdcompress {n}" not in readme] == []  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["model_index.json", "unet/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("place", [1, 12, -1])
def test_a_damaged_bundle_is_named_as_such(
    pruned: Bundle, tmp_path: Path, file: str, place: int
) -> None:
    """Whatever its first reader makes of it: JSON, a header, weights that are no numbers."""
    copy = tmp_path / "copy"
    shutil.copytree(pruned.path, copy)
    data = bytearray((copy / file).read_bytes())
    data[place] ^= 0x55
    (copy / file).write_bytes(data)
    said = fails(3, "export", copy, "-o", tmp_path / "onnx", "--dtype", "fp32")
    assert f"{file} is not the file the manifest describes" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_verify_names_every_check_that_failed(pruned: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pruned.path, copy)
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = sdcompress("verify", copy, "--no-parity")
    assert done.returncode == 3
    assert "files failed: " in done.stderr
    assert "; failed, too: values" in done.stderr
