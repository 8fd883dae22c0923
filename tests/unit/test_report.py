"""The page: what it says, what it never claims, and that it holds everything it shows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdcompress.bundle import Bundle, Manifest, SourceRecord, seal
from sdcompress.commands import cli
from sdcompress.errors import InputError
from sdcompress.packing import pack
from sdcompress.report import charts, picture_quality, write_report
from sdcompress.report.packs import read_packs
from sdcompress.report.page import Pair, amount, headline, percent, read_pairs, size, verdict
from sdcompress.results import Check, DeviceMemory
from tests.sample_run import (
    ROUNDS,
    comparison,
    make_run,
    sample_plan,
    sample_results,
    sample_structure,
)

FASTER = tuple(0.7 * x for x in ROUNDS)
SLOWER = tuple(1.3 * x for x in ROUNDS)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0.0 %"),
        (0.0001, "< 0.1 %"),
        (0.3845, "38.5 %"),
        (0.9999, "> 99.9 %"),
        (1.0, "100.0 %"),
    ],
)
def test_percent(value: float, expected: str) -> None:
    assert percent(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(12, "12 B"), (1500, "1.5 kB"), (2_413_000_000, "2.41 GB"), (999_000, "999.0 kB")],
)
def test_size(value: int, expected: str) -> None:
    assert size(value) == expected


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.1234, "ms", "0.123 ms"),
        (19.4, "ms", "19.4 ms"),
        (1234.5, "ms", "1234 ms"),
        (20_000, "ms", "20.00 s"),
        (2e6, "bytes", "2.0 MB"),
    ],
)
def test_amount(value: float, unit: str, expected: str) -> None:
    assert amount(value, unit) == expected


@pytest.mark.parametrize(
    ("c", "unit", "expected"),
    [
        (comparison(0.9, 0.8, 1.0), "ms", "no difference"),
        (comparison(0.9, 0.8, 0.95), "ms", "faster"),
        (comparison(1.2, 1.1, 1.3), "ms", "slower"),
        (comparison(0.9, 0.8, 0.95), "bytes", "smaller"),
        (comparison(1.2, 1.1, 1.3), "bytes", "larger"),
    ],
)
def test_verdict(c: object, unit: str, expected: str) -> None:
    assert verdict(c, unit) == expected  # type: ignore[arg-type]


def told(results: object, pairs: tuple[Pair, ...] = ()) -> str:
    plan = sample_plan()
    from sdcompress.plan import account

    return " ".join(headline(results, account(plan), pairs, plan))  # type: ignore[arg-type]


def test_the_headline_claims_nothing_where_there_is_no_difference() -> None:
    text = told(sample_results())
    assert "No difference in time for a picture" in text
    assert "No difference in peak memory" in text
    assert "unstructured zeros speed nothing up" in text
    assert "less" not in text


def test_the_headline_says_what_was_gained_and_lost() -> None:
    assert "30.0 % less time for a picture" in told(sample_results(sparse=FASTER))
    assert "30.0 % more time for a picture" in told(sample_results(sparse=SLOWER))


def test_the_headline_trusts_no_failed_control() -> None:
    text = told(sample_results(sparse=FASTER, control=SLOWER))
    assert "cannot be trusted" in text
    assert "% less time" not in text


def test_the_headline_names_the_sparsities() -> None:
    text = told(None)
    assert "Asked for 50.0 % zeros in UNet" in text
    assert "41.0 % of them really are zero, 34.1 % of the whole pipeline" in text
    assert "Nothing has been measured" in text


def test_the_headline_begins_with_a_failed_check() -> None:
    checks = [Check(name="zeros", passed=False, detail=""), Check(name="x", passed=True, detail="")]
    assert headline(None, None, (), None, checks)[0].startswith("Verification failed: zeros.")


def test_the_headline_speaks_of_the_pictures() -> None:
    def pair(psnr: float | None) -> Pair:
        return Pair("p", 0, "", "", (64, 64), psnr)

    assert "All 1 pictures are identical" in told(None, (pair(None),))
    assert "median PSNR of 20.0 dB (2 of 3 differ)" in told(
        None, (pair(None), pair(10.0), pair(30.0))
    )


def test_a_complete_run(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, sample_results()))
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "report.html"
    for part in ("Asked and done", "no rule matches", "down_blocks.3.attn.to_q.weight"):
        assert part in text
    for part in ("p95 10.2 ms", "no difference", "every position", "onnxruntime 1.31"):
        assert part in text
    assert text.count("data:image/png;base64,") == 4
    assert text.count("38.6 dB") == 3  # the headline and each pair
    assert "Nothing has been" not in text


def test_nothing_outside_the_page_is_asked_for(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path, sample_results())).read_text(encoding="utf-8")
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:|[\"'])\S", text)
    assert "<script" not in text
    assert "default-src 'none'" in text


def test_every_heading_table_and_picture_is_accessible(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path, sample_results())).read_text(encoding="utf-8")
    assert '<html lang="en">' in text
    assert all(" alt=" in tag for tag in re.findall(r"<img[^>]*>", text))
    assert all("scope=" in tag for tag in re.findall(r"<th[ >][^>]*>?", text))
    assert all("aria-label=" in tag for tag in re.findall(r"<svg[^>]*>", text))
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'aria-labelledby="([^"]+)"', text)) <= set(ids)


def test_hostile_names_and_prompts_are_text(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}'
    make_run(tmp_path, sample_results(model=evil), prompts=(evil,))
    (tmp_path / "recipe.yaml").write_text(f"# </pre>{evil}\n")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "{{ 7*7 }}" in text


def test_a_failed_control_is_said_loudly(tmp_path: Path) -> None:
    make_run(tmp_path, sample_results(control=SLOWER))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Do not trust these figures" in text


@pytest.mark.parametrize(("load", "said"), [(0.1, False), (None, False), (5.0, True)])
def test_a_busy_machine_is_said(tmp_path: Path, load: float | None, said: bool) -> None:
    results = sample_results()
    environment = results.environment.model_copy(update={"load_before": load})
    make_run(tmp_path, results.model_copy(update={"environment": environment}))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert ("The machine was already busy" in text) == said


def test_missing_parts_name_the_command_that_makes_them(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "verify.json").unlink()
    for picture in (tmp_path / "images" / "sparse").iterdir():
        picture.unlink()
    text = write_report(tmp_path).read_text(encoding="utf-8")
    for command in ("sdcompress bench", "sdcompress verify", "sdcompress run"):
        assert f"<code>{command}" in text
    assert "Asked and done" in text


def test_results_alone_make_a_page(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(sample_results().model_dump_json())
    assert "no difference" in write_report(tmp_path).read_text(encoding="utf-8")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sdcompress run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, sample_results())
    file = tmp_path / "images" / "sparse" / "00.png"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="a large red circle"):
        write_report(tmp_path)


def test_the_filled_area_of_the_chart_is_the_sparsity() -> None:
    plan = sample_plan()
    chart = str(charts.layers("UNet", plan.of("unet"), plan.parameters["unet"]))
    bars = re.findall(
        r'class="gone" x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', chart
    )
    area = sum(float(w) * float(h) for w, h in bars) / (charts.WIDTH * charts.HEIGHT)
    assert area == pytest.approx(20_480 / 50_000, rel=1e-3)
    assert "41.0 % of the component" in chart


def test_what_went_of_the_blocks(tmp_path: Path) -> None:
    structure = {"unet": sample_structure({"latency": 0.75})}
    make_run(tmp_path, sample_results(sparse=FASTER), structure=structure)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    for part in (
        "The UNet lost whole feed-forward neurons, attention heads and channels inside ResNet",
        "26.0 % of its parameters and 30.0 % of its multiply-accumulates are gone",
        "Asked for 50.0 % zeros in what is left of UNet",
        "The zeros take no part in that",
        "time, by the table",
        "×0.748",
        "time, measured",
        "All 6 blocks of the UNet",
        "2 of 3 blocks narrower",
        "up_blocks.0.resnets.0: 64 of 64 channels stay",
    ):
        assert part in text
    section = text[text.index('id="structure"') : text.index('id="zeros"')]
    assert re.findall(r'<td class="n">(×0\.750)</td>', section) == ["×0.750"]  # what was asked
    assert section.count("by budget") == 6
    assert "zeros speed nothing up" not in text


def test_ratios_of_blocks_and_no_zeros(tmp_path: Path) -> None:
    structure = sample_structure()
    text = " ".join(headline(None, None, (), None, structure={"unet": structure}))
    assert "30.0 % of its multiply-accumulates" in text
    assert "zeros" not in text
    make_run(tmp_path, structure={"unet": structure})
    section = write_report(tmp_path).read_text(encoding="utf-8").partition('id="zeros"')[0]
    assert section.count('<td class="n">25.0 %</td><td>magnitude</td>') == 6
    assert "time, " not in section


def test_a_run_of_whole_blocks_has_no_such_section(tmp_path: Path) -> None:
    assert 'id="structure"' not in write_report(make_run(tmp_path)).read_text(encoding="utf-8")


def test_the_filled_area_of_a_chart_of_blocks_is_what_went() -> None:
    channels = {n: b for n, b in sample_structure().blocks.items() if b.kind == "channels"}
    chart = str(charts.blocks("UNet", channels))
    bars = re.findall(
        r'class="gone" x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', chart
    )
    area = sum(float(w) * float(h) for w, h in bars) / (charts.WIDTH * charts.HEIGHT)
    assert area == pytest.approx((24 + 28) / 256, rel=1e-3)
    assert "2 of 3 blocks narrower; the filled area is 20.3 % of their channels" in chart


@pytest.mark.parametrize("spread", [1e-5, 0.01, 0.05, 0.2, 0.7, 3.0])
def test_the_axis_always_has_its_one_and_two_more_ticks(spread: float) -> None:
    ticks = charts._ticks(max(0.02, spread))
    assert 1.0 in ticks
    assert len(ticks) >= 3


def _build_report(sparse_layers: int | None, changed: bool | None, digest: str) -> dict[str, Any]:
    component = {
        "plan_bytes": 12_300_000,
        "plan_sha256": digest * 64,
        "seconds": 7.25,
        "layers_eligible": 42,
        "layers_sparse": sparse_layers,
        "log_generation": "10.x",
        "tactics": 80,
        "sparse_tactics": ["sm80_spmma_conv"] if sparse_layers else [],
        "fused_attention": 14,
        "context_bytes": 9_000_000,
        "context_from": "engine",
        "peak_build_bytes": None,
        "workspace_mb": 512,
        "optimization_level": None,
        "ladder": [{"workspace_mb": 1024, "optimization_level": None, "failed": "out of <memory>"}],
        "warnings": ["a <warning>"],
        "missing": [],
        "flag_changed_plan": changed,
    }
    runtime = {"module": "tensorrt", "version": "10.3.0", "os": "Linux", "machine": "aarch64"}
    return {
        "backend": "tensorrt",
        "runtime": {**runtime, "compute_capability": "8.7"},
        "target": "jetson-orin-nano",
        "options": {},
        "components": {"unet": component},
    }


def _engines(run: Path, dense: dict[str, Any], sparse: dict[str, Any]) -> None:
    for twin, report in (("dense", dense), ("sparse", sparse)):
        folder = run / "engine" / twin
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build_report.json").write_text(json.dumps(report))


def test_the_page_says_what_the_builder_did(tmp_path: Path) -> None:
    run = make_run(tmp_path, sample_results())
    _engines(run, _build_report(0, None, "a"), _build_report(3, True, "b"))
    page = write_report(run).read_text()
    assert "tensorrt 10.3.0 for jetson-orin-nano, compute capability 8.7" in page
    assert "the sparse plan differs from the dense one; sparse tactics:" in page
    assert "sm80_spmma_conv" in page
    assert "built again with less memory, because out of &lt;memory&gt;" in page
    assert "a &lt;warning&gt;" in page


def test_a_flag_without_effect_is_a_result(tmp_path: Path) -> None:
    run = make_run(tmp_path, sample_results())
    _engines(run, _build_report(None, False, "a"), _build_report(None, False, "a"))
    page = write_report(run).read_text()
    assert "<td>no</td>" in page
    assert "the plan has the same bytes without it" in page
    assert "the sparse plan is byte for byte the dense one" in page


@pytest.mark.parametrize(("workspace", "same"), [(512, True), (256, False)])
def test_builds_that_were_given_less_memory_are_told_apart(
    tmp_path: Path, workspace: int, same: bool
) -> None:
    run = make_run(tmp_path, sample_results())
    sparse = _build_report(3, True, "b")
    sparse["components"]["unet"]["workspace_mb"] = workspace
    _engines(run, _build_report(0, None, "a"), sparse)
    page = write_report(run).read_text()
    assert ("both engines with the same settings" in page) is same
    assert ("went on with less (UNet)" in page) is not same


def test_every_figure_of_device_memory_is_listed(tmp_path: Path) -> None:
    results = sample_results()
    held = DeviceMemory(weights=1_000_000, context=2_000_000, peak=3_000_000, process=4_000_000)
    engine = results.engines["dense"].model_copy(update={"device_memory": held})
    results = results.model_copy(update={"engines": {"dense": engine, "sparse": engine}})
    page = write_report(make_run(tmp_path, results)).read_text()
    expected = (
        "weights 1.0 MB, context 2.0 MB, peak 3.0 MB, of the process, as the driver counts it, "
        "4.0 MB"
    )
    assert page.count(expected) == 2


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        ("CPUExecutionProvider", "none: this engine runs on the CPU"),
        ("TensorRT 10.3.0 SM87", "unknown: nothing told"),
    ],
)
def test_device_memory_nobody_measured_is_not_none(
    tmp_path: Path, provider: str, said: str
) -> None:
    results = sample_results()
    engine = results.engines["dense"].model_copy(update={"providers": {"unet": provider}})
    results = results.model_copy(update={"engines": {"dense": engine, "sparse": engine}})
    page = write_report(make_run(tmp_path, results)).read_text()
    assert f"<dt>Device memory</dt><dd>{said}</dd>" in page


def test_a_broken_build_report_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, sample_results())
    _engines(run, {"backend": "tensorrt"}, {"backend": "tensorrt"})
    with pytest.raises(InputError, match=r"build_report.json: not a build report"):
        write_report(run)


def test_the_page_says_why_nothing_was_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path, sample_results())
    (run / "results.json").unlink()
    (run / "log.json").write_text('{"not_measured": "there is no <GPU>"}')
    page = write_report(run).read_text()
    assert "Built and not measured here: there is no &lt;GPU&gt;." in page
    assert "Nothing has been measured yet" not in page


def test_the_median_drift_of_the_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path, sample_results())
    pairs, _ = read_pairs(run)
    found = sorted(100.0 if p.psnr is None else p.psnr for p in pairs)
    middle = (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2
    assert picture_quality(run) == {"psnr": pytest.approx(middle)}
    assert picture_quality(tmp_path / "nothing") == {}


def test_figures_go_before_the_log(tmp_path: Path) -> None:
    """A device's results were brought back into a run that could not measure here."""
    run = make_run(tmp_path, sample_results())
    for kind in ("dense", "sparse"):
        (run / "images" / kind / "prompts.json").unlink()
    (run / "log.json").write_text('{"not_measured": "there is no <GPU>"}')
    page = write_report(run).read_text()
    assert "not measured here" not in page
    assert "No difference in time for a picture" in page
    assert "No pictures were made" in page
    assert "(there is no &lt;GPU&gt;)" in page
    assert "makes it" not in page


