"""An ONNX bundle of one-node graphs, with the names, shapes and files of a real one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdcompress.bundle import Bundle, Manifest, SourceRecord, TensorRecord, seal

HALF, INT32, INT64 = TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64
CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {"max_position_embeddings": 8, "hidden_size": 4, "vocab_size": 16},
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 4,
        "sample_size": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    },
    "vae_decoder": {
        "latent_channels": 4,
        "out_channels": 4,
        "block_out_channels": [8, 8],
        "scaling_factor": 0.5,
    },
}
Value = tuple[str, int, Sequence[Any]]
_GRAPHS: dict[str, tuple[list[Value], list[Value]]] = {
    "text_encoder": (
        [("input_ids", INT32, ("batch", 8))],
        [
            ("last_hidden_state", HALF, ("batch", 8, 4)),
            ("pooler_output", HALF, ("batch", 4)),
        ],
    ),
    "unet": (
        [
            ("sample", HALF, ("batch", 4, "height", "width")),
            ("timestep", INT64, ()),
            ("encoder_hidden_states", HALF, ("batch", "tokens", 4)),
        ],
        [("out_sample", HALF, ("batch", 4, "height", "width"))],
    ),
    "vae_decoder": (
        [("latent_sample", HALF, ("batch", 4, "height", "width"))],
        [("sample", HALF, ("batch", 4, "image_height", "image_width"))],
    ),
}


def write_graph(folder: Path, component: str, weight: float = 2.0) -> Path:
    """model.onnx, its data file and config.json; the UNet multiplies its sample by `weight`."""
    folder.mkdir(parents=True)
    inputs, outputs = _GRAPHS[component]
    raw = numpy_helper.from_array(np.full((1, 4, 1, 1), weight, np.float16), "scale")
    node = helper.make_node("Mul", [inputs[0][0], "scale"], [outputs[0][0]], name="scaled")
    graph = helper.make_graph(
        [node],
        component,
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [raw],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = folder / "model.onnx"
    onnx.save_model(
        model, str(path), save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    (folder / "config.json").write_text(json.dumps(CONFIGS[component]))
    (folder / "weight_map.json").write_text("{}")
    return path


def tiny_onnx(path: Path, weight: float = 2.0, mask: str = "aa", opset: int = 18) -> Bundle:
    """A sealed bundle; `mask` stands for where the UNet's one pruned tensor has its zeros."""
    for component in CONFIGS:
        write_graph(path / component, component, weight)
    for name in ("model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    (path / "LICENSE").write_text("as you like")
    record = TensorRecord(
        dtype="float16", shape=(1, 4, 1, 1), blake3=str(weight), zeros=2, zero_mask_blake3=mask
    )
    seal(
        path,
        Manifest(
            stage="onnx",
            parent=None,
            source=SourceRecord(id="tiny", kind="directory"),
            tools={},
            tensors={"unet": {"scale": record}},
            details={"components": sorted(CONFIGS), "dtype": "fp16", "opset": opset},
        ),
    )
    return Bundle.open(path)
