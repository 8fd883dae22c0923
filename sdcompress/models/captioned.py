"""Pictures with captions to learn from: a folder in the `imagefolder` layout of Hugging Face.

    photos/
      metadata.jsonl    one line a picture: {"file_name": "0001.png", "text": "a red circle"}
      0001.png

`metadata.csv` with the columns file_name and text says the same, and a subfolder may bring a
metadata file of its own. The whole folder is looked at before anything slow begins.
"""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.errors import InputError, UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
METADATA = ("metadata.jsonl", "metadata.csv")
EXAMPLE = '{"file_name": "0001.png", "text": "what is to be seen"}'
NAMED = 3  # files that a message names; it counts the others


@dataclass(frozen=True)
class Captioned:
    """A picture that can be read, and what is to be seen in it."""

    file: Path
    caption: str


def require_folder(folder: Path) -> None:
    """Raise UsageError where there is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder of pictures, found none; check 'images'")


def read_folder(
    folder: Path,
    *,
    skip: bool = False,
    remedy: str = "mend the folder",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Captioned, ...]:
    """All pictures of a folder with their captions, in the order of the metadata.

    Every file is decoded once, so that training meets none that cannot be. What cannot be used is
    refused, or with `skip` left out with one warning: files that are missing or broken, captions
    that are missing or empty, and pictures the metadata does not name. `remedy` is what a refusal
    says to do.

    Raises:
        UsageError: there is no such folder.
        InputError: it has no metadata or none that can be read, no usable picture, or something
            that cannot be used and `skip` is not given.
    """
    require_folder(folder)
    rows = list(_read_metadata(folder))
    named = {file for file, _ in rows}
    problems: dict[str, list[Path]] = defaultdict(list)
    decoded = _decode_all(list(dict.fromkeys(file for file, _ in rows)), progress)
    usable = []
    for file, caption in rows:
        if not file.is_file():
            problems["missing"].append(file)
        elif not decoded[file]:
            problems["broken"].append(file)
        elif not isinstance(caption, str) or not caption.strip():
            problems["without a caption"].append(file)
        else:
            usable.append(Captioned(file, caption.strip()))
    on_disk = (f for f in _files(folder) if f.suffix.lower() in PICTURES)
    problems["not named in the metadata"] = sorted(f for f in on_disk if f not in named)
    what = _describe(folder, problems, len(rows))
    if what and not (skip and usable):
        raise InputError(f"{what}; {remedy} (a line of {METADATA[0]} is {EXAMPLE})")
    if not usable:
        raise InputError(f"{folder}: the metadata names no picture; add lines such as {EXAMPLE}")
    if what:
        warnings.warn(f"{what}; they are left out", stacklevel=2)
    return tuple(usable)


def load_picture(file: Path, height: int, width: int) -> Tensor:
    """One picture as fp32 RGB [3, height, width] in -1..1.

    Turned as its EXIF orientation says, scaled until it just covers the size, cut at the centre;
    what is transparent becomes white.

    Raises:
        InputError: it cannot be read, though it could when the folder was checked.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with _quiet():
            picture = _decode(file)
    except Exception as e:  # as in `_can_be_read`
        raise InputError(
            f"{file}: cannot be read any more ({e}); leave the folder alone while it is learnt from"
        ) from e
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(fitted, dtype=np.float32))
    return values.permute(2, 0, 1).contiguous() / 127.5 - 1


def _read_metadata(folder: Path) -> Iterator[tuple[Path, Any]]:
    """The file and the caption of every row; a caption can still be anything."""
    files = [f for f in _files(folder) if f.name in METADATA]
    if not files:
        raise InputError(
            f"{folder}: expected {' or '.join(METADATA)}, found neither; "
            f"add one with a line such as {EXAMPLE} for each picture"
        )
    if twice := [f for f in files if f.with_name(METADATA[0]) in files and f.suffix == ".csv"]:
        raise InputError(
            f"{twice[0].parent}: expected one metadata file, found both "
            f"{' and '.join(METADATA)}; remove one"
        )
    for metadata in files:
        rows = _csv_rows if metadata.suffix == ".csv" else _json_rows
        for line, row in rows(metadata):
            name = row.get("file_name") if isinstance(row, dict) else None
            if not isinstance(name, str) or not name:
                raise InputError(
                    f"{metadata}, line {line}: expected file_name and text, as in {EXAMPLE}, "
                    f"found {row!r:.80}; correct the line"
                )
            yield metadata.parent / name, row.get("text")


def _json_rows(metadata: Path) -> Iterator[tuple[int, Any]]:
    # Only \n ends a line: a caption may hold the other characters that `splitlines` cuts at.
    for number, line in enumerate(_text(metadata).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as e:
                raise InputError(
                    f"{metadata}, line {number}: expected JSON such as {EXAMPLE}, "
                    f"found {line:.60}; correct the line"
                ) from e


def _csv_rows(metadata: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(StringIO(_text(metadata), newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as e:
        raise InputError(
            f"{metadata}, line {reader.line_num}: expected the columns file_name and text, "
            f"found something that is no CSV ({e}); correct the line"
        ) from e


def _text(metadata: Path) -> str:
    try:
        return metadata.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{metadata}: expected text in UTF-8 ({e}); write it again") from e


def _files(folder: Path) -> list[Path]:
    """All files below a folder, in order, but hidden ones."""
    found = []
    for directory, below, names in os.walk(folder):
        below[:] = sorted(d for d in below if not d.startswith("."))
        found += [Path(directory, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _decode_all(files: list[Path], progress: Callable[[int, int], None]) -> dict[Path, bool]:
    """Whether each file is there and decodes; PIL does not hold Python's lock while it decodes."""
    readable = {}
    with _quiet(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, good in zip(files, pool.map(_can_be_read, files), strict=True):
            readable[file] = good
            progress(len(readable), len(files))
    return readable


def _can_be_read(file: Path) -> bool:
    try:
        _decode(file)
    except Exception:  # decoders raise whatever a damaged file leads them into
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """PIL remarks on damaged EXIF data and on size, neither of which spoils a picture. Filters of
    warnings belong to the process, so this is used around threads and not in them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(file: Path) -> Image.Image:
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{picture.mode} has more than 8 bits a channel")  # RGB would be white
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _describe(folder: Path, problems: dict[str, list[Path]], rows: int) -> str:
    """One line that counts what cannot be used and names the first few; empty if nothing."""
    parts = []
    for kind, files in problems.items():
        if files:
            names = ", ".join(os.path.relpath(f, folder) for f in files[:NAMED])
            more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
            parts.append(f"{len(files)} {kind} ({names}{more})")
    count = sum(map(len, problems.values()))
    if not count:
        return ""
    total = rows + len(problems["not named in the metadata"])
    return f"{folder}: {count} of {total} pictures cannot be used: {', '.join(parts)}"