def test_what_the_packs_of_a_run_take(tiny_source: Bundle, pruned: Bundle, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pruned.path, run / "pruned")
    assert "sdcompress pack pruned -o pruned.sdz" in write_report(run).read_text()
    sizes = pack(pruned, run / "light.sdz")
    page = write_report(run).read_text()
    assert "Pruned weights <small><code>light.sdz" in page
    assert "sdcompress pack MODEL -o dense.sdz" in page
    assert f'<td class="n">{size(sizes.packed_bytes)}</td>' in page
    unet = next(f for f in sizes.files if f.file.startswith("unet/"))
    file = pruned.manifest.files[unet.file].size
    ((light,), _) = read_packs(run)
    original, packed = light.weights[unet.file]
    assert original == file
    assert unet.packed_bytes < packed < unet.packed_bytes + 10_000  # and the file's header
    assert f"UNet {size(packed)} of {size(file)}" in page

    dense = pack(tiny_source, run / "dense.sdz")
    of_another = _bundle_of_text(tmp_path / "other")
    pack(of_another, run / "other.sdz")
    found = {p.file: (p.what, p.original, p.packed) for p in read_packs(run)[0]}
    assert found == {
        "dense.sdz": ("Dense weights", dense.original_bytes, dense.packed_bytes),
        "light.sdz": ("Pruned weights", sizes.original_bytes, sizes.packed_bytes),
        "other.sdz": (None, found["other.sdz"][1], (run / "other.sdz").stat().st_size),
    }
    assert sizes.packed_bytes < dense.packed_bytes
    page = write_report(run).read_text()
    assert "pack MODEL" not in page
    assert "Not of this run, engine <small><code>other.sdz" in page


