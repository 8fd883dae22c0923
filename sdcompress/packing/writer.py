"""Bundle → pack: every file of the manifest in parts, every part in chunks, coded in parallel."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from pydantic import BaseModel

from sdcompress.bundle import MANIFEST, PACK, Bundle, refuse_existing, to_json
from sdcompress.errors import InputError, VerificationError
from sdcompress.packing.coding import Encoded, encode_guessing, encode_numbers, encode_plain
from sdcompress.packing.index import (
    HEADER,
    MAX_CHUNK,
    MAX_MANIFEST,
    VERSION,
    Index,
    PackedFile,
    PackedTensor,
    Part,
    check_names,
    crowded,
    write_index,
)
from sdcompress.parallel import in_order
from sdcompress.safetensors_io import DTYPES, read_header

CHUNK = 1 << 20
AHEAD = 16  # chunks, which take a thread a few milliseconds each
SMALL = 4 << 20  # bytes up to which text and headers are worth the slowest level of zstd
_SLOWEST = 19

Progress = Callable[[str, int], None]  # what is being done, bytes done since the last call


class FileSizes(BaseModel):
    """Bytes of a file's tensors: as they are, packed, and by their order-0 entropy."""

    file: str
    tensors: int
    original_bytes: int
    packed_bytes: int
    entropy_bytes: int


class Packed(BaseModel):
    """What `pack` made. `files` are those with tensors.

    The entropy is the sum over chunks of the order-0 entropies of the zero positions (log2 6 bits a
    group where all is 2:4) and of each byte of the other values.
    """

    digest: str
    original_bytes: int
    packed_bytes: int
    files: list[FileSizes]


class _Section:
    """A part of a file that is to be packed; a tensor if it has a name."""

    def __init__(
        self, start: int, size: int, name: str = "", dtype: str = "U8", shape: tuple[int, ...] = ()
    ) -> None:
        self.start, self.size = start, size
        self.name, self.dtype, self.shape = name, dtype, shape
        self.width = DTYPES[dtype][1]
        # Groups of a 2:4 pattern lie along axis 0 (a MatMul's weight in ONNX) or axis 1.
        after = sorted({math.prod(shape[axis + 1 :]) for axis in range(min(2, len(shape)))})
        self.strides = [s for s in after if 0 < 4 * s * self.width <= MAX_CHUNK] or [1]
        group = 4 * self.strides[-1] * self.width
        self.step = max(CHUNK // group, 1) * group  # no group is cut in two
        self.sha256 = hashlib.sha256()

    def chunks(self) -> Iterator[int]:
        """The bytes of each chunk."""
        for begin in range(0, self.size, self.step):
            yield min(self.step, self.size - begin)

    def encode(self, data: bytes) -> Encoded:
        if self.name:
            return encode_numbers(data, self.width, self.strides)
        return encode_plain(data, _SLOWEST) if self.size <= SMALL else encode_guessing(data)

    def part(self, offset: int, stored: list[int]) -> Part:
        tensor = None
        if self.name:
            tensor = PackedTensor(
                name=self.name,
                dtype=self.dtype,
                shape=self.shape,
                sha256=self.sha256.hexdigest(),
            )
        return Part(
            size=self.size, step=self.step, offset=offset, stored=tuple(stored), tensor=tensor
        )


def pack(
    bundle: Bundle, target: Path, *, progress: Progress | None = None, threads: int | None = None
) -> Packed:
    """Write all of `bundle` into the one file `target`, which must not exist yet.

    The same bundle gives the same bytes, whatever the number of threads. At most a few chunks a
    thread are in memory.

    Raises:
        InputError: `target` exists or cannot be created; the bundle cannot be read.
        UsageError: `target` lies in a bundle.
        VerificationError: a file is missing, not in the manifest, or not the one it describes.
    """
    if (bundle.path / MANIFEST).is_file():
        bundle.check_listing()
    manifest = _manifest_bytes(bundle)
    names = list(bundle.manifest.files)
    check_names([MANIFEST, *names], bundle.path)
    sections = {name: _sections(bundle, name) for name in names}
    files, sizes = [], []
    with _new_file(target) as out:
        out.write(HEADER.pack(PACK, VERSION))
        first = _Section(0, len(manifest))
        payload = first.encode(manifest).payload
        out.write(payload)
        files.append(
            PackedFile(name=MANIFEST, parts=(first.part(HEADER.size, [len(payload)]),)),
        )
        source = _Source(bundle, sections)
        with closing(in_order(source.jobs(), threads, ahead=AHEAD)) as coded:
            for name in names:
                parts, entropy = [], 0.0
                for section in sections[name]:
                    start, stored = out.tell(), []
                    for size in section.chunks():
                        chunk = next(coded)
                        out.write(chunk.payload)
                        stored.append(len(chunk.payload))
                        entropy += chunk.entropy or 0.0
                        if progress:
                            progress(name, size)
                    parts.append(section.part(start, stored))
                source.check(name)
                files.append(PackedFile(name=name, parts=tuple(parts)))
                if any(part.tensor for part in parts):
                    sizes.append(_file_sizes(name, parts, entropy))
        out.write(write_index(Index(bundle=bundle.digest, files=tuple(files))))
        packed = out.tell()
    original = len(manifest) + sum(record.size for record in bundle.manifest.files.values())
    return Packed(digest=bundle.digest, original_bytes=original, packed_bytes=packed, files=sizes)


def _file_sizes(name: str, parts: list[Part], entropy: float) -> FileSizes:
    tensors = [part for part in parts if part.tensor]
    return FileSizes(
        file=name,
        tensors=len(tensors),
        original_bytes=sum(part.size for part in tensors),
        packed_bytes=sum(sum(part.stored) for part in tensors),
        entropy_bytes=round(entropy / 8),
    )


class _Source:
    """Reads the files once, from the first byte to the last, and hashes them on the way."""

    def __init__(self, bundle: Bundle, sections: dict[str, list[_Section]]) -> None:
        self._bundle, self._sections = bundle, sections
        self._hashes = {name: hashlib.sha256() for name in sections}

    def jobs(self) -> Iterator[Callable[[], Encoded]]:
        for name, sections in self._sections.items():
            with _open(self._bundle.path / name) as f:
                for section in sections:
                    for size in section.chunks():
                        if len(data := f.read(size)) != size:
                            raise _changed(self._bundle, name)
                        self._hashes[name].update(data)
                        section.sha256.update(data)
                        yield partial(section.encode, data)

    def check(self, name: str) -> None:
        if self._hashes[name].hexdigest() != self._bundle.manifest.files[name].sha256:
            raise _changed(self._bundle, name)


def _changed(bundle: Bundle, name: str) -> VerificationError:
    return VerificationError(
        f"{bundle.path}: {name} is not the file the manifest describes; make the bundle again"
    )


def _open(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror}); check the path") from e


