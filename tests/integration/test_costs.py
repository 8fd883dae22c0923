"""What commands cost, counted: passes over the bytes, tensors at once, memory. No clock is read.

A model of some 200 MB in fp16 is small enough to test and large enough to tell its own size from
everything else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from sdcompress.bits import GROUP
from sdcompress.safetensors_io import read_header
from tests.tiny_sd import make_tiny_sd

MB = 1_000_000
COMPONENTS = ("text_encoder", "unet")
SMALL = 6 * MB  # manifests, configs, and modules that are imported late
WIDE = {"block_out_channels": (256, 640), "cross_attention_dim": 256, "layers_per_block": 2}
TEXT = {"hidden_size": 256, "intermediate_size": 1024, "projection_dim": 256}
HELD = 3  # of the largest: two of them for jobs (`bits.in_memory`), and slices of others


def held(folder: Path) -> int:
    """Bytes that jobs may hold: each a tensor, and what small ones are done together with it."""
    files = folder.glob("*/*.safetensors")
    return HELD * (max(t.nbytes for f in files for t in read_header(f).tensors.values()) + GROUP)


class Costs(NamedTuple):
    read: int
    written: int
    rise: int
    tensors: int
    tensor_bytes: int


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    path = tmp_path_factory.mktemp("mid") / "model"
    return make_tiny_sd(path, dtype=torch.float16, unet=WIDE, text_encoder=TEXT)


@pytest.fixture(scope="module")
def pruned(model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    cost(cache, "prune", model, "--recipe", recipe(folder, "uniform", "2:4"), "-o", folder / "out")
    return folder / "out"


def cost(cache: Path, *arguments: str | Path) -> Costs:
    command = [sys.executable, str(Path(__file__).with_name("costs.py")), *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SDCOMPRESS_CACHE": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    costs = Costs(**json.loads(done.stdout.splitlines()[-1]))
    print(arguments[0], costs)
    return costs


def weights(folder: Path) -> int:
    """Bytes of all that a command has to move: the files of weights below a folder."""
    kinds = ("*/*.safetensors", "*/*.onnx_data")
    return sum(f.stat().st_size for kind in kinds for f in folder.glob(kind))


def recipe(folder: Path, allocation: str, pattern: str) -> Path:
    rule = {"pattern": pattern} | ({"sparsity": 0.5} if pattern == "unstructured" else {})
    section = {"allocation": allocation, "rules": [rule]}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"name": "costs", "prune": dict.fromkeys(COMPONENTS, section)}))
    return file


@pytest.mark.parametrize(
    ("allocation", "pattern", "passes"),
    [
        ("uniform", "unstructured", 2),  # the source's digest, and the weights
        ("uniform", "2:4", 2),
        ("global", "unstructured", 3),  # and once for one threshold
    ],
)
def test_pruning_reads_each_byte_so_often_and_writes_it_once(
    model: Path, cache: Path, tmp_path: Path, allocation: str, pattern: str, passes: int
) -> None:
    by, size = recipe(tmp_path, allocation, pattern), weights(model)
    costs = cost(cache, "prune", model, "--recipe", by, "-o", tmp_path / "pruned")
    assert costs.read < passes * size + SMALL
    assert costs.written < size + SMALL
    assert costs.tensor_bytes <= held(model)
    assert costs.rise < size / 2  # measured: three tenths; the tensors held are a fifth


def test_a_plan_reads_headers_only(model: Path, cache: Path, tmp_path: Path) -> None:
    costs = cost(cache, "plan", recipe(tmp_path, "global", "unstructured"), "--model", model)
    assert costs.read < SMALL
    assert costs.tensors == 0


def test_proof_reads_each_byte_twice(pruned: Path, cache: Path) -> None:
    """For the digests of files, and for those of tensors with all that is said of their zeros."""
    costs = cost(cache, "verify", pruned)
    assert costs.read < 2 * weights(pruned) + SMALL
    assert costs.tensor_bytes <= held(pruned)
    assert costs.rise < weights(pruned) / 2


def test_packing_and_unpacking_pass_over_each_byte_once(
    pruned: Path, cache: Path, tmp_path: Path
) -> None:
    file, size = tmp_path / "pruned.sdz", weights(pruned)
    costs = cost(cache, "pack", pruned, "-o", file)
    assert costs.read < size + SMALL
    assert costs.written < file.stat().st_size + SMALL
    assert costs.rise < size / 4
    costs = cost(cache, "unpack", file, "-o", tmp_path / "unpacked")
    assert costs.read < file.stat().st_size + SMALL
    assert costs.written < size + SMALL
    assert costs.rise < size / 4


def test_a_known_graph_is_filled_in_one_pass(pruned: Path, cache: Path, tmp_path: Path) -> None:
    """The parent's digests and its weights; then the proof of what was written."""
    cost(cache, "export", pruned, "-o", tmp_path / "cold")
    size, onnx = weights(pruned), tmp_path / "onnx"
    costs = cost(cache, "export", pruned, "-o", onnx)
    assert costs.read < 2 * size + SMALL
    assert costs.written < weights(onnx) + SMALL
    assert costs.tensor_bytes <= held(pruned)
    assert costs.rise < size / 2
    costs = cost(cache, "verify", onnx, "--against", pruned, "--no-parity")
    assert costs.read < 2 * weights(onnx) + 2 * size + SMALL
    assert costs.tensor_bytes <= held(pruned)
    assert costs.rise < size / 2