def _bundle_of_text(folder: Path) -> Bundle:
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    source = SourceRecord(id="other", kind="directory")
    seal(folder, Manifest(stage="engine", parent=None, source=source, tools={}))
    return Bundle.open(folder)


def test_a_damaged_pack_in_a_run_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "light.sdz").write_bytes(b"no pack")
    page = write_report(run).read_text()
    assert "Not read: light.sdz: expected a file made by" in page


def test_results_given_go_before_those_of_the_directory(tmp_path: Path) -> None:
    make_run(tmp_path, sample_results())
    (tmp_path / "given.json").write_text(sample_results(sparse=FASTER).model_dump_json())
    arguments = ["--results", tmp_path / "given.json", "-o", tmp_path / "other.html"]
    cli.main(["report", str(tmp_path), *map(str, arguments)], standalone_mode=False)
    assert "30.0 % less time for a picture" in (tmp_path / "other.html").read_text()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("backend", "recipe", "said"),
    [
        ("onnxruntime", "target: jetson-orin-nano", True),
        ("torch_cuda", "target: jetson-orin-nano", True),
        ("tensorrt", "target: jetson-orin-nano", False),
        ("onnxruntime", "name: demo", False),
        ("onnxruntime", "target: [", False),
    ],
)
def test_figures_of_another_machine_than_the_target(
    tmp_path: Path, backend: str, recipe: str, said: bool
) -> None:
    results = sample_results()
    engine = results.engines["sparse"].model_copy(update={"backend": backend})
    results = results.model_copy(update={"engines": {"dense": engine, "sparse": engine}})
    run = make_run(tmp_path, results)
    (run / "recipe.yaml").write_text(recipe)
    expected = (
        f"Measured with {backend} on a processor, which is not jetson-orin-nano: these figures "
        "say nothing about that; the script in device.tar measures there."
    )
    assert (expected in write_report(run).read_text()) is said


