"""A file that is hashed while it is written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sdcompress import hashed_file
from sdcompress.hashed_file import HashedFile


def test_it_holds_and_hashes_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashed_file, "_WRITE_OUT", 1000)  # so that some is written out meanwhile
    parts = [bytes([i]) * (300 * i) for i in range(9)]
    with HashedFile(tmp_path / "f") as f:
        for part in parts:
            f.write(memoryview(part))
    whole = b"".join(parts)
    assert (tmp_path / "f").read_bytes() == whole
    assert (f.size, f.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())


def test_it_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        HashedFile(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"precious"