def _manifest_bytes(bundle: Bundle) -> bytes:
    """The manifest as its digest was taken; a model that is no bundle has it only in memory."""
    raw = to_json(bundle.manifest.model_dump(mode="json")).encode()
    if hashlib.sha256(raw).hexdigest() != bundle.digest:
        raw = (bundle.path / MANIFEST).read_bytes()
    if hashlib.sha256(raw).hexdigest() != bundle.digest:
        raise _changed(bundle, MANIFEST)
    if len(raw) > MAX_MANIFEST or crowded(raw):
        raise InputError(
            f"{bundle.path}: its manifest takes {len(raw)} bytes, more than a pack may hold; pack "
            "its components apart"
        )
    return raw


def _sections(bundle: Bundle, name: str) -> list[_Section]:
    """The parts of one file, in order and without gaps."""
    file, size = bundle.path / name, bundle.manifest.files[name].size
    with _open(file) as f:
        if os.fstat(f.fileno()).st_size != size:
            raise _changed(bundle, name)
    tensors: list[_Section] = []
    if name.endswith(".safetensors"):
        tensors = _safetensors(file)
    elif PurePosixPath(name).name == "model.onnx_data":
        tensors = _onnx_data(file)
    sections, end = [], 0
    for tensor in sorted(filter(_nameable, tensors), key=lambda s: (s.start, s.size)):
        if tensor.start < end or tensor.start + tensor.size > size:
            return [_Section(0, size)]  # tensors that share bytes: nothing is known then
        if tensor.start > end:
            sections.append(_Section(end, tensor.start - end))
        sections.append(tensor)
        end = tensor.start + tensor.size
    return [*sections, _Section(end, size - end)] if end < size else sections


def _nameable(tensor: _Section) -> bool:
    """Whether the index may hold it; what it may not is packed without a name."""
    shape_ok = len(tensor.shape) <= 16 and all(0 <= n < 1 << 62 for n in tensor.shape)
    return shape_ok and bool(tensor.name) and tensor.name.isprintable()


def _safetensors(file: Path) -> list[_Section]:
    try:
        tensors = read_header(file).tensors.values()
    except InputError:  # whatever it is, it is packed as it is
        return []
    return [_Section(t.offset, t.nbytes, t.name, t.dtype, t.shape) for t in tensors]


_ONNX_DTYPES = {"fp16": "F16", "fp32": "F32"}


def _onnx_data(file: Path) -> list[_Section]:
    """The tensors of ONNX external data by the weight map beside it; none if it does not tell."""
    try:
        weights = json.loads((file.parent / "weight_map.json").read_bytes())
        dtype = _ONNX_DTYPES[weights["dtype"]]
        sections = [
            _Section(int(e["offset"]), int(e["nbytes"]), name, dtype, tuple(map(int, e["shape"])))
            for name, e in weights["initializers"].items()
        ]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ):
        return []
    plausible = all(s.start >= 0 and math.prod(s.shape) * s.width == s.size for s in sections)
    return sections if plausible else []


@contextmanager
def _new_file(target: Path) -> Iterator[IO[bytes]]:
    """A file that is there whole when the block ends well, and not at all otherwise.

    It is written beside its place, locked, and renamed; what a killed process left is used again.
    """
    refuse_existing(target)
    work = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work, os.O_WRONLY | os.O_CREAT, 0o666)  # and not yet emptied
    except OSError as e:
        raise InputError(f"{target}: cannot be created ({e.strerror}); check the path") from e
    with os.fdopen(descriptor, "wb") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(f"{target}: another process is just writing it; wait for it") from e
        refuse_existing(target)  # what we hold may be the very file that process has just renamed
        try:
            f.truncate(0)
            yield f
            f.flush()
            os.fsync(f.fileno())
            os.rename(work, target)
        except BaseException:
            work.unlink(missing_ok=True)
            raise
