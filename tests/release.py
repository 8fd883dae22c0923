"""Starting docker/release.sh, with sdcompress itself or with a stand-in that is told what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
RELEASE = DOCKER / "release.sh"

_REAL = f"""#!/bin/sh
exec {sys.executable} -c 'from sdcompress.commands import main; main()' "$@"
"""
# Each command is one line of shell; `run` does its own in the directory it writes to.
_STUB = """#!/bin/bash
echo "$*" >> {log}
case $1 in
plan) {plan} ;;
run)
    mkdir -p "${{*: -1}}/engine/sparse" && cd "${{*: -1}}"
    echo made > engine/sparse/manifest.json
    echo name: x > recipe.yaml
    echo made with the engines > report.html
    {run} ;;
verify) {verify} ;;
gate) {gate} ;;
report) echo page > "${{*: -1}}"; {report} ;;
esac
"""


def release(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script with this PATH."""
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    return subprocess.run(
        ["/bin/bash", str(RELEASE), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def stub(directory: Path, **commands: str) -> str:
    """A PATH with a stand-in for sdcompress; its calls are written to `directory`/calls."""
    told = dict.fromkeys(("plan", "run", "verify", "gate", "report"), "echo {}") | commands
    return _on_path(directory, _STUB.format(log=directory / "calls", **told))


# What stand-ins for `run` leave: figures of the engine, or a bundle for the device; and the figures
# that a device brings back.
FIGURES = "echo measured here > results.json"
BUNDLE = "echo bundle > manifest.json; tar -cf device.tar manifest.json; rm manifest.json"
BROUGHT = "measured there"


def real(directory: Path) -> str:
    """A PATH with the sdcompress of this interpreter."""
    return _on_path(directory, _REAL)


def _on_path(directory: Path, script: str) -> str:
    command = directory / "bin" / "sdcompress"
    command.parent.mkdir(exist_ok=True)
    command.write_text(script)
    command.chmod(0o755)
    return f"{command.parent}:/usr/bin:/bin"
