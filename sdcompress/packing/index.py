"""What a pack says about itself, and what of it is believed."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated

import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdcompress.bundle import MANIFEST, PACK
from sdcompress.errors import InputError
from sdcompress.packing.coding import MAX_RATIO
from sdcompress.safetensors_io import DTYPES

VERSION = 1
HEADER = struct.Struct("<8sI")
TRAILER = struct.Struct("<QQ32s8s")
MAX_INDEX = 16 << 20
MAX_CHUNK = 8 << 20
MAX_MANIFEST = 32 << 20
# A few bytes of JSON become an object, or a complaint, of half a kilobyte. The index and the
# manifest of Stable Diffusion 2 hold 20,000 and 30,000 values.
MAX_VALUES = 1 << 18

Size = Annotated[int, Field(ge=0, lt=1 << 62)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PackedTensor(_Record):
    """`dtype` as safetensors calls it; `sha256` of the raw little-endian bytes."""

    name: str
    dtype: str
    shape: tuple[Size, ...] = Field(max_length=16)
    sha256: Digest


class Part(_Record):
    """`size` bytes of a file in chunks of `step`; `stored` are their lengths from `offset` on."""

    size: Size
    step: Annotated[int, Field(gt=0, le=MAX_CHUNK)]
    offset: Size
    stored: tuple[Size, ...]
    tensor: PackedTensor | None = None

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Offset, stored length and raw bytes of each chunk."""
        offset = self.offset
        for i, stored in enumerate(self.stored):
            yield offset, stored, min(self.step, self.size - i * self.step)
            offset += stored


class PackedFile(_Record):
    name: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


class Index(_Record):
    """`bundle` is the digest of the bundle: the sha256 of its manifest, which is the first file."""

    bundle: Digest
    files: tuple[PackedFile, ...]


def check_names(names: Iterable[str], where: Path) -> None:
    """Make sure that files of these names lie inside their directory, each at a place of its own.

    Raises:
        InputError: a name leads out of it, is hidden, or means the same file as another one.
    """
    seen: set[str] = set()
    folders: set[str] = set()
    for name in names:
        parts = name.split("/")
        for part in parts:
            odd = not part or part.startswith(".") or "\\" in part or not part.isprintable()
            if odd or len(part.encode()) > 255:
                raise _unsafe(where, name, "no plain relative path")
        if len(name.encode()) > 1024:
            raise _unsafe(where, name, "longer than 1024 bytes")
        # On a disk that does not tell A from a, one file would replace the other.
        place = unicodedata.normalize("NFC", name).casefold()
        if place in seen:
            raise _unsafe(where, name, "there twice")
        seen.add(place)
        folders.update(str(p) for p in PurePosixPath(place).parents)
    if clash := sorted(seen & folders):
        raise _unsafe(where, clash[0], "a file and a directory")


def _unsafe(where: Path, name: str, why: str) -> InputError:
    return InputError(
        f"{where}: refused, because the file name {name!a:.80} is {why}; "
        "get the model from somebody you trust"
    )


def crowded(raw: bytes) -> bool:
    """Whether a JSON document may hold more values than a reader should make objects of."""
    return sum(map(raw.count, (b",", b"[", b"{"))) > MAX_VALUES


def write_index(index: Index) -> bytes:
    """The index and the trailer, which end the file.

    Raises:
        InputError: there are too many tensors for any reader.
    """
    raw = index.model_dump_json(exclude_defaults=True).encode()
    if len(raw) > MAX_INDEX or crowded(raw):
        raise InputError(
            f"the bundle has so many tensors that their index takes {len(raw)} bytes, more than "
            "any reader takes; pack its components apart"
        )
    stored = zstandard.ZstdCompressor(level=19).compress(raw)
    digest = _digest(HEADER.pack(PACK, VERSION), stored, len(raw))
    return stored + TRAILER.pack(len(stored), len(raw), digest, PACK)


def _digest(header: bytes, stored: bytes, raw: int) -> bytes:
    return hashlib.sha256(header + stored + struct.pack("<QQ", len(stored), raw)).digest()


def damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path}: {why}; it is truncated or was changed, get it again")


def read_index(path: Path, descriptor: int) -> Index:
    """Read and check the index of an opened pack.

    Raises:
        InputError: it is no pack, damaged, of another version, or says what cannot be.
    """
    size = os.fstat(descriptor).st_size
    header = os.pread(descriptor, HEADER.size, 0)
    if len(header) < HEADER.size or not header.startswith(PACK):
        raise InputError(
            f"{path}: expected a file made by `sdcompress pack`, found something else of {size} "
            "bytes; check the path, or get it again"
        )
    if (version := HEADER.unpack(header)[1]) != VERSION:
        raise InputError(
            f"{path}: expected a pack of version {VERSION}, found {version}; use the sdcompress "
            "that made it"
        )
    if size < HEADER.size + TRAILER.size:
        raise damaged(path, "expected an index at the end, found none")
    trailer = os.pread(descriptor, TRAILER.size, size - TRAILER.size)
    length, raw_length, digest, magic = TRAILER.unpack(trailer)
    start = size - TRAILER.size - length
    if magic != PACK or start < HEADER.size:
        raise damaged(path, "expected an index at the end, found none")
    if raw_length > min(MAX_INDEX, length * MAX_RATIO):
        raise damaged(path, f"its index claims {raw_length} bytes")
    stored = os.pread(descriptor, length, start)
    if _digest(header, stored, raw_length) != digest:
        raise damaged(path, "its index is not the one its digest was taken of")
    try:
        if zstandard.frame_content_size(stored) != raw_length:
            raise damaged(path, "its index is not of the size it claims")
        raw = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
        if crowded(raw):
            raise damaged(path, f"its index holds more than {MAX_VALUES} values")
        index = Index.model_validate_json(raw)
    except zstandard.ZstdError as e:
        raise damaged(path, "its index cannot be read") from e
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(p) for p in first["loc"])
        raise damaged(path, f"its index is not valid ({where}: {first['msg']})") from e
    _check(index, path, start)
    return index


def _check(index: Index, path: Path, end: int) -> None:
    """Names that stay inside, chunks that fill the space before the index, plausible sizes."""
    check_names((f.name for f in index.files), path)
    if not index.files or index.files[0].name != MANIFEST:
        raise damaged(path, f"expected {MANIFEST} as its first file")
    offset = HEADER.size
    for file in index.files:
        tensors = [part.tensor.name for part in file.parts if part.tensor]
        if len(set(tensors)) < len(tensors):
            raise damaged(path, f"a tensor of {file.name} is there twice")
        for part in file.parts:
            if part.offset != offset or len(part.stored) != -(-part.size // part.step):
                raise damaged(path, f"the parts of {file.name} are not where they should be")
            for _, stored, size in part.chunks():
                if not size <= stored * MAX_RATIO or stored > size + size // 64 + 256:
                    raise damaged(path, f"{stored} bytes of {file.name} claim to be {size}")
            offset = part.offset + sum(part.stored)
            if part.tensor and not _fits(part.tensor, part.size):
                raise damaged(path, f"a tensor of {file.name} is not of the size it claims")
    if offset != end:
        raise damaged(path, "its chunks do not end where the index begins")


def _fits(tensor: PackedTensor, size: int) -> bool:
    return tensor.dtype in DTYPES and math.prod(tensor.shape) * DTYPES[tensor.dtype][1] == size
