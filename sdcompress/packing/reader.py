"""Pack → bundle, or one tensor of it. Nothing a pack says is believed before it is checked."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from sdcompress.bundle import MANIFEST, Bundle, Manifest, staging
from sdcompress.errors import InputError, VerificationError
from sdcompress.hashed_file import HashedFile
from sdcompress.packing.coding import Bytes, CodingError, decode
from sdcompress.packing.index import (
    MAX_MANIFEST,
    MAX_VALUES,
    Index,
    Part,
    crowded,
    damaged,
    read_index,
)
from sdcompress.packing.writer import AHEAD, Progress
from sdcompress.parallel import in_order
from sdcompress.safetensors_io import DTYPES

if TYPE_CHECKING:
    from torch import Tensor


class Pack:
    """An opened pack: its checked index, and its parts one at a time. A context manager."""

    def __init__(self, path: Path) -> None:
        """Raises InputError: the file cannot be read, or is no pack that can be trusted."""
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({e.strerror}); check the path") from e
        try:
            self.index: Index = read_index(path, self._file.fileno())
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def jobs(self, part: Part) -> Iterator[Callable[[], Bytes]]:
        """What decodes each chunk of a part; may be called from any thread."""
        return (partial(self._chunk, *chunk) for chunk in part.chunks())

    def _chunk(self, offset: int, stored: int, size: int) -> Bytes:
        payload = os.pread(self._file.fileno(), stored, offset)
        if len(payload) != stored:
            raise damaged(self.path, "it ends too early")
        try:
            return decode(payload, size)
        except CodingError as e:
            raise damaged(self.path, str(e)) from e

    def read_manifest(self) -> tuple[bytes, Manifest]:
        """The manifest of the bundle, as bytes and read.

        Raises:
            InputError: it is of another version, or the files of the pack are not those it names.
            VerificationError: it is not the manifest that was packed.
        """
        first, *others = self.index.files
        if first.size > MAX_MANIFEST:
            raise damaged(self.path, f"its manifest claims {first.size} bytes")
        raw = b"".join(job().tobytes() for part in first.parts for job in self.jobs(part))
        if hashlib.sha256(raw).hexdigest() != self.index.bundle:
            raise self._differs(MANIFEST)
        if crowded(raw):
            raise damaged(self.path, f"its manifest holds more than {MAX_VALUES} values")
        try:
            manifest = Manifest.model_validate_json(raw)
        except ValidationError as e:
            first_error = e.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(p) for p in first_error["loc"])
            raise InputError(
                f"{self.path}: not a bundle this version understands ({where}: "
                f"{first_error['msg']}); use the sdcompress that made it"
            ) from e
        sizes = {name: record.size for name, record in manifest.files.items()}
        if sizes != {file.name: file.size for file in others}:
            raise damaged(self.path, "its files are not those its manifest names")
        return raw, manifest

    def read_tensor(self, file: str, name: str) -> Tensor:
        """One tensor of one file, in its own type and shape; only its own chunks are read.

        Raises:
            InputError: there is no such tensor, or its chunks are damaged.
            VerificationError: it is not the tensor that was packed.
        """
        import torch

        part = self._find(file, name)
        assert part.tensor
        out = bytearray(part.size)
        view, end = memoryview(out), 0
        for job in self.jobs(part):
            chunk = job()
            view[end : end + len(chunk)] = chunk.data
            end += len(chunk)
        if hashlib.sha256(out).hexdigest() != part.tensor.sha256:
            raise self._differs(f"{name} of {file}")
        dtype = getattr(torch, DTYPES[part.tensor.dtype][0])
        if not out:
            return torch.empty(part.tensor.shape, dtype=dtype)
        return torch.frombuffer(out, dtype=dtype).reshape(part.tensor.shape)

    def _find(self, file: str, name: str) -> Part:
        parts = next((f.parts for f in self.index.files if f.name == file), None)
        if parts is None:
            names = ", ".join(f.name for f in self.index.files if any(p.tensor for p in f.parts))
            raise InputError(f"{self.path}: holds no file {file}; those with tensors are {names}")
        for part in parts:
            if part.tensor and part.tensor.name == name:
                return part
        raise InputError(f"{self.path}: {file} holds no tensor {name}; check its name")

    def _differs(self, what: str) -> VerificationError:
        return VerificationError(
            f"{self.path}: {what} is not what was packed: its digest differs; get the file again"
        )

    def write(self, work: Path, progress: Progress | None, threads: int | None) -> None:
        """Write every file below the empty directory `work` and hold it against its digest.

        Raises:
            InputError: the pack is damaged, or the disk too small.
            VerificationError: a file is not the one that was packed.
        """
        raw, manifest = self.read_manifest()
        needed = len(raw) + sum(record.size for record in manifest.files.values())
        if (free := shutil.disk_usage(work).free) < needed:
            raise InputError(
                f"{self.path}: unpacks to {needed} bytes, {free} are free at {work.parent}; free "
                "some space"
            )
        (work / MANIFEST).write_bytes(raw)
        files = self.index.files[1:]
        jobs = (job for file in files for part in file.parts for job in self.jobs(part))
        with closing(in_order(jobs, threads, ahead=AHEAD)) as chunks:
            for file in files:
                target = work / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                # One thread writes: two that write the same file spend their time waiting.
                with HashedFile(target) as out:
                    for chunk in islice(chunks, sum(len(part.stored) for part in file.parts)):
                        out.write(chunk.data)
                        if progress:
                            progress(file.name, len(chunk))
                if out.sha256 != manifest.files[file.name].sha256:
                    raise self._differs(file.name)


def unpack(
    path: Path, target: Path, *, progress: Progress | None = None, threads: int | None = None
) -> Bundle:
    """Unpack the bundle in `path` to the directory `target`, which must not exist yet.

    All digests are checked before anything appears at `target`. At most a few chunks a thread are
    in memory.

    Raises:
        InputError: `path` is no pack that can be trusted, `target` exists or the disk is too small.
        VerificationError: a file is not the one that was packed.
    """
    with Pack(path) as opened:
        with staging(target) as work:
            opened.write(work, progress, threads)
        return Bundle.open(target)


def read_tensor(path: Path, file: str, name: str) -> Tensor:
    """One tensor out of a pack: `file` as the bundle calls it, `name` as in that file.

    Raises:
        InputError: there is no such tensor, or the pack is damaged.
        VerificationError: it is not the tensor that was packed.
    """
    with Pack(path) as pack:
        return pack.read_tensor(file, name)
