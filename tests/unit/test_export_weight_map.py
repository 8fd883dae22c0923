"""Finding weights by value, laying them out, and filling them in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export import to_onnx
from export.graph_cache import Skeleton
from export.to_onnx import MODEL, Filled, fill
from export.weight_map import DATA, WEIGHT_MAP, WeightMap, lay_out, match_by_value
from sdcompress.errors import InputError
from sdcompress.safetensors_io import TensorInfo, as_tensor, read_array, read_header

LINEAR = np.arange(6, dtype=np.float16).reshape(2, 3)
SQUARE = np.arange(10, 26, dtype=np.float16).reshape(4, 4)
NORM = np.array([30, 31, 32], np.float16)
WEIGHTS = {"linear.weight": LINEAR, "square.weight": SQUARE, "norm.weight": NORM}
INITIALIZERS = {
    "val_1": LINEAR.T,
    "val_2": SQUARE,
    "val_3": SQUARE.T,
    "val_4": NORM.reshape(3, 1, 1),
    "scale": np.array([40, 41, 42], np.float16),  # a constant of the architecture
}


def weight_map() -> WeightMap:
    laid = lay_out(match_by_value(INITIALIZERS, WEIGHTS), INITIALIZERS, WEIGHTS)
    return WeightMap(component="unet", dtype="fp16", opset=18, initializers=dict(laid.values()))


def test_weights_are_found_by_value() -> None:
    assert match_by_value(INITIALIZERS, WEIGHTS) == {
        "val_1": ("linear.weight", "transpose"),
        "val_2": ("square.weight", "identity"),
        "val_3": ("square.weight", "transpose"),
        "val_4": ("norm.weight", "reshape"),
    }


def test_a_changed_value_is_not_found() -> None:
    changed = SQUARE.copy()
    changed[3, 3] = 0
    assert match_by_value({"val": changed}, WEIGHTS) == {}


def test_initializers_get_the_state_dicts_names() -> None:
    assert set(weight_map().initializers) == {
        "linear.weight_t",
        "square.weight",
        "square.weight_t",
        "norm.weight.reshaped",
    }


def test_places_do_not_overlap_and_large_tensors_start_on_a_page() -> None:
    weights = {k: np.random.default_rng(i).random(n) for i, (k, n) in enumerate(
        {"a": 3, "b": 20_000, "c": 5, "d": 20_000}.items())}  # fmt: skip
    laid = lay_out(match_by_value(weights, weights), weights, weights)
    end = 0
    for key in weights:
        entry = laid[key][1]
        assert entry.offset >= end
        assert entry.offset % (4096 if entry.nbytes > 65536 else 64) == 0
        end = entry.offset + entry.nbytes


def test_stored_and_state_dict_layout_are_inverse() -> None:
    for entry in weight_map().initializers.values():
        weight = WEIGHTS[entry.key]
        np.testing.assert_array_equal(entry.to_key(entry.from_key(weight)), weight)
        assert entry.from_key(weight).shape == entry.shape


def test_the_map_is_read_back_and_garbage_refused(tmp_path: Path) -> None:
    weight_map().write(tmp_path)
    assert WeightMap.read(tmp_path) == weight_map()
    (tmp_path / WEIGHT_MAP).write_text("{")
    with pytest.raises(InputError, match=WEIGHT_MAP):
        WeightMap.read(tmp_path)


def filled(tmp_path: Path, change: dict[str, torch.Tensor], drop: str = "") -> Filled:
    """Fill the skeleton above with an fp32 checkpoint that differs from WEIGHTS by `change`."""
    tensors = {k: torch.from_numpy(w.astype(np.float32)) for k, w in WEIGHTS.items()} | change
    tensors.pop(drop, None)
    save_file(tensors, tmp_path / "weights.safetensors")
    weights = read_header(tmp_path / "weights.safetensors").tensors
    skeleton = Skeleton(model=b"the graph", weight_map=weight_map())
    return fill(skeleton, weights, tmp_path / "unet", pruned={"linear.weight"})


def test_weights_are_streamed_to_the_places_of_the_map(tmp_path: Path) -> None:
    records = filled(tmp_path, {}).records
    assert (tmp_path / "unet" / MODEL).read_bytes() == b"the graph"
    data = np.fromfile(tmp_path / "unet" / DATA, np.uint8)
    for entry in weight_map().initializers.values():
        stored = data[entry.offset : entry.offset + entry.nbytes].view(np.float16)
        np.testing.assert_array_equal(entry.to_key(stored.reshape(entry.shape)), WEIGHTS[entry.key])
    assert records["linear.weight"].dtype == "F16"
    assert records["linear.weight"].zeros == 1  # only pruned tensors have their zeros recorded
    assert records["square.weight"].zeros is None


def test_every_tensor_is_read_once_and_the_data_hashed_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    once = to_onnx.read_finite
    monkeypatch.setattr(to_onnx, "read_finite", lambda i, b: read.append(i.name) or once(i, b))
    done = filled(tmp_path, {})
    assert sorted(read) == sorted(WEIGHTS)  # although one of them has two places
    raw = (tmp_path / "unet" / DATA).read_bytes()
    assert done.data.size == len(raw)
    assert done.data.sha256 == hashlib.sha256(raw).hexdigest()


def test_large_tensors_are_cast_a_slice_at_a_time_as_torch_casts_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(300, 500, generator=generator) * 10.0 ** -torch.arange(500).div(50)
        info = save_one(tmp_path, weight.to(dtype))
        cast, lost = to_onnx._cast(
            read_array(info), "fp16", info, np.empty(2 * weight.numel(), np.uint8)
        )
        expected = weight.to(dtype).to(torch.float16)
        assert torch.equal(as_tensor(cast), expected)
        assert lost == int(((expected == 0) & (weight.to(dtype) != 0)).sum())
        assert (lost > 0) == (dtype != torch.float16)


def save_one(tmp_path: Path, weight: torch.Tensor) -> TensorInfo:
    save_file({"weight": weight}, tmp_path / "one.safetensors")
    return read_header(tmp_path / "one.safetensors").tensors["weight"]


def test_equal_tensors_stay_apart(tmp_path: Path) -> None:
    ones = {"square.weight": torch.ones(4, 4), "linear.weight": torch.ones(2, 3)}
    filled(tmp_path, ones)
    data = np.fromfile(tmp_path / "unet" / DATA, np.uint8)
    for name, entry in weight_map().initializers.items():
        if not name.startswith("norm"):
            stored = data[entry.offset : entry.offset + entry.nbytes].view(np.float16)
            np.testing.assert_array_equal(stored, 1)


def test_weights_the_cast_makes_zero_are_counted(tmp_path: Path) -> None:
    tiny = torch.tensor([[0.0, 1e-9, 1.0], [-1e-9, 2.0, 3.0]])
    done = filled(tmp_path, {"linear.weight": tiny})
    assert done.underflow == {"linear.weight": 2}
    assert done.records["linear.weight"].zeros == 3


@pytest.mark.parametrize(
    ("change", "drop", "message"),
    [
        ({}, "norm.weight", "expected a tensor norm.weight"),
        ({"extra.weight": torch.ones(2)}, "", "hold extra.weight"),
        ({"norm.weight": torch.ones(4)}, "", r"norm.weight of shape \(3,\)"),
        ({"norm.weight": torch.tensor([1.0, 2.0, 1e5])}, "", "beyond the range of fp16"),
        ({"norm.weight": torch.tensor([1.0, 2.0, torch.nan])}, "", "NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, torch.Tensor], drop: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        filled(tmp_path, change, drop)
