"""What benchmarks/criteria does apart from painting."""

from __future__ import annotations

import csv
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.criteria import measure, modelopt_peer, one_point, report
from benchmarks.criteria.points import (
    PEERS,
    Point,
    all_points,
    recipe,
    shared_layers,
    sparsity,
)
from benchmarks.criteria.verdicts import (
    Interval,
    Measured,
    at_least_as_good,
    closest,
    overall,
    ratio,
)
from sdcompress.catalog import Layer

OURS = {"unet": ["conv_in.weight", "mid.weight"], "text_encoder": ["fc.weight"]}
NARROW = {"unet": ["mid.weight"], "text_encoder": ["fc.weight"]}
MODES = dict(zip(PEERS, (NARROW, OURS), strict=True))
CRITERIA = ("magnitude", "obs_diff", "wanda")


def test_points_come_once_and_the_most_telling_first() -> None:
    points = all_points(CRITERIA, OURS)
    assert len(points) == 3 * 6 * 3 + 6  # the last: in packages, at 2:4 and 60 %
    assert points[:5] == [
        Point("magnitude", "unet", "2:4"),
        Point("obs_diff", "unet", "2:4"),
        Point("wanda", "unet", "2:4"),
        Point("obs_diff, 4 packages", "unet", "2:4"),
        Point("magnitude", "unet", "60%"),
    ]
    assert len({point.name for point in points}) == len(points)


def test_modelopt_is_compared_on_the_shared_layers_only_where_layers_differ() -> None:
    points = all_points(CRITERIA, OURS, MODES)
    assert {p.pattern for p in points if p.method in PEERS} == {"2:4"}
    assert [(p.method, p.components) for p in points if p.shared] == [
        ("magnitude", "unet"),
        ("obs_diff", "unet"),
        ("modelopt sparsegpt", "unet"),  # the other mode prunes just these
        ("magnitude", "both"),
        ("obs_diff", "both"),
        ("modelopt sparsegpt", "both"),
    ]
    assert shared_layers(OURS, MODES) == NARROW
    assert shared_layers(OURS, {}) == OURS


def test_names_are_good_for_files() -> None:
    assert Point("wanda", "both", "60%").name == "both-60-wanda"
    point = Point("modelopt sparsegpt", "unet", "2:4", shared=True)
    assert point.name == "unet-2to4-modelopt-sparsegpt-shared"


def test_recipes() -> None:
    whole = recipe(Point("wanda", "both", "30%"), OURS)
    assert whole.calibration.count == 64
    assert {
        component: [(r.layers, r.scope, r.criterion, r.pattern, r.sparsity) for r in section.rules]
        for component, section in whole.prune.items()
    } == {c: [("*", "all", "wanda", "unstructured", 0.3)] for c in ("text_encoder", "unet")}
    packages = recipe(Point("obs_diff, 4 packages", "unet", "60%"), OURS)
    assert packages.calibration.packages == 4
    assert packages.prune["unet"].rules[0].criterion == "obs_diff"
    shared = recipe(Point("magnitude", "unet", "2:4", shared=True), {"unet": ["a.weight", "b"]})
    assert [(r.layers, r.pattern) for r in shared.prune["unet"].rules] == [
        ("a.weight", "2:4"),
        ("b", "2:4"),
    ]
    assert [sparsity(p) for p in ("2:4", "70%")] == [0.5, 0.7]


def test_ratio_is_fiellers() -> None:
    # Variances 1 and 4 of unrelated resamples: (10 − 4k)² = 1.96² (1 + 4k²) has these two roots.
    a = np.array([10.0, *(10 + np.tile([1.0, -1.0], 2) * math.sqrt(0.75))])
    b = np.array([4.0, *(4 + np.repeat([2.0, -2.0], 2) * math.sqrt(0.75))])
    found = ratio(a, b)
    z = 1.96**2
    roots = np.roots([16 - 4 * z, -80, 100 - z])
    assert found.value == 2.5
    assert (found.low, found.high) == pytest.approx(tuple(sorted(roots)))


