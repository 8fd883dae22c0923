"""A large new file: hashed while it is written, and put on the disk meanwhile."""

from __future__ import annotations

import ctypes
import hashlib
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

H = TypeVar("H", bound="HashedFile")
# Bytes at once: they are still in the cache when they are hashed, and the kernel, given several
# megabytes, takes up to ten times as long, since it looks for as much memory in one piece.
_SLICE = 1 << 18
_WRITE_OUT = 1 << 26  # bytes
_SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h


class HashedFile:
    """Written from the front to the back; `size` (bytes) and `sha256` are of what there is so far.

    A context manager. Raises FileExistsError where there is such a file.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("xb", buffering=0)
        self._digest, self.size, self._begun = hashlib.sha256(), 0, 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            done = self._file.write(rest[:_SLICE])
            self._digest.update(rest[:done])
            self.size += done
            rest = rest[done:]
        if self.size - self._begun >= _WRITE_OUT:
            self._begin_writing_out()

    def _begin_writing_out(self) -> None:
        """Let the disk begin with what it has, or it has all to do when the file is synced."""
        place = (ctypes.c_int64(n) for n in (self._begun, self.size - self._begun))
        with suppress(AttributeError):  # only Linux has it
            ctypes.CDLL(None).sync_file_range(self._file.fileno(), *place, _SYNC_FILE_RANGE_WRITE)
        self._begun = self.size

    def __enter__(self: H) -> H:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
