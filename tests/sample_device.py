"""A device bundle small enough to be built and run in no time: each component doubles a vector."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

COMPONENTS = {"text_encoder": 1, "unet": 3, "vae_decoder": 1}
TARGET: dict[str, Any] = {
    "name": "jetson-orin-nano",
    "title": "Jetson Orin Nano 8 GB",
    "platform": "jetson",
    "compute_capability": "8.7",
    "shared_memory": True,
    "backends": ["tensorrt"],
    "tensorrt_min": "10.3",
    "tensorrt_max": None,
    "jetpack": "6.1",
    "workspace_mb": 64,
    "residency": "resident",
}
SUBJECT: dict[str, Any] = {
    "model": "sample",
    "recipe": "two-to-four",
    "dtype": "fp16",
    "steps": 3,
    "guidance": 7.5,
    "height": 16,
    "width": 16,
    "pruned_layers": 4,
    "sparsity": None,
}


def make_sample(root: Path, *, target: dict[str, Any] | None = None) -> Path:
    """Write an unpacked bundle; the sparse twin of `unet` differs, the others are the same."""
    components: dict[str, Any] = {}
    for name, calls in COMPONENTS.items():
        given = _values(root, f"golden/inputs/{name}/x.bin", [1.0, -2.0, 0.5])
        twins = {}
        for twin in ("dense", "sparse"):
            if twin == "sparse" and name != "unet":
                twins[twin] = twins["dense"]
                continue
            folder = root / "onnx" / twin / name
            _write_model(folder, extra=twin == "sparse")
            expected = [2.0, -4.0, 1.0]
            twins[twin] = {
                "onnx": f"onnx/{twin}/{name}/model.onnx",
                "weights": 1000,
                "outputs": [_values(root, f"golden/{twin}/{name}/y.bin", expected) | {"name": "y"}],
            }
        components[name] = {"calls": calls, "inputs": [given], "twins": twins}
    manifest = {
        "kind": "sdcompress device bundle",
        "version": 1,
        "subject": SUBJECT,
        "target": {**TARGET, **(target or {})},
        "tolerance": 0.02,
        "order": list(COMPONENTS),
        "components": components,
        "files": {},
    }
    write_manifest(root, manifest)
    return root


def write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    """Write it with the digests of all files that are there now."""
    files = {f for f in root.rglob("*") if f.is_file()} - {root / "manifest.json"}
    manifest["files"] = {
        f.relative_to(root).as_posix(): {
            "size": f.stat().st_size,
            "sha256": hashlib.sha256(f.read_bytes()).hexdigest(),
        }
        for f in files
    }
    (root / "manifest.json").write_text(json.dumps(manifest))


def _values(root: Path, name: str, values: list[float]) -> dict[str, Any]:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(np.array(values, "<f2").tobytes())
    return {"name": "x", "dtype": "float16", "shape": [1, 3], "file": name}


def _write_model(folder: Path, *, extra: bool) -> None:
    import onnx

    half, free = onnx.TensorProto.FLOAT16, ["batch", 3]
    nodes = [onnx.helper.make_node("Add", ["x", "x"], ["z" if extra else "y"])]
    if extra:
        nodes.append(onnx.helper.make_node("Identity", ["z"], ["y"]))
    graph = onnx.helper.make_graph(
        nodes,
        "double",
        [onnx.helper.make_tensor_value_info("x", half, free)],
        [onnx.helper.make_tensor_value_info("y", half, free)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 10
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