def test_ratio_to_what_may_be_nothing_has_no_upper_end() -> None:
    a = np.array([10.0, 10.1, 9.9, 10.1, 9.9])
    b = np.array([0.1, 0.3, 0.3, -0.1, -0.1])
    found = ratio(a, b)
    assert found.value == 100
    assert 10 < found.low < 100
    assert found.high == math.inf
    small = np.array([-0.5, -0.4, -0.6, -0.4, -0.6])
    assert ratio(small, b).value == -5
    assert ratio(small, b).low == -math.inf
    assert -5 < ratio(small, b).high < 0
    nothing = ratio(a, -b)
    assert nothing == Interval(math.inf, -math.inf, math.inf)
    assert nothing.as_json() == {"value": None, "low": None, "high": None}


def _measured(right: int, above: float, scatter: float = 0.01) -> Measured:
    accuracy = np.zeros(400)
    accuracy[:right] = 1
    wobble = np.tile([scatter, -scatter], 50)
    return Measured(accuracy, np.array([above, *(above + wobble)]))


@pytest.mark.parametrize(
    ("other", "accuracy", "distance"),
    [
        ((300, 0.4), "yes", "yes"),
        ((400, 0.1), "no", "no"),
        ((360, 0.2), "yes", "yes"),  # as good
    ],
)
def test_at_least_as_good(other: tuple[int, float], accuracy: str, distance: str) -> None:
    found = at_least_as_good(_measured(360, 0.2), _measured(*other))
    assert (found["accuracy"], found["distance"]) == (accuracy, distance)
    assert overall({"it": found}) == ("no" if accuracy == "no" else "yes")


def test_what_cannot_be_told_is_inconclusive() -> None:
    ours, other = _measured(200, 0.2), _measured(200, 0.2, scatter=0.1)
    turned = other._replace(accuracy=other.accuracy[::-1])  # right where ours is wrong
    found = at_least_as_good(ours, turned)
    assert found["accuracy_difference"].half_width > 0.05
    assert (found["accuracy"], found["distance"]) == ("inconclusive", "inconclusive")
    assert overall({"it": found}) == "inconclusive"
    assert overall({"it": found, "that": {"accuracy": "no", "distance": "yes"}}) == "no"


def test_closest() -> None:
    measured = {"magnitude": _measured(300, 0.9), "wanda": _measured(300, 0.3)}
    found = closest(measured)
    assert (found["method"], found["twice"]) == ("wanda", "yes")
    assert found["times"].value == pytest.approx(3)
    assert closest({**measured, "wanda": _measured(300, 0.5)})["twice"] == "no"
    assert closest({**measured, "wanda": _measured(300, 0.45, 0.1)})["twice"] == "inconclusive"
    assert closest({"magnitude": _measured(300, 0.9)})["twice"] == "no"


def test_what_modelopt_did_to_the_layers() -> None:
    kept = torch.tensor([[1.0, 0, 2, 0], [1, 1, 1, 0]])
    layers = [
        Layer("unet", "a.weight", "linear", (2, 4), "F16", None),
        Layer("unet", "conv_in.weight", "conv", (1, 4, 1, 2), "F16", None),
        Layer("unet", "conv_out.weight", "conv", (1, 4, 1, 1), "F16", None),
    ]
    conv = torch.tensor([[[[1.0, 0]], [[1, 1]], [[1, 0]], [[0, 0]]]])
    warned = ["Skipping sparsifying conv_out of size=torch.Size([1, 4, 1, 1])"]
    found = modelopt_peer.describe(layers, {"a.weight": kept, "conv_in.weight": conv}, warned)
    assert found["layers"] == ["a.weight", "conv_in.weight"]
    assert found["left_out"] == {"conv_out.weight": warned[0]}
    assert found["kinds"] == {
        "linear": {"weights": 8, "zeros": 3, "groups": 2, "groups_violated": 1},
        "conv": {"weights": 8, "zeros": 4, "groups": 2, "groups_violated": 1},
    }


