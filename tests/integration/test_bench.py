"""The whole measurement on a tiny pipeline, with real processes and a real engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from export.bench import bench, ddim_steps
from export.comparison import PEAK, TIMED
from sdcompress.build_report import BUILD_REPORT
from sdcompress.bundle import Bundle, seal, write_json
from sdcompress.errors import InputError, SdcompressError, UsageError, VerificationError
from sdcompress.results import Results
from tests.sample_run import build_report

QUICK = {"rounds": 2, "steps": 2, "budget": 0.01}


@pytest.fixture(scope="module")
def results(engine: Bundle, engine_sparse: Bundle) -> Results:
    return bench(engine, engine_sparse, command="sdcompress bench a b", **QUICK)


def test_everything_is_measured_once_a_round(results: Results) -> None:
    assert set(results.measures) in ({*TIMED, PEAK}, set(TIMED))
    for measure in results.measures.values():
        for series in (measure.dense, measure.sparse, measure.control):
            assert len(series.rounds) == 2
            assert 0 < series.p50 <= series.p95 <= series.p99


def test_results_say_how_where_and_on_what(
    results: Results, engine: Bundle, engine_sparse: Bundle, tmp_path: Path
) -> None:
    assert results.engines["dense"].digest == engine.digest
    assert results.engines["sparse"].digest == engine_sparse.digest
    assert results.engines["dense"].bytes > 100_000
    assert results.recipe == "two-to-four"
    assert results.engines["sparse"].sparse_kernels.used == 0
    assert results.engines["dense"].device_memory is None
    assert results.engines["dense"].device_memory_sequential is None
    assert results.engines["dense"].plans == {}
    assert results.telemetry == ()
    assert (results.setup.residency, results.setup.timer) == ("resident", "wall clock")
    assert (results.setup.rounds, results.setup.steps) == (2, 2)
    assert (results.setup.height, results.setup.width) == (16, 16)
    assert results.environment.cores >= 1
    assert "onnxruntime" in results.environment.versions
    assert results.sparsity is not None
    assert results.sparsity.together.zeros > 0
    (tmp_path / "results.json").write_text(results.model_dump_json())
    assert Results.read(tmp_path / "results.json") == results


def test_memory_is_reported_for_both_residencies(results: Results) -> None:
    for engine in results.engines.values():
        resident, sequential = engine.peak_memory["resident"], engine.peak_memory["sequential"]
        assert 10e6 < sequential < 1.2 * resident  # mostly the runtime's own, for a tiny model
    dense = results.engines["dense"].peak_memory["resident"]
    assert dense == int(results.measures[PEAK].dense.median)


def test_one_component_at_a_time(engine: Bundle, engine_sparse: Bundle) -> None:
    results = bench(engine, engine_sparse, residency="sequential", **QUICK)
    assert results.setup.residency == "sequential"
    assert set(results.engines["sparse"].peak_memory) == {"resident", "sequential"}
    dense = results.engines["dense"].peak_memory["sequential"]
    assert dense == int(results.measures[PEAK].dense.median)
    # A picture loads every component, so it takes longer than its parts once they are loaded.
    assert results.measures["picture"].dense.p50 > results.measures["load"].dense.p50 * 0.5


@pytest.mark.parametrize("which", ["dense", "sparse"])
def test_an_engine_that_cannot_run_here_is_not_measured(
    engine: Bundle, engine_sparse: Bundle, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    from export.backends.onnxruntime import OnnxRuntimeBackend

    twins = {"dense": engine, "sparse": engine_sparse}
    bad = twins[which].manifest.details

    def why(self: object, details: object) -> str | None:
        return "no such GPU; get one" if details is bad else None

    monkeypatch.setattr(OnnxRuntimeBackend, "why_not_run", why)
    with pytest.raises(UsageError, match=f"{which}: cannot run here: no such GPU; get one"):
        bench(engine, engine_sparse, **QUICK)


def test_an_engine_of_other_sizes_is_not_measured(engine: Bundle, tmp_path: Path) -> None:
    shutil.copytree(engine.path, tmp_path / "fixed")
    sizes = {"images": 1, "guided": True, "height": 32, "width": 32}
    details = {**engine.manifest.details, "sizes": sizes}
    seal(tmp_path / "fixed", engine.manifest.model_copy(update={"details": details}))
    fixed = Bundle.open(tmp_path / "fixed")
    with pytest.raises(UsageError, match="build it again with --height 16 --width 16"):
        bench(fixed, fixed, **QUICK)


def test_the_control_is_the_dense_engine(results: Results) -> None:
    flagged = {
        name
        for name, m in results.measures.items()
        if m.control_to_dense.verdict != "no difference"
    }
    assert set(results.control.differs) == flagged
    assert results.control.trustworthy == (not flagged)


def test_progress_counts_processes(engine: Bundle) -> None:
    seen: list[tuple[int, int]] = []
    bench(engine, engine, guidance=1.0, progress=lambda *step: seen.append(step), **QUICK)
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_linear_update_is_diffusers_ddim(
    engine: Bundle, tmp_path: Path, prediction: str
) -> None:
    import json

    import torch
    from diffusers import DDIMScheduler

    config = json.loads((engine.path / "scheduler" / "scheduler_config.json").read_text())
    config["prediction_type"] = prediction
    write_json(tmp_path / "scheduler_config.json", config)
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(5)
    rng = np.random.default_rng(0)
    expected = torch.from_numpy(rng.standard_normal((1, 4, 8, 8)))
    ours = expected.numpy()
    for step, t in zip(ddim_steps(tmp_path, 5), scheduler.timesteps, strict=True):
        predicted = rng.standard_normal((1, 4, 8, 8))
        expected = scheduler.step(torch.from_numpy(predicted), t, expected).prev_sample
        ours = step["a"] * ours + step["b"] * predicted
        assert step["timestep"] == t
        np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6, atol=1e-6)


def test_a_worker_imports_no_torch_and_no_onnx(engine: Bundle) -> None:
    import subprocess
    import sys

    code = (
        "import sys, export.bench_worker;"
        "from export.backends import open_component;"
        f"from pathlib import Path; open_component(Path({str(engine.path)!r}), 'unet').load();"
        "print({'torch', 'onnx', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def altered(engine: Bundle, to: Path, file: str, content: bytes) -> Bundle:
    """A copy of an engine with other content in one file, sealed anew."""
    shutil.copytree(engine.path, to)
    (to / file).write_bytes(content)
    seal(to, engine.manifest)
    return Bundle.open(to)


def test_an_engine_that_does_not_load_is_one_clear_line(engine: Bundle, tmp_path: Path) -> None:
    broken = altered(engine, tmp_path / "broken", "unet/model.onnx", b"no graph")
    with pytest.raises(SdcompressError, match=r"sparse: .*cannot load it") as caught:
        bench(engine, broken, **QUICK)
    assert "\n" not in str(caught.value)


def test_an_engine_that_gives_nan_is_not_timed(engine: Bundle, tmp_path: Path) -> None:
    file = "vae_decoder/model.onnx_data"
    nan = np.full((engine.path / file).stat().st_size // 4, np.nan, np.float32)
    broken = altered(engine, tmp_path / "broken", file, nan.tobytes())
    with pytest.raises(SdcompressError, match="NaN or infinity"):
        bench(engine, broken, **QUICK)


def test_an_engine_that_is_not_what_its_manifest_says_is_refused(
    engine: Bundle, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(engine.path, changed)
    (changed / "unet" / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"unet/config\.json"):
        bench(engine, Bundle.open(changed), **QUICK)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("options", {"threads": 1}),
        ("opset", 19),
        ("target", "rtx-4090"),
        ("kept_fp32", {"unet": ["mid_block.resnets.0.conv1"]}),
    ],
)
def test_engines_of_different_settings_are_not_compared(
    engine: Bundle, tmp_path: Path, fact: str, value: object
) -> None:
    other = tmp_path / "other"
    shutil.copytree(engine.path, other)
    details = {**engine.manifest.details, fact: value}
    seal(other, engine.manifest.model_copy(update={"details": details}))
    with pytest.raises(UsageError, match=f"differ in {fact}"):
        bench(engine, Bundle.open(other), **QUICK)


def with_limits(engine: Bundle, to: Path, **limits: int | None) -> Bundle:
    """A copy of an engine that says with what its UNet was built in the end."""
    report = build_report({"unet": limits, "vae_decoder": {}})
    shutil.copytree(engine.path, to)
    write_json(to / BUILD_REPORT, report.model_dump(mode="json"))
    seal(to, engine.manifest)
    return Bundle.open(to)


def test_engines_whose_builds_ran_out_of_memory_apart_are_not_compared(
    engine: Bundle, tmp_path: Path
) -> None:
    dense = with_limits(engine, tmp_path / "dense", workspace_mb=512)
    sparse = with_limits(engine, tmp_path / "sparse", workspace_mb=1, optimization_level=2)
    expected = (
        "unet: one build ran out of memory .*'workspace_mb': 512, .*build both with "
        "--option workspace_mb=1 --option optimization_level=2$"
    )
    for twins in ((dense, sparse), (sparse, dense)):
        with pytest.raises(UsageError, match=expected.replace("512, ", "(512|1), ")):
            bench(*twins, **QUICK)


def test_graphs_are_no_engines(onnx_dense: Bundle, engine: Bundle) -> None:
    with pytest.raises(InputError, match="sdcompress build"):
        bench(engine, onnx_dense, **QUICK)


def test_one_round_is_refused(engine: Bundle) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        bench(engine, engine, rounds=1)
