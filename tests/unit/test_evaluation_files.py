"""A name stays while what lies there changes."""

from __future__ import annotations

from pathlib import Path

from sdcompress.evaluation.files import contents


def test_contents_are_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    first = contents(None, str(tmp_path), "nowhere")
    (tmp_path / "a.txt").write_text("another")
    assert list(first) == [str(tmp_path)]
    assert contents(str(tmp_path)) != first
    assert contents(None) == {}
