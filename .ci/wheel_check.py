"""Build the wheel from the sdist, install it clean, and use it as a user would.

The environment has the `cpu` extra and nothing else: no pytest, no linters, no checkout on
the path. Every `--help` must answer there, and the demo must run.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Prints each command path that `--help` must answer for, one a line.
WALK = """
import click
from sdcompress.commands import cli

def walk(command, path, context):
    print(" ".join(path))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            walk(child, [*path, name], click.Context(child, info_name=name, parent=context))

walk(cli, [], click.Context(cli, info_name="sdcompress"))
"""


# The shipped demo with as little work in it as its schema allows.
TINY = """
import importlib.resources, sys, yaml

text = importlib.resources.files("sdcompress").joinpath("recipes/demo.yaml").read_text("utf-8")
recipe = yaml.safe_load(text)
recipe["name"] = "tiny"
recipe["sampling"] = {"steps": 2}
recipe["bench"] = {"rounds": 2, "budget": 0.05}
recipe["pictures"]["prompts"] = recipe["pictures"]["prompts"][:1]
yaml.safe_dump(recipe, open(sys.argv[1], "w", encoding="utf-8"))
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command without the checkout's environment; fail loudly."""
    clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True
    )
    if done.returncode:
        shown = " ".join(str(part) for part in command)
        sys.exit(f"wheel check: {shown}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def missing_from(wheel: Path) -> list[str]:
    """Files of the two packages that are in the checkout but not in the wheel."""
    tracked = subprocess.run(
        ["git", "ls-files", "sdcompress", "export"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return sorted(set(tracked) - set(zipfile.ZipFile(wheel).namelist()))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="sdcompress-wheel-") as name:
        work = Path(name)
        run(sys.executable, "-m", "build", "--outdir", work / "dist", ROOT)
        (wheel,) = (work / "dist").glob("*.whl")
        if missing := missing_from(wheel):
            sys.exit(f"wheel check: {wheel.name} lacks {', '.join(missing)}")
        print(f"built {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")

        run(sys.executable, "-m", "venv", work / "venv")
        python = work / "venv/bin/python"
        install = (python, "-m", "pip", "install", "--quiet", "--no-compile")
        run(*install, "-c", ROOT / "constraints.txt", f"{wheel}[cpu]")
        run(python, "-m", "pip", "check")

        sdcompress = work / "venv/bin/sdcompress"
        commands = run(python, "-c", WALK, cwd=work).splitlines()
        for command in commands:
            if "Usage:" not in run(sdcompress, *command.split(), "--help", cwd=work):
                sys.exit(f"wheel check: sdcompress {command} --help does not show its usage")
        print(f"{len(commands)} help pages answer")

        run(python, "-c", TINY, work / "tiny.yaml", cwd=work)
        run(sdcompress, "run", work / "tiny.yaml", "-o", work / "out", cwd=work)
        if not (work / "out/report.html").is_file():
            sys.exit("wheel check: the demo ended without report.html")
        print("the demo ran, in a tiny setting")
    print("wheel check passed")


if __name__ == "__main__":
    main()