def test_distances_are_resampled_alike() -> None:
    features = np.random.default_rng(0).normal(size=(40, 3))
    same = one_point.distances(features, features)
    assert len(same) == 101
    assert max(same) == pytest.approx(0, abs=1e-9)
    moved = one_point.distances(features + np.array([2.0, 0, 0]), features)
    assert moved == pytest.approx([4.0] * 101)


def test_a_task_that_fails_does_not_end_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("no\nsuch thing")

    failed: dict[str, str] = {}
    with ThreadPoolExecutor(1) as pool:
        measure.run(pool, {"bad": (fail, ()), "good": (int, ())}, failed)
    assert failed == {"bad": "ValueError: no such thing"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[1/2] bad: FAILED, ValueError: no such thing; ")
    assert lines[1].startswith("[2/2] good; ")


def test_a_folder_keeps_to_one_protocol(tmp_path: Path) -> None:
    measure.check_protocol(tmp_path, 4)
    measure.check_protocol(tmp_path, 4)
    with pytest.raises(SystemExit, match="choose another DIR"):
        measure.check_protocol(tmp_path, 5)


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="No module named no_such"):
        measure.in_its_own_process("no_such")


def _answer(right: int, distance: float, n: int = 20) -> dict[str, Any]:
    accuracy = [1.0] * right + [0.0] * (n - right)
    return {
        "sparsity": {"of_layers_pruned": 0.5, "of_components": 0.4},
        "scores": {"prompt_accuracy": accuracy, "clip_score": [0.9] * n},
        "drift": {"psnr": [30.0] * n},
        "distances": [distance, *(distance + 0.01 * (-1) ** i for i in range(10))],
        "cpu_seconds": {"make": 1.0, "paint": 20.0, "measure": 2.0},
    }


def test_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    dense = {**_answer(20, 0), "floor": _answer(19, 0.1)}
    points = all_points(("magnitude", "obs_diff"), OURS)
    for point in points[:-1]:
        file = one_point.point_file(work, point)
        file.parent.mkdir(parents=True, exist_ok=True)
        better = point.method == "obs_diff"
        answer = _answer(20 if better else 10, 0.2 if better else 0.6)
        file.write_text(json.dumps(answer))
    (work / one_point.DENSE).write_text(json.dumps(dense))
    report.write(work, points, {"some point": "ValueError: why"}, 20, out)
    results = json.loads((out / "results.json").read_text())
    assert results["floor"]["prompt_accuracy_difference"]["value"] == -0.05
    assert results["missing"] == [str(points[-1])]
    assert results["failed"] == {"some point": "ValueError: why"}
    first = results["points"][0]
    assert (first["method"], first["components"], first["pattern"]) == ("magnitude", "unet", "2:4")
    assert first["figures"]["prompt_accuracy_difference"]["value"] == -0.5
    assert first["figures"]["above_floor"]["value"] == pytest.approx(0.5)
    verdict = results["verdicts"]["unet 2:4"]
    assert verdict["obs_diff"]["at_least_as_good"] == "yes"
    assert verdict["obs_diff, 4 packages"]["at_least_as_good"] == "no"
    assert verdict["closest"]["method"] == "obs_diff"
    assert verdict["closest"]["times"]["value"] == pytest.approx(5)
    assert "unet 2:4 magnitude: prompt_accuracy: ±0.2" in "\n".join(results["wide"])
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert len(rows) == len(points) - 1
    assert {row["pattern"] for row in rows} == {"2:4", "30%", "40%", "50%", "60%", "70%"}
    assert (rows[1]["prompt_accuracy"], rows[1]["cpu_seconds"]) == ("1.0", "23.0")
    assert "</svg>" in (out / "quality.svg").read_text()
    said = capsys.readouterr().out
    assert "unet 2:4: obs_diff at least as good as every published method: yes" in said
    assert "closest is obs_diff, 5.0 [" in said
    assert "FAILED some point: ValueError: why" in said
