"""results.json: what is written can be read back, and anything else is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from sdcompress.errors import InputError
from sdcompress.results import Results
from tests.sample_run import sample_results


def test_round_trip(tmp_path: Path) -> None:
    results = sample_results()
    (tmp_path / "results.json").write_text(results.model_dump_json())
    assert Results.read(tmp_path / "results.json") == results


def test_what_version_0_1_0_wrote_is_read(tmp_path: Path) -> None:
    old = json.loads(sample_results().model_dump_json())
    newer = {
        "": ("telemetry", "quality"),
        "setup": ("residency", "timer"),
        "engines": ("peak_memory", "device_memory_sequential", "plans"),
    }
    memory = {"weights": 1, "context": 2, "peak": 3}
    for engine in old["engines"].values():
        engine["device_memory"] = memory
    for where, names in newer.items():
        holders = old["engines"].values() if where == "engines" else [old[where] if where else old]
        for holder in holders:
            for name in names:
                del holder[name]
    (tmp_path / "results.json").write_text(json.dumps(old))
    read = Results.read(tmp_path / "results.json")
    assert (read.setup.residency, read.setup.timer, read.quality) == ("resident", "wall clock", {})
    assert read.plans_identical is None


def test_the_schema_accepts_it(tmp_path: Path) -> None:
    results = sample_results()
    jsonschema.validate(json.loads(results.model_dump_json()), Results.model_json_schema())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"unknown": 1}, "unknown"),
        ({"measures": {"picture": {}}}, "measures.picture"),
    ],
)
def test_another_document_is_refused(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**json.loads(sample_results().model_dump_json()), **change}))
    with pytest.raises(InputError, match=expected) as caught:
        Results.read(file)
    assert "\n" not in str(caught.value)


RATIO = "measures.picture.sparse_to_dense"


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        (f"{RATIO}.ratio", 0, "greater than 0"),
        (f"{RATIO}.ratio", -1.0, "greater than 0"),
        (f"{RATIO}.ratio", "1", "valid number"),
        (f"{RATIO}.ratio", float("nan"), "finite number"),
        (f"{RATIO}.high", float("inf"), "finite number"),
        (f"{RATIO}.high", 0.5, "lies outside its interval"),
        (f"{RATIO}.low", 1.5, "lies outside its interval"),
        (f"{RATIO}.verdict", "lower", "1 lies inside the interval"),
        ("measures.picture.dense.rounds", [], "at least 1 item"),
        ("measures.picture.dense.rounds", [1.0, -1.0], "greater than 0"),
        ("measures.picture.dense.p95", "12", "valid number"),
        ("engines.sparse.bytes", -1, "greater than or equal to 0"),
        ("engines.sparse.bytes", "5", "valid integer"),
        ("engines.sparse.device_memory", {"peak": -1}, "greater than or equal to 0"),
        ("engines.sparse.sparse_kernels.used", -1, "greater than or equal to 0"),
        ("engines.sparse.peak_memory", {"resident": -1}, "greater than or equal to 0"),
        ("quality", {"psnr": float("inf")}, "finite number"),
        ("quality", {"psnr": "30"}, "valid number"),
        ("control.trustworthy", "yes", "valid boolean"),
    ],
)
def test_impossible_figures_are_refused(
    tmp_path: Path, where: str, value: object, expected: str
) -> None:
    document = json.loads(sample_results().model_dump_json())
    *parents, last = where.split(".")
    place = document
    for name in parents:
        place = place[name]
    place[last] = value
    file = tmp_path / "results.json"
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match=expected) as caught:
        Results.read(file)
    assert "\n" not in str(caught.value)


def test_both_engines_are_needed(tmp_path: Path) -> None:
    document = json.loads(sample_results().model_dump_json())
    del document["engines"]["dense"]
    (tmp_path / "results.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="engines: dense missing"):
        Results.read(tmp_path / "results.json")


def test_noise_in_the_last_digit_is_no_contradiction(tmp_path: Path) -> None:
    document = json.loads(sample_results().model_dump_json())
    one = document["measures"]["picture"]["sparse_to_dense"]
    one.update(ratio=0.9, low=0.9 + 1e-15, high=0.95, verdict="lower")
    (tmp_path / "results.json").write_text(json.dumps(document))
    assert Results.read(tmp_path / "results.json").measures["picture"].sparse_to_dense.ratio == 0.9


@pytest.mark.parametrize("content", [b"\xff\xfe", bytes(range(256))])
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(InputError, match="schema version 1") as caught:
        Results.read(tmp_path / "results.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_no_document_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match="schema version 1"):
        Results.read(tmp_path / "results.json")


def test_a_missing_file_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sdcompress bench"):
        Results.read(tmp_path / "results.json")
