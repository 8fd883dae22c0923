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


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_no_document_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match="schema version 1"):
        Results.read(tmp_path / "results.json")


def test_a_missing_file_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sdcompress bench"):
        Results.read(tmp_path / "results.json")
