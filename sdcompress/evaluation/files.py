"""What lies at a place that settings name: a name stays while its files change."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from sdcompress.bundle import sha256_file


def content(place: Path) -> str:
    """The digest of a file, or of all files in a folder and their names."""
    if not place.is_dir():
        return _of_file(place)
    files = sorted(file for file in place.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(place).as_posix()}\n{_of_file(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def contents(*names: str | None) -> dict[str, str]:
    """`content` by name, of the places that are there."""
    places = {name: Path(name).expanduser() for name in names if name}
    return {name: content(place) for name, place in places.items() if place.exists()}


def _of_file(file: Path) -> str:
    found = file.stat()
    return _read(file, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1 << 16)  # a sweep asks for every point, and folders hold thousands of images
def _read(file: Path, size: int, changed: int) -> str:
    return sha256_file(file)
