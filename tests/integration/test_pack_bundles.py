"""`pack` and `unpack` on the bundles the other commands make and read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from export.weight_map import WeightMap
from sdcompress.bundle import MANIFEST, Bundle
from sdcompress.commands import cli
from sdcompress.commands._schemas import FOLDER
from sdcompress.packing import Pack, pack, read_tensor, unpack
from sdcompress.packing.coding import GROUPS
from sdcompress.safetensors_io import raw_bytes, read_header
from sdcompress.safetensors_io import read_tensor as read_weight


def same(a: Bundle, b: Bundle) -> bool:
    names = [MANIFEST, *a.manifest.files]
    return all((a.path / n).read_bytes() == (b.path / n).read_bytes() for n in names)


@pytest.mark.parametrize("kind", ["pruned", "onnx_dense", "onnx_sparse", "engine"])
def test_every_stage_comes_back_bit_for_bit(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle: Bundle = request.getfixturevalue(kind)
    sizes = pack(bundle, tmp_path / "m.sdz")
    assert sizes.packed_bytes < sizes.original_bytes
    back = unpack(tmp_path / "m.sdz", tmp_path / "u")
    back.check_files()
    assert back.digest == bundle.digest
    assert same(bundle, back)


def test_tensors_of_weights_are_read_by_their_names(pruned: Bundle, tmp_path: Path) -> None:
    pack(pruned, tmp_path / "m.sdz")
    for name in (n for n in pruned.manifest.files if n.endswith(".safetensors")):
        for info in read_header(pruned.path / name).tensors.values():
            found = read_tensor(tmp_path / "m.sdz", name, info.name)
            assert bytes(raw_bytes(found)) == bytes(raw_bytes(read_weight(info)))


def test_tensors_of_onnx_are_read_by_their_initializers(
    onnx_sparse: Bundle, tmp_path: Path
) -> None:
    sizes = pack(onnx_sparse, tmp_path / "m.sdz")
    weights = WeightMap.read(onnx_sparse.path / "unet")
    data = (onnx_sparse.path / "unet" / "model.onnx_data").read_bytes()
    counted = {f.file: f.tensors for f in sizes.files}
    assert counted["unet/model.onnx_data"] == len(weights.initializers)
    kinds = {}
    with Pack(tmp_path / "m.sdz") as opened:
        for name, entry in weights.initializers.items():
            found = opened.read_tensor("unet/model.onnx_data", name)
            assert found.shape == entry.shape
            assert raw_bytes(found) == data[entry.offset : entry.offset + entry.nbytes]
        for file in opened.index.files:
            for part in (p for p in file.parts if p.tensor and file.name.startswith("unet/")):
                start = part.offset
                kinds[part.tensor.name] = (tmp_path / "m.sdz").read_bytes()[start]  # type: ignore[union-attr]
    # 2:4 lies along axis 0 of a transposed weight, along axis 1 of a convolution.
    records = onnx_sparse.manifest.tensors["unet"]
    pruned = [n for n, e in weights.initializers.items() if (records[e.key].zeros or 0) > 0]
    in_groups = [n for n in pruned if kinds[n] == GROUPS]
    assert {weights.initializers[n].transform for n in in_groups} >= {"identity", "transpose"}
    assert len(in_groups) == len(pruned) > 0


def _run(*arguments: str) -> Any:
    result = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    document = json.loads(result.stdout)
    schema = json.loads((FOLDER / f"{arguments[0]}.json").read_text())
    jsonschema.validate(document, schema)
    return document


def test_the_commands(pruned: Bundle, tmp_path: Path) -> None:
    packed, back = tmp_path / "m.sdz", tmp_path / "back"
    told = _run("pack", str(pruned.path), "-o", str(packed))
    assert told["digest"] == pruned.digest
    assert told["packed_bytes"] == packed.stat().st_size
    assert told["ratio"] == told["packed_bytes"] / told["original_bytes"] < 1
    assert {f["file"] for f in told["files"]} == {
        n for n in pruned.manifest.files if n.endswith(".safetensors")
    }
    assert _run("unpack", str(packed), "-o", str(back))["digest"] == pruned.digest
    assert same(pruned, Bundle.open(back))


def test_people_get_a_table(tiny_sd: Path, tmp_path: Path) -> None:
    command = ["pack", str(tiny_sd), "-o", str(tmp_path / "m.sdz")]
    shown = CliRunner().invoke(cli, command, catch_exceptions=False).stdout
    assert [w for w in ("original", "packed", "ratio", "entropy") if w not in shown] == []
    assert "unet/diffusion_pytorch_model.safetensors: " in shown
    command = ["unpack", str(tmp_path / "m.sdz"), "-o", str(tmp_path / "u")]
    shown = CliRunner().invoke(cli, command, catch_exceptions=False).stdout
    assert "of the source bundle" in shown
    assert "all digests right" in shown


def test_a_damaged_pack_ends_in_one_line(pruned: Bundle, tmp_path: Path) -> None:
    packed = tmp_path / "m.sdz"
    pack(pruned, packed)
    packed.write_bytes(packed.read_bytes()[:-1])
    main = [sys.executable, "-c", "from sdcompress.commands import main; main()"]
    command = [*main, "unpack", str(packed), "-o", str(tmp_path / "u")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "truncated or was changed" in ended.stderr
    assert os.listdir(tmp_path) == ["m.sdz"]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A bundle of 96 MB passes with far less in memory; measured apart, imports counted off."""
    rng = np.random.default_rng(0)
    (tmp_path / "b").mkdir()
    header = {
        f"w{i}": {"dtype": "F16", "shape": [1 << 23], "data_offsets": [i << 24, (i + 1) << 24]}
        for i in range(6)
    }
    with (tmp_path / "b" / "w.safetensors").open("wb") as f:
        text = json.dumps(header).encode()
        f.write(len(text).to_bytes(8, "little") + text)
        for _ in header:
            f.write(rng.standard_normal(1 << 23, np.float32).astype(np.float16).tobytes())
    script = f"""
import resource
from pathlib import Path
from sdcompress.bundle import Bundle, Manifest, SourceRecord, seal
from sdcompress.packing import pack, unpack
root = Path({str(tmp_path)!r})
source = SourceRecord(id="t", kind="directory")
seal(root / "b", Manifest(stage="pruned", parent=None, source=source, tools={{}}))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
pack(Bundle.open(root / "b"), root / "m.sdz", threads=2)
unpack(root / "m.sdz", root / "u", threads=2)
print((peak() - before) * 1024)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(ended.stdout) < 72 << 20
