"""What commands print about figures and about this machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from rich.console import Console

import export.backends
from sdcompress.commands import _tables, doctor
from tests.sample_run import ROUNDS, comparison, sample_results

SLOWER = tuple(1.3 * x for x in ROUNDS)


def printed(results: object, capsys: pytest.CaptureFixture[str]) -> str:
    _tables.print_measures(Console(width=200), results)  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_figures_not_to_be_trusted_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "do not trust" not in printed(sample_results(), capsys)
    said = printed(sample_results(control=SLOWER), capsys)
    assert "do not trust these figures: the dense engine differed from itself (picture, " in said


def test_what_only_the_control_excuses_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    results = sample_results()
    within = comparison(0.9, 0.85, 0.95).model_copy(update={"verdict": "no difference"})
    picture = results.measures["picture"].model_copy(update={"sparse_to_dense": within})
    results = results.model_copy(update={"measures": {**results.measures, "picture": picture}})
    lines = printed(results, capsys).splitlines()
    marked = [line.split()[0] for line in lines if "no difference (within the control)" in line]
    assert marked == ["picture"]


def test_an_engine_without_bytes_has_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    results = sample_results()
    engine = results.engines["dense"].model_copy(update={"bytes": 0})
    results = results.model_copy(update={"engines": {"dense": engine, "sparse": engine}})
    (line,) = [s for s in printed(results, capsys).splitlines() if "engine files" in s]
    assert "–" in line


@pytest.mark.parametrize(
    ("problem", "gpu", "state", "ok"),
    [
        (None, False, "builds here, needs a GPU to run", True),
        (None, True, "runs here", True),
        ("not installed", False, "not installed", False),
    ],
)
def test_an_engine_builder_without_a_gpu_does_not_run_here(
    monkeypatch: pytest.MonkeyPatch, problem: str | None, gpu: bool, state: str, ok: bool
) -> None:
    backend = SimpleNamespace(available=lambda: problem)
    monkeypatch.setattr(export.backends, "load_backend", lambda name: backend)
    card = doctor.Finding(name="GPU", state="", ok=gpu)
    found = {f.name: (f.state, f.ok) for f in doctor._backends(card)}
    assert found["backend tensorrt_rtx"] == (state, ok)
    assert found["backend onnxruntime"] == (problem or "runs here", problem is None)
