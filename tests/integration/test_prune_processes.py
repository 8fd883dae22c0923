"""Two processes that share the calibration prune as one does, and one of them writes and prints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml
from safetensors.torch import load_file

from sdcompress.bundle import Bundle
from sdcompress.prune import prune
from sdcompress.recipe import Recipe

RECIPE = {
    "name": "wanda",
    "calibration": {"count": 20, "steps": 2},
    "prune": {
        "text_encoder": {"rules": [{"criterion": "wanda", "sparsity": 0.5}]},
        "unet": {"rules": [{"criterion": "wanda", "pattern": "2:4"}]},
    },
}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_two_processes_prune_as_one(tiny_source: Bundle, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "two"
    recipe.write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-m", "sdcompress", "prune", str(tiny_source.path), "--json"]
    command += ["--recipe", str(recipe), "-o", str(out)]
    # What `accelerate launch` sets for two processes.
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    answers = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], [stderr for _, stderr in answers]
    two = Bundle.open(out)
    assert json.loads(answers[0][0])["digest"] == two.digest
    assert answers[1][0] == ""

    one = prune(tiny_source, Recipe.model_validate(RECIPE), tmp_path / "one")
    assert one.manifest.plan == two.manifest.plan
    assert one.manifest.recipe == two.manifest.recipe
    weights, differing = 0, 0
    for file in ("text_encoder/model", "unet/diffusion_pytorch_model"):
        a, b = (load_file(bundle.path / f"{file}.safetensors") for bundle in (one, two))
        weights += sum(w.numel() for w in a.values())
        differing += sum(int(((w == 0) != (b[name] == 0)).sum()) for name, w in a.items())
    assert differing < 1e-4 * weights
