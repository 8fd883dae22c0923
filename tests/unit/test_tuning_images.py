"""Folders of pictures with captions: what is read, what is refused, what is left out."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdcompress.errors import InputError, UsageError
from sdcompress.models.captioned import Captioned, load_picture, read_folder
from sdcompress.tuning.finetune import picture_at

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def write_folder(folder: Path, rows: list[Any], pictures: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in pictures:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), RED).save(folder / name)
    return folder


def row(name: str, text: Any = "a red square") -> dict[str, Any]:
    return {"file_name": name, "text": text}


def test_reads_metadata_in_its_order(tmp_path: Path) -> None:
    rows = [
        row("b.png", " two  words\n"),
        row("sub/a.png", "naïve\u2028caption"),
        row("b.png", "x"),
    ]
    write_folder(tmp_path, rows, ("b.png", "sub/a.png"))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".cache.png").write_text("hidden")
    assert read_folder(tmp_path) == (
        Captioned(tmp_path / "b.png", "two  words"),
        Captioned(tmp_path / "sub/a.png", "naïve\u2028caption"),
        Captioned(tmp_path / "b.png", "x"),
    )


def test_reads_csv_and_metadata_of_subfolders(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", [row("a.png")], ("a.png",))
    write_folder(tmp_path / "two", [], ("b.png",))
    (tmp_path / "two" / "metadata.jsonl").unlink()
    text = 'file_name,text\r\nb.png,"left, and\nright"\r\n'
    (tmp_path / "two" / "metadata.csv").write_text(text, encoding="utf-8-sig", newline="")
    assert read_folder(tmp_path) == (
        Captioned(tmp_path / "one" / "a.png", "a red square"),
        Captioned(tmp_path / "two" / "b.png", "left, and\nright"),
    )


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    rows = [
        row("good.png"),
        row("gone.png"),
        row("text.png"),
        row("cut.jpg"),
        row("deep.png"),
        row("none.png", None),
        row("blank.png", "  "),
        {"file_name": "keyless.png"},
        row("number.png", 5),
    ]
    good = ("good.png", "none.png", "blank.png", "keyless.png", "number.png", "extra.PNG")
    write_folder(tmp_path, rows, good)
    (tmp_path / "text.png").write_text("this is no picture")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    return tmp_path


FAULTS = (
    "9 of 10 pictures cannot be used: 1 missing (gone.png), "
    "3 broken (text.png, cut.jpg, deep.png), "
    "4 without a caption (none.png, blank.png, keyless.png and 1 more), "
    "1 not named in the metadata (extra.PNG)"
)


def test_refuses_what_cannot_be_used_in_one_line(faulty: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_folder(faulty)
    line = str(caught.value)
    assert line.startswith(f"{faulty}: {FAULTS}; mend the folder (a line of metadata.jsonl is")
    assert "\n" not in line
    with pytest.raises(InputError, match=r"; mend it soon \("):
        read_folder(faulty, remedy="mend it soon")


def test_leaves_out_what_cannot_be_used_and_says_so_once(faulty: Path) -> None:
    with pytest.warns(UserWarning, match="are left out") as said:
        found = read_folder(faulty, skip=True)
    assert found == (Captioned(faulty / "good.png", "a red square"),)
    assert [str(w.message) for w in said] == [f"{faulty}: {FAULTS}; they are left out"]


def test_nothing_usable_is_an_error_also_when_skipping(tmp_path: Path) -> None:
    write_folder(tmp_path, [row("gone.png"), row("a.png", "")], ("a.png",))
    with pytest.raises(InputError, match=r"2 of 2 pictures cannot be used: .*; mend the folder \("):
        read_folder(tmp_path, skip=True)
    write_folder(tmp_path / "empty", [])
    with pytest.raises(InputError, match="the metadata names no picture; add lines"):
        read_folder(tmp_path / "empty")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png"', 'line 2: expected JSON such as {"file_name"'),
        ('["a.png", "text"]', "line 2: expected file_name and text, as in"),
        ('{"file": "a.png", "text": "x"}', "line 2: expected file_name and text, as in"),
        ('{"file_name": "", "text": "x"}', "line 2: expected file_name and text, as in"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_refuses_metadata_that_cannot_be_read(
    tmp_path: Path, line: str, message: str, skip: bool
) -> None:
    write_folder(tmp_path, [row("a.png"), line], ("a.png",))
    with pytest.raises(InputError) as caught:
        read_folder(tmp_path, skip=skip)
    assert f"{tmp_path / 'metadata.jsonl'}, {message}" in str(caught.value)


def test_refuses_folders_without_one_readable_metadata_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a folder of pictures, found none"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"expected metadata\.jsonl or metadata\.csv, found nei"):
        read_folder(tmp_path)
    write_folder(tmp_path, [row("a.png")], ("a.png",))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    with pytest.raises(InputError, match=r"found both metadata\.jsonl and metadata\.csv"):
        read_folder(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "\xff"}')
    with pytest.raises(InputError, match="expected text in UTF-8"):
        read_folder(tmp_path)


def test_refuses_csv_without_the_columns(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file,caption\na.png,x\n")
    with pytest.raises(InputError, match=r"metadata\.csv, line 2: expected file_name and text"):
        read_folder(tmp_path)


def test_reports_progress(tmp_path: Path) -> None:
    write_folder(tmp_path, [row("a.png"), row("b.png")], ("a.png", "b.png"))
    seen: list[tuple[int, int]] = []
    read_folder(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def corners(picture: torch.Tensor) -> list[tuple[float, ...]]:
    values = [picture[:, y, x] for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))]
    return [tuple(round(float(v), 3) for v in value) for value in values]


def test_loads_rgb_in_range_at_the_size(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, 1], pixels[:, 2] = (0, 51, 255), (255, 102, 0)
    pixels[:, 0] = pixels[:, 3] = 77  # what the square at the centre leaves out
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = load_picture(tmp_path / "a.png", 2, 2)
    assert picture.shape == (3, 2, 2)
    assert picture.dtype == torch.float32
    left, right = (-1.0, -0.6, 1.0), (1.0, -0.2, -1.0)
    assert corners(picture) == [left, right, left, right]
    assert load_picture(tmp_path / "a.png", 16, 24).shape == (3, 16, 24)


def test_turns_pictures_as_their_exif_says(tmp_path: Path) -> None:
    pixels = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture has to be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    picture = load_picture(tmp_path / "a.png", 2, 2)
    blue, red, white, green = ((-1, -1, 1), (1, -1, -1), (1, 1, 1), (-1, 1, -1))
    assert corners(picture) == [blue, red, white, green]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK"])
def test_white_and_transparent_are_white_in_every_mode(tmp_path: Path, mode: str) -> None:
    transparent = {"RGBA": (0, 0, 0, 0), "LA": (0, 0), "P": 0}
    white = {"L": 255, "1": 1, "CMYK": (0, 0, 0, 0)}
    picture = Image.new(mode, (4, 4), {**transparent, **white}[mode])
    how: dict[str, Any] = {"transparency": 0} if mode == "P" else {}
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(file, **how)
    assert load_picture(file, 4, 4).eq(1.0).all()


def test_a_picture_that_went_bad_later_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.png: cannot be read any more"):
        load_picture(tmp_path / "a.png", 8, 8)


def test_checking_leaves_the_filters_of_warnings_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, [row("a.png")], ("a.png",))
    before = list(warnings.filters)
    read_folder(tmp_path)
    assert list(warnings.filters) == before


def test_every_picture_comes_once_before_any_comes_again() -> None:
    order = [picture_at(position, 10, seed=3) for position in range(40)]
    for start in range(0, 40, 10):
        assert sorted(order[start : start + 10]) == list(range(10))
    assert Counter(order) == dict.fromkeys(range(10), 4)
    assert order[:10] != order[10:20]
    # From anywhere, and back again: nothing depends on what was asked before.
    assert [picture_at(p, 10, seed=3) for p in (33, 7, 25)] == [order[33], order[7], order[25]]
    assert order != [picture_at(position, 10, seed=4) for position in range(40)]
