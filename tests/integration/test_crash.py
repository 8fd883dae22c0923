"""A stage that is killed, or runs out of disk, leaves nothing half-written and can run again."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("stage", "kills"), [("prune", 20), ("export", 6)])
def test_sigkill_at_seeded_moments(stage: str, kills: int, tiny_sd: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.killed", stage, tiny_sd, tmp_path, kills]
    done = subprocess.run([str(a) for a in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["died"] == kills


@pytest.mark.parametrize(
    ("stage", "limit"),
    [
        *(("prune", limit) for limit in (0, 1_000, 30_000, 200_000, 1_500_000)),
        *(("export", limit) for limit in (20_000, 1_500_000)),
    ],
)
def test_a_full_disk_is_one_clear_line(
    stage: str, limit: int, tiny_sd: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = {
        "prune": ["prune", str(tiny_sd), "--recipe", "sd2-magnitude-38"],
        "export": ["export", str(tiny_sd), "--dtype", "fp32"],
    }[stage]
    command = [sys.executable, "-c", "from sdcompress.commands import main; main()", *args]
    done = subprocess.run(
        [*command, "-o", str(out)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert "File too large" in lines[0]
    assert list(tmp_path.iterdir()) == []
