"""What benchmarks/gpu does apart from measuring."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import full_size
from export.comparison import make_measures
from export.specs import COMPONENTS


def test_arguments() -> None:
    args = full_size.arguments(["--work", "w"])
    assert (args.rounds, args.batch, args.pixels) == (10, [2, 8], [512, 768])
    args = full_size.arguments(["--work", "w", "--batch", "4", "--pixels", "64", "128"])
    assert (args.batch, args.pixels) == ([4], [64, 128])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--work", "w", "--rounds", "1"], "at least 2"),
        (["--work", "w", "--batch", "3"], "even number"),
        (["--work", "w", "--batch", "0"], "even number"),
        ([], "--work"),
    ],
)
def test_wrong_arguments(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        full_size.arguments(argv)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def answers(milliseconds: float) -> list[dict[str, Any]]:
    return [
        {**{c: [milliseconds, milliseconds] for c in COMPONENTS}, "peak_anonymous_bytes": 0}
        for _ in range(3)
    ]


def memory(weights: int, peak: int | None) -> dict[str, Any]:
    return {**{c: {"weights": weights, "context": 0} for c in COMPONENTS}, "peak": peak}


def test_the_table(tmp_path: Path) -> None:
    measures = make_measures(
        {"dense": answers(10.0), "sparse": answers(8.0), "control": answers(10.0)}, COMPONENTS
    )
    held = {"dense": memory(2_000_000, 9_000_000), "sparse": memory(1_500_000, 6_000_000)}
    rows = full_size.table("Some Card", 512, 8, measures, held)
    full_size.write_csv(tmp_path / "t.csv", rows)
    with (tmp_path / "t.csv").open(newline="") as f:
        read = list(csv.DictReader(f))
    assert len(read) == 3 + 2 * 3 + 1
    assert list(read[1].values()) == [
        *("Some Card", "512", "8", "unet", "ms", "10.0", "8.0", "0.8", "0.8", "0.8"),
    ]
    by_name = {row["what"]: row for row in read}
    assert by_name["weights of unet"]["dense"] == "2.0"
    assert by_name["weights of unet"]["ratio"] == "0.75"
    assert by_name["context of unet"]["ratio"] == ""  # of nothing there is no ratio
    assert by_name["peak of all"]["sparse"] == "6.0"
    held["dense"]["peak"] = None
    assert len(full_size.table("Some Card", 512, 8, measures, held)) == 3 + 2 * 3


def test_files_are_named_after_the_card() -> None:
    assert full_size.file_name("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"
    assert full_size.file_name("Orin (nvgpu)") == "orin-nvgpu"


def test_without_a_gpu_it_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(type(full_size.BACKEND), "available", lambda self: "no GPU; get one")
    monkeypatch.setattr("sys.argv", ["full_size.py", "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit) as caught:
        full_size.main()
    assert caught.value.code == "this benchmark needs an NVIDIA GPU: no GPU; get one"
    assert not (tmp_path / "work").exists()