def test_zeros_with_a_pattern_are_not_called_unstructured() -> None:
    plan = sample_plan()
    layers = [layer.model_copy(update={"pattern": "2:4"}) for layer in plan.layers[:4]]
    mixed = plan.model_copy(update={"layers": (*layers, *plan.layers[4:])})
    text = " ".join(headline(sample_results(), None, (), mixed))
    assert "unstructured" not in text  # though one layer of four is
    assert "No kernel of this engine skips zeros." in text


def test_no_difference_because_of_the_control_is_said(tmp_path: Path) -> None:
    results = sample_results()
    within = comparison(0.9, 0.85, 0.95).model_copy(update={"verdict": "no difference"})
    picture = results.measures["picture"].model_copy(update={"sparse_to_dense": within})
    results = results.model_copy(update={"measures": {**results.measures, "picture": picture}})
    page = write_report(make_run(tmp_path, results)).read_text()
    assert page.count("(within the control)") == 1
    assert "95 % interval 0.850–0.950, within the control)" in page


def test_results_without_figures_still_make_a_page(tmp_path: Path) -> None:
    results = sample_results()
    engine = results.engines["dense"].model_copy(update={"bytes": 0})
    engines = {"dense": engine, "sparse": engine}
    results = results.model_copy(update={"measures": {}, "engines": engines})
    (tmp_path / "results.json").write_text(results.model_dump_json())
    assert "Speed and memory" in write_report(tmp_path).read_text()
