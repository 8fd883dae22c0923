"""A graph is traced once; whatever is damaged or was made by other code is traced again."""

from __future__ import annotations

from pathlib import Path

import pytest

from export import graph_cache
from export.graph_cache import Skeleton
from export.weight_map import Entry, WeightMap

ENTRY = Entry(
    key="a.weight", transform="transpose", key_shape=(2, 3), shape=(3, 2), offset=64, nbytes=12
)
MAP = WeightMap(component="unet", dtype="fp16", opset=18, initializers={"a.weight_t": ENTRY})
MADE = Skeleton(
    model=b"\x08\n{}\x00 graph",  # a line break, as graphs hold many
    weight_map=MAP,
    fp32_layers=("conv_in", "mid_block.attentions.0.proj_in"),
    fp32_products=("node_conv2d",),
)


class Tracer:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Skeleton:
        self.calls += 1
        return MADE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path))
    return tmp_path / "graphs"


def test_what_was_traced_once_comes_back_unchanged(folder: Path) -> None:
    trace = Tracer()
    assert graph_cache.cached(["unet", {"a": 1}], trace) == MADE
    assert graph_cache.cached(["unet", {"a": 1}], trace) == MADE
    assert trace.calls == 1
    assert len(list(folder.iterdir())) == 1


def test_another_key_and_other_code_are_other_graphs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Tracer()
    graph_cache.cached(["unet", {"a": 1}], trace)
    graph_cache.cached(["unet", {"a": 2}], trace)
    monkeypatch.setattr(graph_cache, "_code", lambda: "changed")
    graph_cache.cached(["unet", {"a": 1}], trace)
    monkeypatch.setattr(graph_cache, "tool_versions", lambda: {"torch": "99"})
    graph_cache.cached(["unet", {"a": 1}], trace)
    assert trace.calls == 4


@pytest.mark.parametrize("damage", ["truncate", "graph", "map", "empty", "text"])
def test_a_damaged_file_is_made_again(folder: Path, damage: str) -> None:
    trace = Tracer()
    graph_cache.cached("key", trace)
    (file,) = folder.iterdir()
    good = file.read_bytes()
    bad = {
        "truncate": good[:-1],
        "graph": good[:-1] + b"!",
        "map": good.replace(b'"offset":64', b'"offset":65'),
        "empty": b"",
        "text": b"[]\nrest",
    }[damage]
    assert bad != good
    file.write_bytes(bad)
    assert graph_cache.cached("key", trace) == MADE
    assert trace.calls == 2
    assert file.read_bytes() == good


def test_a_place_that_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "file"))
    trace = Tracer()
    assert graph_cache.cached("key", trace) == MADE
    assert graph_cache.cached("key", trace) == MADE
    assert trace.calls == 2
