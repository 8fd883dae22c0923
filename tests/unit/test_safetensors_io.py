"""Headers that lie are refused before anything is read; streams keep every byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcompress.bits import Buffers, slices_of
from sdcompress.errors import InputError
from sdcompress.safetensors_io import (
    StreamWriter,
    as_tensor,
    raw_bytes,
    read_header,
    read_rows,
    read_tensor,
)


def _write(path: Path, header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def _entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (_entry(), b"\0" * 4, None),  # truncated
        (_entry(), b"\0" * 12, None),  # trailing bytes
        (_entry(), b"\0" * 8, 2**40),  # header longer than the file
        (_entry(data_offsets=[0, 16], shape=[4]), b"\0" * 8, None),  # claims more than it has
        (_entry(shape=[3]), b"\0" * 8, None),
        (_entry(shape=[-2]), b"\0" * 8, None),
        (_entry(shape=[2.0]), b"\0" * 8, None),
        (_entry(shape="22"), b"\0" * 8, None),
        (_entry(dtype="F33"), b"\0" * 8, None),
        (_entry(data_offsets=[8, 0]), b"\0" * 8, None),
        (_entry(data_offsets=[0]), b"\0" * 8, None),
        ({"w": 3}, b"", None),
        ([], b"", None),
        ({"__metadata__": []} | _entry(), b"\0" * 8, None),
        (b"{", b"", None),
        (b"\xff\xff", b"", None),
        (b"[" * 100_000, b"", None),
        ({**_entry(), "v": _entry()["w"]}, b"\0" * 8, None),  # overlapping
    ],
)  # fmt: skip
def test_a_lying_header_is_one_clear_line(
    tmp_path: Path, header: Any, data: bytes, length: int | None
) -> None:
    path = _write(tmp_path / "w.safetensors", header, data, length)
    if header == {"__metadata__": []} | _entry():
        read_header(path)  # an empty list counts as no metadata
        return
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", range(0, 30, 3))
def test_every_truncation_is_refused(tmp_path: Path, size: int) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.float16)}, whole)
    cut = tmp_path / "cut.safetensors"
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) * size // 30])
    with pytest.raises(InputError):
        read_header(cut)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path / "no.safetensors")


def test_a_stream_keeps_types_order_metadata_and_bytes(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(4).bfloat16(),
        "full": torch.randn(2, 2, 3, 3),
        "ids": torch.arange(7),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }
    source = tmp_path / "a.safetensors"
    save_file(tensors, source, metadata={"format": "pt"})
    header = read_header(source)
    target = tmp_path / "b.safetensors"
    with StreamWriter(target, header) as writer:
        for info in header.tensors.values():
            tensor = read_tensor(info)
            assert torch.equal(tensor, tensors[info.name])
            writer.write_tensor(info, raw_bytes(tensor))
    assert target.read_bytes() == source.read_bytes()
    assert load_file(target).keys() == tensors.keys()


def test_a_stream_refuses_the_wrong_order(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, source)
    header = read_header(source)
    with (
        StreamWriter(tmp_path / "b.safetensors", header) as writer,
        pytest.raises(ValueError, match="expected"),
    ):
        writer.write_tensor(header.tensors["b"], raw_bytes(torch.ones(3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_read_one_after_the_other(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {"first": torch.zeros(3), "conv": torch.randn(7, 4, 3, 3), "vector": torch.randn(9)}
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, file)
    for name, info in read_header(file).tensors.items():
        expected = load_file(file)[name]
        picks = [range(0, 2), range(2, 3)]
        parts = [as_tensor(part).clone() for part in read_rows(info, picks, Buffers())]
        assert [part.shape for part in parts] == [expected[:2].shape, expected[2:3].shape]
        assert torch.equal(torch.cat(parts), expected[:3])
        assert list(read_rows(info, [], Buffers())) == []
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(InputError, match="it shrank while being read"):
        list(read_rows(info, list(slices_of(info.shape)), Buffers()))
