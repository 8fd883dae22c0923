"""A pack gives its bundle back bit for bit, or nothing at all."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdcompress.bundle import MANIFEST, Bundle, FileRecord, Manifest, SourceRecord, seal
from sdcompress.errors import InputError, SdcompressError, VerificationError
from sdcompress.packing import Pack, pack, read_tensor, unpack
from sdcompress.packing.coding import GROUPS, encode_numbers, encode_plain
from sdcompress.packing.index import HEADER, MAX_VALUES, TRAILER, _digest, check_names
from sdcompress.safetensors_io import raw_bytes

UNET = "unet/diffusion_pytorch_model.safetensors"


def _two_of_four(*shape: int) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()
    smallest = weight.abs().reshape(shape[0], -1, 4, *shape[2:]).argsort(2)[:, :, :2]
    return weight.reshape(shape[0], -1, 4, *shape[2:]).scatter(2, smallest, 0.0).reshape(shape)


TENSORS = {
    "linear.weight": _two_of_four(64, 64),
    "conv.weight": _two_of_four(32, 16, 3, 3),
    "unstructured": torch.nn.functional.dropout(torch.ones(4000), 0.4).half(),
    "signs": torch.tensor([0.0, -0.0] * 50, dtype=torch.float16),
    "single": torch.randn(33, 7, generator=torch.Generator().manual_seed(2)),
    "brain": torch.randn(100, generator=torch.Generator().manual_seed(3)).bfloat16(),
    "zeros": torch.zeros(5000),
    "position_ids": torch.arange(77),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 5),
}


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(raw_bytes(tensor))


def _bundle(folder: Path, stage: Any = "pruned") -> Bundle:
    seal(
        folder,
        Manifest(stage=stage, parent=None, source=SourceRecord(id="t", kind="directory"), tools={}),
    )
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles") / "pruned"
    (folder / "unet").mkdir(parents=True)
    save_file(TENSORS, folder / UNET, metadata={"format": "pt"})
    (folder / "unet" / "config.json").write_text('{"in_channels": 4}')
    (folder / "model_index.json").write_text("{}")
    (folder / "LICENSE").write_bytes(b"")
    (folder / "log.json").write_text("times are no part of a bundle")
    return _bundle(folder)


@pytest.fixture(scope="module")
def packed(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packs") / "model.sdz"
    pack(bundle, target)
    return target


def _files(folder: Path) -> dict[str, bytes]:
    return {
        f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()
    }


def test_unpacking_gives_every_byte_back(bundle: Bundle, packed: Path, tmp_path: Path) -> None:
    back = unpack(packed, tmp_path / "back")
    expected = _files(bundle.path)
    del expected["log.json"]
    assert _files(back.path) == expected
    assert back.digest == bundle.digest
    back.check_files()


def test_sizes_are_those_of_the_files(bundle: Bundle, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    sizes = pack(bundle, tmp_path / "m.sdz", progress=lambda *step: told.append(step))
    assert sizes.packed_bytes == (tmp_path / "m.sdz").stat().st_size
    files = _files(bundle.path)
    del files["log.json"]
    assert sizes.original_bytes == sum(map(len, files.values()))
    assert sum(n for _, n in told) == sizes.original_bytes - len(files[MANIFEST])
    (unet,) = sizes.files
    assert (unet.file, unet.tensors) == (UNET, len(TENSORS))
    assert unet.original_bytes == sum(t.nbytes for t in TENSORS.values())
    assert unet.entropy_bytes < unet.packed_bytes < unet.original_bytes


def test_the_same_bundle_gives_the_same_bytes_with_any_number_of_threads(
    bundle: Bundle, packed: Path, tmp_path: Path
) -> None:
    pack(bundle, tmp_path / "one.sdz", threads=1)
    pack(bundle, tmp_path / "five.sdz", threads=5)
    assert (tmp_path / "one.sdz").read_bytes() == packed.read_bytes()
    assert (tmp_path / "five.sdz").read_bytes() == packed.read_bytes()
    assert _files(unpack(packed, tmp_path / "a", threads=1).path) == _files(
        unpack(packed, tmp_path / "b", threads=5).path
    )


def test_one_tensor_can_be_read_alone(packed: Path) -> None:
    for name, tensor in TENSORS.items():
        found = read_tensor(packed, UNET, name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert _raw(found) == _raw(tensor)
    with pytest.raises(InputError, match=f"those with tensors are {UNET}"):
        read_tensor(packed, "unet/no", "linear.weight")
    with pytest.raises(InputError, match=r"holds no tensor linear\.bias"):
        read_tensor(packed, UNET, "linear.bias")


def test_reading_a_tensor_reads_no_other(packed: Path, tmp_path: Path) -> None:
    with Pack(packed) as opened:
        parts = {p.tensor.name: p for f in opened.index.files for p in f.parts if p.tensor}
    broken = bytearray(packed.read_bytes())
    for name, part in parts.items():
        if name != "conv.weight" and part.stored:
            broken[part.offset : part.offset + sum(part.stored)] = bytes(sum(part.stored))
    (tmp_path / "broken.sdz").write_bytes(broken)
    found = read_tensor(tmp_path / "broken.sdz", UNET, "conv.weight")
    assert torch.equal(found, TENSORS["conv.weight"])
    with pytest.raises(InputError, match="truncated or was changed"):
        read_tensor(tmp_path / "broken.sdz", UNET, "linear.weight")


def test_two_of_four_is_found_along_in_and_channels(packed: Path) -> None:
    data = packed.read_bytes()
    with Pack(packed) as opened:
        parts = {p.tensor.name: p for f in opened.index.files for p in f.parts if p.tensor}
    heads = {name: data[part.offset : part.offset + 6] for name, part in parts.items()}
    assert heads["linear.weight"] == bytes([GROUPS, 2, 1, 0, 0, 0])
    assert heads["conv.weight"] == bytes([GROUPS, 2, 9, 0, 0, 0])
    assert heads["unstructured"][0] != GROUPS


def test_tensors_of_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdcompress.packing.writer.CHUNK", 1000)
    (tmp_path / "b").mkdir()
    tensors = {**TENSORS, "tall": _two_of_four(64, 64).T.contiguous()}
    save_file(tensors, tmp_path / "b" / "w.safetensors")
    bundle = _bundle(tmp_path / "b")
    pack(bundle, tmp_path / "m.sdz")
    assert _files(unpack(tmp_path / "m.sdz", tmp_path / "u").path) == _files(bundle.path)
    for name in ("linear.weight", "tall"):
        assert torch.equal(read_tensor(tmp_path / "m.sdz", "w.safetensors", name), tensors[name])
    with Pack(tmp_path / "m.sdz") as opened:
        steps = {p.tensor.name: p.step for f in opened.index.files for p in f.parts if p.tensor}
    # Multiples of a group along either axis: 4 × 64 × 2 bytes; 4 × 16 × 9 × 2 bytes are above 1000.
    assert steps["linear.weight"] == 512
    assert steps["conv.weight"] == 1152
    assert steps["unstructured"] == 1000


def _onnx(folder: Path, data: bytes, initializers: dict[str, Any], dtype: str = "fp16") -> Bundle:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "model.onnx").write_bytes(b"\x08\x0a" * 100)
    (folder / "unet" / "model.onnx_data").write_bytes(data)
    weights = {"component": "unet", "dtype": dtype, "opset": 18, "initializers": initializers}
    (folder / "unet" / "weight_map.json").write_text(json.dumps(weights))
    return _bundle(folder, "onnx")


def _initializer(offset: Any, nbytes: int, *shape: int) -> dict[str, Any]:
    return {"key": "k", "offset": offset, "nbytes": nbytes, "shape": shape}


def test_external_data_is_cut_by_the_weight_map_and_padding_kept(tmp_path: Path) -> None:
    transposed = _two_of_four(32, 64).T.contiguous()  # [in, out]: groups along axis 0
    data = b"".join([b"\xaa" * 64, _raw(TENSORS["signs"]), b"\xbb" * 56, _raw(transposed), b"end"])
    initializers = {"t": _initializer(320, 4096, 64, 32), "s": _initializer(64, 200, 100)}
    bundle = _onnx(tmp_path / "o", data, initializers)
    sizes = pack(bundle, tmp_path / "m.sdz")
    assert sizes.files[0].tensors == 2
    assert _files(unpack(tmp_path / "m.sdz", tmp_path / "u").path) == _files(bundle.path)
    found = read_tensor(tmp_path / "m.sdz", "unet/model.onnx_data", "t")
    assert torch.equal(found, transposed)


@pytest.mark.parametrize(
    "initializers",
    [
        {"a": _initializer(0, 8, 4), "b": _initializer(4, 8, 4)},  # overlapping
        {"a": _initializer(0, 80, 40)},  # longer than the file
        {"a": _initializer(-2, 8, 4)},
        {"a": _initializer(0, 8, 3)},
        {"a": _initializer(float("inf"), 8, 4)},
        {"a": _initializer(0, 0, 0, *[2] * 20)},
        {"a": {}},
        {"a": None},
        {"\ud800": _initializer(0, 8, 4)},
        [],
    ],
    ids=range(10),
)
def test_a_weight_map_that_lies_costs_space_but_no_byte(tmp_path: Path, initializers: Any) -> None:
    bundle = _onnx(tmp_path / "o", bytes(range(20)), initializers)
    assert pack(bundle, tmp_path / "m.sdz").files == []
    assert _files(unpack(tmp_path / "m.sdz", tmp_path / "u").path) == _files(bundle.path)


def test_files_that_are_not_what_their_name_says(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "w.safetensors").write_bytes(b"\xff" * 9)
    (tmp_path / "b" / "x.safetensors").write_bytes(b"")
    (tmp_path / "b" / "engine.plan").write_bytes(np.random.default_rng(0).bytes(5_000_001))
    bundle = _bundle(tmp_path / "b", "engine")
    pack(bundle, tmp_path / "m.sdz")
    assert _files(unpack(tmp_path / "m.sdz", tmp_path / "u").path) == _files(bundle.path)


def test_files_without_a_byte(tmp_path: Path) -> None:
    (tmp_path / "b" / "unet").mkdir(parents=True)
    (tmp_path / "b" / "unet" / "empty").touch()
    bundle = _bundle(tmp_path / "b")
    pack(bundle, tmp_path / "m.sdz")
    assert _files(unpack(tmp_path / "m.sdz", tmp_path / "u").path) == _files(bundle.path)


def test_a_model_that_is_no_bundle_becomes_one(tiny_source: Bundle, tmp_path: Path) -> None:
    pack(tiny_source, tmp_path / "m.sdz")
    back = unpack(tmp_path / "m.sdz", tmp_path / "u")
    assert back.digest == tiny_source.digest
    assert back.manifest == tiny_source.manifest
    for name in tiny_source.manifest.files:
        assert (back.path / name).read_bytes() == (tiny_source.path / name).read_bytes()


# Nothing half-written


def _copy(bundle: Bundle, target: Path) -> Bundle:
    shutil.copytree(bundle.path, target)
    return Bundle.open(target)


@pytest.mark.parametrize("change", ["flip", "cut", "remove", "add"])
def test_a_bundle_that_was_changed_is_not_packed(
    bundle: Bundle, tmp_path: Path, change: str
) -> None:
    copy = _copy(bundle, tmp_path / "copy")
    weights = copy.path / UNET
    data = bytearray(weights.read_bytes())
    if change == "remove":
        weights.unlink()
    elif change == "add":
        weights.with_suffix(".txt").write_text("of no manifest")
    elif change == "cut":
        weights.write_bytes(data[:-1])
    else:
        data[-1] ^= 1
        weights.write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(VerificationError, match=UNET.removesuffix(".safetensors")):
        pack(copy, tmp_path / "out" / "m.sdz")
    assert list((tmp_path / "out").iterdir()) == []


def test_existing_results_are_left_alone(bundle: Bundle, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "m.sdz").write_text("mine")
    with pytest.raises(InputError, match=r"m\.sdz: already exists"):
        pack(bundle, tmp_path / "m.sdz")
    (tmp_path / "dir").mkdir()
    with pytest.raises(InputError, match="dir: already exists"):
        unpack(packed, tmp_path / "dir")
    assert (tmp_path / "m.sdz").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "m.sdz"]


def test_what_a_killed_pack_left_is_no_hindrance(
    bundle: Bundle, packed: Path, tmp_path: Path
) -> None:
    (tmp_path / ".m.sdz.partial").write_bytes(b"left behind" * 99_999)
    pack(bundle, tmp_path / "m.sdz")
    assert (tmp_path / "m.sdz").read_bytes() == packed.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["m.sdz"]


def test_two_do_not_write_the_same_file(bundle: Bundle, tmp_path: Path) -> None:
    def second(*_: object) -> None:
        with pytest.raises(InputError, match="another process"):
            pack(bundle, tmp_path / "m.sdz")

    pack(bundle, tmp_path / "m.sdz", progress=second)
    assert [p.name for p in tmp_path.iterdir()] == ["m.sdz"]


def test_a_full_disk_is_said_before_anything_is_written(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="1000 are free"):
        unpack(packed, tmp_path / "u")
    assert list(tmp_path.iterdir()) == []


# Packs from somebody else


@pytest.mark.parametrize(
    "name",
    [
        *(
            "/etc/passwd",
            "../up",
            "a/../../up",
            "a//b",
            "a/",
            "",
            ".",
            "./a",
            ".hidden",
            "a/.git/x",
        ),
        *("a\\b", "a\nb", "a\0b", "\u202egpj", "n" * 256, "n/" * 600 + "n", "é" * 200),
    ],
    ids=ascii,
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="refused") as caught:
        check_names(["ok", name], Path("p"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names", [("a", "a"), ("A/b", "a/B"), ("a", "a/b"), ("a/b/c", "A"), ("\u00e9", "e\u0301")]
)
def test_names_that_fall_together_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="there twice|a file and a directory"):
        check_names(names, Path("p"))


def test_names_of_real_bundles_are_fine() -> None:
    check_names(["README.md", "unet/config.json", "unet/a-00001-of-00002.safetensors"], Path("p"))


def _index(packed: bytes) -> tuple[bytes, dict[str, Any]]:
    """The chunks, and the index as JSON."""
    length = TRAILER.unpack(packed[-TRAILER.size :])[0]
    start = len(packed) - TRAILER.size - length
    raw = zstandard.ZstdDecompressor().decompress(packed[start : -TRAILER.size])
    return packed[:start], json.loads(raw)


def _sealed(chunks: bytes, index: Any) -> bytes:
    raw = json.dumps(index).encode()
    stored = zstandard.ZstdCompressor().compress(raw)
    digest = _digest(chunks[: HEADER.size], stored, len(raw))
    return chunks + stored + TRAILER.pack(len(stored), len(raw), digest, chunks[:8])


def _refuse(
    data: bytes, folder: Path, match: str | None = None, *, kind: Any = SdcompressError
) -> None:
    """Unpacking fails with one of our errors, in one line, and leaves nothing."""
    folder.mkdir(exist_ok=True)
    (folder / "m.sdz").write_bytes(data)
    with pytest.raises(kind, match=match) as caught:
        unpack(folder / "m.sdz", folder / "dir")
    assert "\n" not in str(caught.value)
    assert [p.name for p in folder.iterdir()] == ["m.sdz"]


def test_an_index_that_is_sealed_again_is_read(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "m.sdz").write_bytes(_sealed(*_index(packed.read_bytes())))
    assert unpack(tmp_path / "m.sdz", tmp_path / "dir").manifest.stage == "pruned"


def _edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(index: dict[str, Any]) -> None:
        *parents, last = [int(k) if k.isdigit() else k for k in path.split(".")]
        node: Any = index
        for key in parents:
            node = node[key]
        node[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (_edit("files.1.name", "../../evil"), "no plain relative path"),
        (_edit("files.1.name", "/evil"), "no plain relative path"),
        (_edit("files.1.name", "extra"), "not those its manifest names"),
        (_edit("files.0.name", "first"), "expected manifest.json as its first file"),
        (_edit("files", []), "expected manifest.json as its first file"),
        (_edit("files.0.parts.0.size", 1 << 40), "not where they should be"),
        (_edit("files.0.parts.0.step", 1 << 40), "not valid"),
        (_edit("files.0.parts.0.size", 1 << 70), "not valid"),
        (_edit("files.0.parts.0.size", -1), "not valid"),
        (_edit("files.0.parts.0.offset", 0), "not where they should be"),
        (_edit("files.0.parts.0.stored", [0]), "claim to be"),
        (_edit("files.0.parts.0.stored", []), "not where they should be"),
        (_edit("files.0.parts", []), "not where they should be"),
        (_edit("bundle", "0" * 64), "manifest.json is not what was packed"),
        (_edit("bundle", "../" * 21 + "x"), "not valid"),
        (_edit("more", 1), "not valid"),
    ],
)
def test_an_index_that_lies_is_refused(
    packed: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], None], match: str
) -> None:
    chunks, index = _index(packed.read_bytes())
    edit(index)
    _refuse(_sealed(chunks, index), tmp_path, match)


def test_claims_of_tensors_are_checked(packed: Path, tmp_path: Path) -> None:
    chunks, index = _index(packed.read_bytes())
    at = next(i for i, f in enumerate(index["files"]) if f["name"] == UNET)
    tensors = [p for p in index["files"][at]["parts"] if p.get("tensor")]
    tensors[0]["tensor"]["shape"] = [1 << 40]
    _refuse(_sealed(chunks, index), tmp_path / "a", "not of the size it claims")
    tensors[0]["tensor"] = tensors[1]["tensor"]
    _refuse(_sealed(chunks, index), tmp_path / "b", "a tensor of .* is there twice")


def _pack_of(files: dict[str, tuple[bytes, int]], manifest: dict[str, FileRecord]) -> bytes:
    """A pack put together by hand: name → its one chunk and the bytes it claims to be."""
    record = Manifest(
        stage="pruned",
        parent=None,
        source=SourceRecord(id="t", kind="directory"),
        tools={},
        files=manifest,
    )
    raw = record.model_dump_json().encode()
    chunks, entries = HEADER.pack(b"\x89SDZ\r\n\x1a\n", 1), []
    for name, (payload, size) in {MANIFEST: (encode_plain(raw).payload, len(raw)), **files}.items():
        part = {"size": size, "step": 8 << 20, "offset": len(chunks), "stored": [len(payload)]}
        entries.append({"name": name, "parts": [part]})
        chunks += payload
    return _sealed(chunks, {"bundle": hashlib.sha256(raw).hexdigest(), "files": entries})


def test_a_small_pack_cannot_claim_a_large_bundle(tmp_path: Path) -> None:
    bomb = encode_plain(b"").payload + zstandard.ZstdCompressor().compress(bytes(8 << 20))
    record = {"w": FileRecord(size=8 << 20, sha256="0" * 64)}
    _refuse(_pack_of({"w": (bomb, 8 << 20)}, record), tmp_path, "claim to be 8388608")


def test_a_file_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    files = {"w": (encode_plain(b"evil").payload, 4)}
    record = {"w": FileRecord(size=4, sha256="0" * 64)}
    _refuse(_pack_of(files, record), tmp_path / "a", "w is not what", kind=VerificationError)
    record = {"w": FileRecord(size=5, sha256="0" * 64)}
    _refuse(_pack_of(files, record), tmp_path / "b", "not those its manifest names")
    _refuse(_pack_of(files, {}), tmp_path / "c", "not those its manifest names")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "expected a file made by"),
        (b"PK\x03\x04" * 99, "expected a file made by"),
        (HEADER.pack(b"\x89SDZ\r\n\x1a\n", 2) + b"x" * 99, "version 1, found 2"),
        (HEADER.pack(b"\x89SDZ\r\n\x1a\n", 1), "none"),
    ],
)
def test_what_is_no_pack_is_said(tmp_path: Path, data: bytes, match: str) -> None:
    _refuse(data, tmp_path, match, kind=InputError)


def test_an_index_bomb_is_not_unfolded(tmp_path: Path) -> None:
    head = HEADER.pack(b"\x89SDZ\r\n\x1a\n", 1)
    stored = zstandard.ZstdCompressor().compress(b" " * (1 << 26))
    for claimed, match in ((1 << 26, "its index claims"), (1000, "not of the size it claims")):
        digest = _digest(head, stored, claimed)
        data = head + stored + TRAILER.pack(len(stored), claimed, digest, head[:8])
        _refuse(data, tmp_path, match, kind=InputError)


@pytest.mark.parametrize("value", ["{}", "[]", "0", '""', '{"parts":[]}'])
def test_a_short_index_cannot_claim_millions_of_objects(value: str, tmp_path: Path) -> None:
    head = HEADER.pack(b"\x89SDZ\r\n\x1a\n", 1)
    noise = np.random.default_rng(0).bytes(5000).hex()  # or the index were denser than one may be
    raw = f'{{"bundle":"{noise}","files":[{f"{value}," * MAX_VALUES}0]}}'.encode()
    stored = zstandard.ZstdCompressor().compress(raw)
    digest = _digest(head, stored, len(raw))
    data = head + stored + TRAILER.pack(len(stored), len(raw), digest, head[:8])
    tracemalloc.start()
    try:
        _refuse(data, tmp_path, "its index holds more than 262144 values", kind=InputError)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(raw)
    finally:
        tracemalloc.stop()


def test_a_manifest_of_millions_of_objects_is_not_read(tmp_path: Path) -> None:
    raw = b'{"files":{' + b'"a":{},' * MAX_VALUES + b'"b":{}}}'
    payload = encode_plain(raw).payload
    chunks = HEADER.pack(b"\x89SDZ\r\n\x1a\n", 1)
    part = {"size": len(raw), "step": 8 << 20, "offset": len(chunks), "stored": [len(payload)]}
    files = [{"name": MANIFEST, "parts": [part]}]
    index = {"bundle": hashlib.sha256(raw).hexdigest(), "files": files}
    _refuse(_sealed(chunks + payload, index), tmp_path, "manifest holds more than 262144 values")


def test_what_no_reader_takes_is_not_packed(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcompress.packing.index.MAX_VALUES", 90)
    with pytest.raises(InputError, match="more than any reader takes"):
        pack(bundle, tmp_path / "m.sdz")
    monkeypatch.setattr("sdcompress.packing.index.MAX_VALUES", 9)
    with pytest.raises(InputError, match="its manifest takes .* more than a pack may hold"):
        pack(bundle, tmp_path / "m.sdz")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_pack_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        unpack(tmp_path / "no.sdz", tmp_path / "u")


fuzzed = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _unpack_or_refuse(data: bytes, folder: Path, expected: dict[str, bytes]) -> None:
    """Either one of our errors and nothing left, or every byte as it was."""
    file, target = folder / "m.sdz", folder / "dir"
    file.write_bytes(data)
    with suppress(InputError, VerificationError):
        assert _files(unpack(file, target).path) == expected
        shutil.rmtree(target)
    assert os.listdir(folder) == ["m.sdz"]


@pytest.fixture
def original(bundle: Bundle) -> dict[str, bytes]:
    files = _files(bundle.path)
    del files["log.json"]
    return files


@fuzzed
@given(flips=st.lists(st.tuples(st.integers(0), st.integers(0, 7)), min_size=1, max_size=8))
def test_flipped_bits(
    packed: Path, original: dict[str, bytes], tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(packed.read_bytes())
    for place, bit in flips:
        data[place % len(data)] ^= 1 << bit
    _unpack_or_refuse(bytes(data), tmp_path, original)


@fuzzed
@given(cut=st.integers(0), junk=st.binary(max_size=99))
def test_cut_and_lengthened_packs(packed: Path, tmp_path: Path, cut: int, junk: bytes) -> None:
    data = packed.read_bytes()
    short = data[: cut % len(data)] + junk
    if short != data:
        _refuse(short, tmp_path)


_values = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(-(1 << 65), 1 << 65),
    st.integers(0, 10_000),
    st.text(max_size=20),
    st.sampled_from(["../x", "/x", "a/b", MANIFEST, "F64", "U8", "F16"]),
    st.lists(st.integers(0, 9999), max_size=3),
    st.just({}),
)


def _nodes(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [pair for key in keys for pair in ((node, key), *_nodes(node[key]))]


@settings(fuzzed, max_examples=300)
@given(data=st.data())
def test_edited_indexes(
    packed: Path, original: dict[str, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    chunks, index = _index(packed.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        if nodes := _nodes(index):
            container, key = data.draw(st.sampled_from(range(len(nodes))).map(nodes.__getitem__))
            action = data.draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
            if action == "replace":
                container[key] = data.draw(_values)
            elif action == "remove":
                del container[key]
            elif isinstance(container, list):
                container.insert(key, container[key])
    _unpack_or_refuse(_sealed(chunks, index), tmp_path, original)


def _put(chunks: bytes, index: dict[str, Any], at: tuple[int, int], payload: bytes) -> bytes:
    """The pack with another first chunk in one part, every offset and length right again."""
    file, part = at
    target = index["files"][file]["parts"][part]
    begin, old = target["offset"], target["stored"][0]
    target["stored"][0] = len(payload)
    for other in (p for f in index["files"] for p in f["parts"] if p["offset"] > begin):
        other["offset"] += len(payload) - old
    return _sealed(chunks[:begin] + payload + chunks[begin + old :], index)


@fuzzed
@given(data=st.data())
def test_chunks_that_are_well_packed_and_not_the_bundles(
    packed: Path, original: dict[str, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    """The index is right about them: only what they say and unfold to finds them out."""
    chunks, index = _index(packed.read_bytes())
    places = [
        (i, j)
        for i, file in enumerate(index["files"])
        for j, part in enumerate(file["parts"])
        if part["stored"]
    ]
    at = data.draw(st.sampled_from(places))
    part = index["files"][at[0]]["parts"][at[1]]
    old = chunks[part["offset"] : part["offset"] + part["stored"][0]]
    size = min(part["size"], part["step"])
    kind = data.draw(st.sampled_from(["numbers", "plain", "spliced", "edited", "junk"]))
    if kind in ("numbers", "plain"):
        raw = data.draw(st.binary(min_size=1, max_size=16))
        raw = (raw * size)[:size]
        width = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if size % w == 0]))
        new = encode_plain(raw) if kind == "plain" else encode_numbers(raw, width)
        payload = new.payload
    elif kind == "spliced":
        other = index["files"][(at2 := data.draw(st.sampled_from(places)))[0]]["parts"][at2[1]]
        payload = chunks[other["offset"] : other["offset"] + other["stored"][0]]
    elif kind == "edited":
        edited = bytearray(old)
        for _ in range(data.draw(st.integers(1, 3))):  # kinds and lengths come first
            edited[data.draw(st.integers(0, min(len(edited), 24) - 1))] = data.draw(
                st.integers(0, 255)
            )
        payload = bytes(edited)
    else:
        payload = data.draw(st.binary(min_size=1, max_size=99))
    _unpack_or_refuse(_put(chunks, index, at, payload), tmp_path, original)


def test_smaller_than_general_compressors(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).half()
    smallest = weight.abs().flatten().argsort()[: int(0.385 * weight.numel())]
    unstructured = weight.flatten().index_fill(0, smallest, 0.0).reshape(weight.shape)
    for name, tensor in (
        ("dense", weight),
        ("paper", unstructured),
        ("two_of_four", _two_of_four(512, 1024)),
    ):
        save_file({"weight": tensor}, tmp_path / "b" / f"{name}.safetensors")
    sizes = pack(_bundle(tmp_path / "b"), tmp_path / "m.sdz")
    assert [f.tensors for f in sizes.files] == [1, 1, 1]
    for found in sizes.files:
        data = (tmp_path / "b" / found.file).read_bytes()
        ours = found.packed_bytes + 1000  # the header and all of the index
        assert ours < len(zstandard.ZstdCompressor(level=19).compress(data))
        assert ours < len(lzma.compress(data, preset=6))
