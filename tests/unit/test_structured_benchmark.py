"""What benchmarks/structured does apart from measuring."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.criteria import one_point
from benchmarks.structured import measure, report, speed
from benchmarks.structured.points import CRITERIA, Point, all_points, recipe
from benchmarks.structured.quality import answer_file
from sdcompress.catalog import read_catalog, read_config
from sdcompress.latency import LatencyTable
from sdcompress.macs import Sizes, component_macs
from sdcompress.structure import BlockRecord, ComponentStructure, find_blocks


def test_points_come_once_and_the_main_budget_first() -> None:
    points = all_points()
    assert points[:6] == [Point(name, "macs", 0.7) for name in CRITERIA]
    assert len(points) == len(set(points)) == 3 * 7 + 2 + 2 * 2 * 3
    assert len({point.name for point in points}) == len(points)
    assert {(p.budget, p.share) for p in points if p.tuned} == {("macs", 0.7), ("latency", 0.75)}
    last = Point("obs", "latency", 0.75, "2:4", tuned=True)
    assert last in points
    assert (last.name, str(last)) == (
        "latency0.75-2to4-obs-tuned",
        "latency 0.75 obs, then 2:4, tuned",
    )


def test_recipes() -> None:
    table = Path("table.json")
    unet = recipe(Point("magnitude, refit", "macs", 0.5), table).prune["unet"]
    assert unet.structure
    assert unet.structure.budget
    assert (unet.structure.budget.what, unet.structure.budget.share) == ("macs", 0.5)
    assert unet.structure.table is None
    assert [(r.criterion, r.refit) for r in unet.structure.rules] == [("magnitude", True)]
    assert not unet.rules
    unet = recipe(Point("obs", "latency", 0.75, "2:4"), table).prune["unet"]
    assert unet.structure
    assert unet.structure.table == "table.json"
    assert [(r.criterion, r.refit) for r in unet.structure.rules] == [("obs", False)]
    assert [(r.scope, r.criterion, r.pattern) for r in unet.rules] == [("all", "obs_refit", "2:4")]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--work", "w", "--rounds", "1"], "at least 2"),
        (["--work", "w", "--samples", "1"], "at least 2"),
        (["--work", "w", "--part", "half"], "invalid choice"),
        ([], "--work"),
    ],
)
def test_wrong_arguments(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        measure.arguments(argv)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def _kind(macs: tuple[float, float], milliseconds: tuple[float, float]) -> speed.Kind:
    return speed.Kind("neurons", 0, 2, 0.5, macs, milliseconds)


def test_a_kind_follows_if_it_saves_most_of_what_its_macs_promise() -> None:
    assert _kind((100.0, 50.0), (10.0, 6.0)).saved == (0.5, 0.4)
    assert _kind((100.0, 50.0), (10.0, 6.0)).followed  # 0.4 of 0.5 is 80 %
    assert not _kind((100.0, 50.0), (10.0, 6.1)).followed


def test_macs_and_times_by_kind_and_level(tiny_sd: Path) -> None:
    shapes = read_catalog(tiny_sd).shapes("unet")
    config = read_config(tiny_sd / "unet")
    blocks = find_blocks("unet", shapes, config)
    # Every block takes 8 ms, and half of what goes.
    times = {b.name: {b.width: 0.008, b.width // 2: 0.006} for b in blocks}
    table = LatencyTable(
        component="unet", machine="", backend="", options={}, shapes={}, rounds=1,
        total=0.008 * len(blocks) + 0.1, blocks=times,
    )  # fmt: skip
    records = {
        b.name: BlockRecord(
            kind=b.kind, unit=b.unit, width=b.width, asked=None, criterion=None, removed="",
            kept=b.width // 2 if b.kind == "neurons" else b.width,
        )
        for b in blocks
    }  # fmt: skip
    record = ComponentStructure(
        parameters_dense=1, parameters=1, macs_dense=1, macs=1, blocks=records
    )
    kinds, rest = speed.by_kind(str(tiny_sd), table, record)
    assert sum(kind.blocks for kind in kinds) == len(blocks)
    assert rest["milliseconds"] == pytest.approx(100)
    everything = sum(component_macs("unet", shapes, config, Sizes.of_model(tiny_sd)).values())
    assert sum(kind.macs[0] for kind in kinds) + rest["macs"] == pytest.approx(everything)
    for kind in kinds:
        saved = (0.5, 0.25) if kind.kind == "neurons" else (0, 0)
        assert kind.saved == pytest.approx(saved)
        assert kind.kept == (0.5 if kind.kind == "neurons" else 1)
    assert {(k.kind, k.level) for k in kinds} >= {("neurons", 0), ("channels", 1)}
    neurons = sum(b.kind == "neurons" for b in blocks)
    assert speed.foretold(table, record) == pytest.approx(1 - 0.002 * neurons / table.total)


def _answers(milliseconds: float, peak: int) -> list[dict[str, Any]]:
    return [
        {"unet": [milliseconds], "before_bytes": 10, "peak_anonymous_bytes": peak} for _ in range(3)
    ]


def test_memory_of_the_engine_is_above_that_of_the_runtime() -> None:
    answers = {
        "dense": _answers(10.0, 110),
        "macs": _answers(8.0, 60),
        "control": _answers(10.0, 110),
    }
    found = speed.compared(answers, "macs")
    assert found["unet"].sparse_to_dense.ratio == 0.8
    assert found["engine_memory"].sparse_to_dense.ratio == 0.5
    assert found["engine_memory"].unit == "bytes"
    assert found["peak_memory"].sparse_to_dense.ratio == pytest.approx(60 / 110)


def _speed() -> dict[str, Any]:
    """Results of one part: 70 % of the time for a budget of latency, 80 % for one of MACs."""
    budgets = {}
    for what, share, milliseconds in (("latency", 0.75, 7.0), ("macs", 0.7, 8.0)):
        answers = {
            "dense": _answers(10.0, 110),
            what: _answers(milliseconds, 60),
            "control": _answers(10.0, 110),
        }
        measures = speed.compared(answers, what)
        kinds = [_kind((60.0, 30.0), (6.0, 5.0)), _kind((20.0, 20.0), (1.0, 1.0))]
        budgets[what] = {
            "asked": share,
            "measures": {k: m.model_dump(mode="json") for k, m in measures.items()},
            "kinds": [{**vars(k), "saved": k.saved, "followed": k.followed} for k in kinds],
            "rest": {"macs": 20.0, "milliseconds": 3.0},
            **{"engine_size": 0.72, "parameters": 0.71, "macs": share, "foretold": 0.74},
        }
    return {
        "budgets": budgets,
        "engine_bytes": {"dense": 10_000_000, "latency": 7_200_000, "macs": 7_200_000},
        "control": {"trustworthy": True, "differs": []},
    }


def test_the_tables_of_speed() -> None:
    found = _speed()
    lines = report.speed_tables(found)
    assert lines[0] == "| | dense | `latency=0.75` | `macs=0.7` | dense again |"
    assert lines[3].startswith("| ÷ dense | | **0.700** [0.700, 0.700] | **0.800** [")
    assert "| engine file, MB | 10.0 | 7.2 | 7.2 | |" in lines
    assert "| neurons | 0 | 2 | 50% | 60.0% | 60.0% | 50.0% | 16.7% | **no** |" in lines
    assert "| neurons | 0 | 2 | 50% | 20.0% | 10.0% | 0.0% | 0.0% | – |" in lines
    assert "| all else | | | 100% | 20.0% | 30.0% | 0.0% | 0.0% | |" in lines
    assert "Reached: 0.700 [0.700, 0.700] of the dense time." in report.verdict(found)
    assert not any("control" in line for line in lines)
    found["control"] = {"trustworthy": False, "differs": ["unet"]}
    assert any("**The control differs** in unet" in line for line in report.speed_tables(found))


@pytest.mark.parametrize(
    ("ratio", "low", "high", "said"),
    [
        (0.76, 0.75, 0.77, "Reached: 0.760 [0.750, 0.770] of the dense time."),
        (0.76, 0.74, 0.78, "Reached: 0.760 [0.740, 0.780] of the dense time, though"),
        (0.78, 0.76, 0.80, "Not reached: 0.780 [0.760, 0.800] of the dense time, though"),
        (0.79, 0.78, 0.80, "Not reached: 0.790 [0.780, 0.800] of the dense time."),
    ],
)
def test_the_verdict(ratio: float, low: float, high: float, said: str) -> None:
    found = _speed()
    comparison = found["budgets"]["latency"]["measures"]["unet"]["sparse_to_dense"]
    comparison |= {"ratio": ratio, "low": low, "high": high, "verdict": "lower"}
    assert said in report.verdict(found)


def _answer(right: int, distance: float) -> dict[str, Any]:
    scores = {"prompt_accuracy": [1.0] * right + [0.0] * (10 - right)}
    return {
        **{"parameters": 0.7, "macs": 0.7, "latency": None, "zeros": 0.0},
        **{"scores": scores, "drift": {"psnr": [30.0] * 10}, "cpu_seconds": {"make": 1.0}},
        "distances": [distance, *(distance + np.linspace(-0.1, 0.1, 5))],
    }


def test_quality_from_answers_to_tables(tmp_path: Path) -> None:
    floor = _answer(10, 0.25)
    dense = {"scores": floor["scores"], "floor": {**floor, "scores": _answer(9, 0)["scores"]}}
    (tmp_path / "points").mkdir()
    (tmp_path / one_point.DENSE).write_text(json.dumps(dense))
    for point, answer in (
        (Point("magnitude", "macs", 0.7), _answer(6, 1.25)),
        (Point("obs", "latency", 0.75, "2:4", tuned=True), _answer(9, 0.5)),
    ):
        answer_file(tmp_path, point).write_text(json.dumps(answer))
    rows, read = report.read_quality(tmp_path)
    assert read == dense
    assert [row.figures["above_floor"].value for row in rows] == pytest.approx([1.0, 0.25])
    assert rows[0].figures["prompt_accuracy_difference"].value == pytest.approx(-0.4)
    assert rows[0].shares == {"parameters": 0.7, "macs": 0.7, "zeros": 0.0}
    lines = report.quality_tables(rows, dense)
    assert "accuracy 1.000; from other seeds 0.900, at a Fréchet distance of 0.250" in lines[0]
    assert "| `magnitude` |  | 0.600, 1.000 |  |" in lines
    assert "| `magnitude`, refit |  |  |  |" in lines
    (tuned,) = (line for line in lines if line.startswith("| `obs`, then 2:4, tuned |"))
    assert tuned.startswith("| `obs`, then 2:4, tuned |  | 0.900 [")
    table = list(csv.DictReader(io.StringIO(report.as_csv([*report.quality_rows(rows)]))))
    assert table[0] == {
        **{"part": "quality", "what": "macs 0.7 magnitude", "figure": "parameters"},
        **{"value": "0.7", "low": "", "high": ""},
    }


def test_nothing_is_measured_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.read_quality(tmp_path) == ([], None)
    report.write(tmp_path, 2, {"macs 0.7 obs": "Error: no"}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == {}
    assert "FAILED macs 0.7 obs: Error: no" in capsys.readouterr().out


def test_tables_are_put_between_their_comments() -> None:
    text = "a\n<!-- mini -->\nold\n<!-- end of mini -->\nb\n"
    there = report.put_in(text, {"mini": ["| 1 |"], "full": ["| 2 |"]})
    assert there == "a\n<!-- mini -->\n\n| 1 |\n\n<!-- end of mini -->\nb\n"
    assert report.put_in(there, {"mini": ["| 1 |"]}) == there


def test_the_readme_has_a_place_for_every_table() -> None:
    text = (measure.HERE / "README.md").read_text(encoding="utf-8")
    for name in measure.ALL:
        assert f"<!-- {name} -->" in text
        assert f"<!-- end of {name} -->" in text
