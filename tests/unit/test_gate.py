"""What passes the gate, what does not, and what the command says and ends with."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import click
import pytest

from sdcompress.commands import cli
from sdcompress.errors import InputError, UsageError, VerificationError
from sdcompress.gate import gate
from sdcompress.recipe import Gates
from sdcompress.results import Check, Control, DeviceMemory, Results, SparseKernels
from tests.sample_run import comparison, sample_results
from tests.unit.test_device_results import document


def results(
    *,
    latency: tuple[float, float, float] = (0.9, 0.85, 0.94),
    memory: tuple[float, float, float] = (0.98, 0.97, 0.99),
    differs: tuple[str, ...] = (),
    dense: dict[str, Any] | None = None,
    sparse: dict[str, Any] | None = None,
    quality: dict[str, float] | None = None,
    without: str = "",
) -> Results:
    """Results with these ratios (median, lower and upper end); `dense` and `sparse` change them."""
    sample = sample_results()
    measures = dict(sample.measures)
    for name, ratio in (("picture", latency), ("peak_memory", memory)):
        measures[name] = measures[name].model_copy(update={"sparse_to_dense": comparison(*ratio)})
    measures.pop(without, None)
    engines = {
        twin: sample.engines[twin].model_copy(update=changes or {})
        for twin, changes in (("dense", dense), ("sparse", sparse))
    }
    control = Control(trustworthy=not differs, differs=differs, confidence=0.99)
    return sample.model_copy(
        update={
            "measures": measures,
            "engines": engines,
            "control": control,
            "quality": quality or {},
        }
    )


def only(found: tuple[Check, ...]) -> tuple[bool, str]:
    (check,) = found
    return check.passed, check.detail


@pytest.mark.parametrize(
    ("limit", "by_median", "passed"),
    [
        (0.94, False, True),  # exactly the upper end
        (0.939, False, False),
        (0.9, True, True),  # exactly the median
        (0.899, True, False),
        (0.92, False, False),  # the median is within, the interval is not
        (0.92, True, True),
    ],
)
def test_latency_by_interval_or_median(limit: float, by_median: bool, passed: bool) -> None:
    found = gate(results(), Gates(latency=limit), by_median=by_median)
    assert only(found)[0] is passed
    assert found[0].name == "latency"


def test_the_reason_names_the_figures() -> None:
    assert only(gate(results(), Gates(latency=0.92))) == (
        False,
        "picture 0.900 [0.850, 0.940] of the dense engine's; the upper end 0.940 is above 0.92",
    )
    assert only(gate(results(), Gates(latency=0.92), by_median=True)) == (
        True,
        "picture 0.900 [0.850, 0.940] of the dense engine's; the median 0.900 is within 0.92",
    )


@pytest.mark.parametrize("by_median", [False, True])
def test_a_busy_machine_proves_no_latency(by_median: bool) -> None:
    busy = results(differs=("load", "unet_step"))
    passed, detail = only(gate(busy, Gates(latency=9.0), by_median=by_median))
    assert not passed
    assert "the dense engine differed from itself (load, unet step)" in detail
    # Memory is another question, unless it is memory that differed.
    assert only(gate(busy, Gates(memory=0.99)))[0]
    passed, detail = only(gate(results(differs=("peak_memory",)), Gates(memory=9.0)))
    assert not passed
    assert "cannot be trusted" in detail


def test_no_picture_was_timed() -> None:
    passed, detail = only(gate(results(without="picture"), Gates(latency=9.0)))
    assert not passed
    assert "sdcompress bench" in detail


@pytest.mark.parametrize(("limit", "passed"), [(0.99, True), (0.985, False)])
def test_memory_of_the_process(limit: float, passed: bool) -> None:
    assert only(gate(results(), Gates(memory=limit)))[0] is passed


@pytest.mark.parametrize(("limit", "passed"), [(0.75, True), (0.74, False)])
def test_device_memory_goes_first(limit: float, passed: bool) -> None:
    on_device = results(
        dense={"device_memory": DeviceMemory(peak=4000)},
        sparse={"device_memory": DeviceMemory(peak=3000)},
        differs=("peak_memory",),
    )
    word = "within" if passed else "above"
    detail = f"peak device memory 0.750 of the dense engine's is {word} {limit}"
    assert only(gate(on_device, Gates(memory=limit))) == (passed, detail)


@pytest.mark.parametrize(
    ("dense", "sparse"),
    [
        (DeviceMemory(peak=4000), DeviceMemory(weights=1)),
        (DeviceMemory(peak=4000), None),
        (DeviceMemory(weights=1), DeviceMemory(weights=1)),
    ],
)
def test_memory_of_the_host_says_nothing_about_a_device(
    dense: DeviceMemory, sparse: DeviceMemory | None
) -> None:
    half = results(dense={"device_memory": dense}, sparse={"device_memory": sparse})
    passed, detail = only(gate(half, Gates(memory=9.0)))
    assert not passed
    assert "the peak device memory is unknown" in detail


@pytest.mark.parametrize(("rounds", "passed"), [(2, False), (5, False), (6, True)])
def test_few_rounds_give_no_interval(rounds: int, passed: bool) -> None:
    few = results()
    picture = few.measures["picture"]
    short = picture.sparse.model_copy(update={"rounds": picture.sparse.rounds[:rounds]})
    few.measures["picture"] = picture.model_copy(update={"sparse": short})
    found, detail = only(gate(few, Gates(latency=0.95)))
    assert found is passed
    assert (f"{rounds} rounds give no interval" in detail) is not passed
    assert only(gate(few, Gates(latency=0.95), by_median=True))[0]


def test_one_component_at_a_time_is_compared_with_its_like() -> None:
    on_device = results(
        dense={
            "device_memory": DeviceMemory(peak=1000),
            "device_memory_sequential": DeviceMemory(peak=500),
        },
        sparse={
            "device_memory": DeviceMemory(peak=1000),
            "device_memory_sequential": DeviceMemory(peak=400),
        },
    )
    assert not only(gate(on_device, Gates(memory=0.8)))[0]
    in_turn = on_device.model_copy(
        update={"setup": on_device.setup.model_copy(update={"residency": "sequential"})}
    )
    assert only(gate(in_turn, Gates(memory=0.8)))[0]


@pytest.mark.parametrize(("dense", "sparse"), [(1000, 0), (0, 1000), (0, 0)])
def test_a_peak_that_did_not_rise_is_unknown(dense: int, sparse: int) -> None:
    lost = results(
        dense={"device_memory": DeviceMemory(peak=dense)},
        sparse={"device_memory": DeviceMemory(peak=sparse)},
    )
    passed, detail = only(gate(lost, Gates(memory=9.0)))
    assert not passed
    assert "measure again" in detail


def test_memory_was_not_measured() -> None:
    assert not only(gate(results(without="peak_memory"), Gates(memory=9.0)))[0]


@pytest.mark.parametrize(("limit", "passed"), [(0.6, True), (0.59, False)])
def test_size(limit: float, passed: bool) -> None:
    smaller = results(dense={"bytes": 1000}, sparse={"bytes": 600})
    assert only(gate(smaller, Gates(size=limit)))[0] is passed


def test_no_size_to_compare_with() -> None:
    passed, detail = only(gate(results(dense={"bytes": 0}), Gates(size=9.0)))
    assert not passed
    assert "0 bytes" in detail


@pytest.mark.parametrize(
    ("psnr", "passed", "detail"),
    [
        (20.0, True, "20.00 dB is at least 20"),
        (100.0, True, "100.00 dB is at least 20"),
        (19.99, False, "19.99 dB is below 20"),
        (float("nan"), False, "nan dB is below 20"),
    ],
)
def test_quality(psnr: float, passed: bool, detail: str) -> None:
    assert only(gate(results(quality={"psnr": psnr}), Gates(psnr=20))) == (passed, detail)


def test_missing_quality_has_failed_and_says_how_to_get_it() -> None:
    passed, detail = only(gate(results(), Gates(psnr=1)))
    assert not passed
    assert "`sdcompress run` with 'pictures' in the recipe" in detail


@pytest.mark.parametrize(
    ("used", "asked", "passed"), [(3, 3, True), (2, 3, False), (0, 0, True), (None, 0, False)]
)
def test_sparse_layers(used: int | None, asked: int, passed: bool) -> None:
    kernels = SparseKernels(used=used, of=4, how="the builder's log")
    found = gate(results(sparse={"sparse_kernels": kernels}), Gates(sparse_layers=asked))
    assert only(found)[0] is passed
    assert found[0].detail.endswith(f"{asked} asked (the builder's log)")


def test_only_what_is_asked_is_looked_at() -> None:
    limits = Gates(latency=0.95, memory=1, size=1, psnr=20, sparse_layers=0)
    found = gate(results(quality={"psnr": 30}), limits)
    assert [check.name for check in found] == ["latency", "memory", "size", "psnr", "sparse_layers"]
    assert all(check.passed for check in found)
    assert [check.name for check in gate(results(), Gates(size=1))] == ["size"]


@pytest.mark.parametrize("limits", [Gates(), Gates.model_construct(latency=float("inf"))])
def test_limits_that_are_none(limits: Gates) -> None:
    with pytest.raises(UsageError):
        gate(results(), limits)


RECIPE = """
name: gated
prune: {unet: {rules: [{sparsity: 0.5}]}}
gates: {latency: 0.95, size: 0.5}
"""


def run(*arguments: str | Path) -> None:
    cli.main(["gate", *map(str, arguments)], standalone_mode=False)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The directory of a run whose recipe has gates; its size is above the limit."""
    (tmp_path / "results.json").write_text(results().model_dump_json())
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_all_passed(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(out / "results.json", "--latency", "0.95", "--size", "1")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["passed latency", "passed size"]


def test_a_failure_is_exit_3_with_every_reason(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(VerificationError, match=r"not met or unknown: size, psnr$") as error:
        run(out / "results.json", "--latency", "0.95", "--size", "0.5", "--psnr", "20")
    assert error.value.exit_code == 3
    said = capsys.readouterr().out
    assert "passed latency" in said
    assert "FAILED size: engine files 1.000 of the dense engine's is above 0.5" in said
    assert "FAILED psnr" in said


def test_the_directory_of_a_run_brings_its_own_limits(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(VerificationError, match="unknown: size$"):
        run(out, "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] is False
    assert said["limits"]["latency"] == 0.95
    assert [(c["name"], c["passed"]) for c in said["checks"]] == [
        ("latency", True),
        ("size", False),
    ]
    run(out, "--size", "1")  # an option goes before the recipe


def test_a_recipe_may_be_named(out: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="unknown: size$"):
        run(out / "results.json", "--recipe", out / "recipe.yaml")
    lenient = tmp_path / "lenient.yaml"
    lenient.write_text(RECIPE.replace("0.5}\n", "2}\n"))
    run(out, "--recipe", lenient)


def test_the_median_may_be_enough(out: Path) -> None:
    run(out / "results.json", "--latency", "0.92", "--median")
    with pytest.raises(VerificationError):
        run(out / "results.json", "--latency", "0.92")


def test_quality_from_elsewhere(out: Path, tmp_path: Path) -> None:
    painted = tmp_path / "painted.json"
    painted.write_text(results(quality={"psnr": 30.0}).model_dump_json())
    with pytest.raises(VerificationError, match="unknown: psnr$"):
        run(out / "results.json", "--psnr", "20")
    run(out / "results.json", "--psnr", "20", "--quality-from", painted)
    with pytest.raises(VerificationError, match="unknown: psnr$"):
        run(out / "results.json", "--psnr", "31", "--quality-from", painted)
    other = results(quality={"psnr": 30.0}).model_copy(update={"model": "another"})
    painted.write_text(other.model_dump_json())
    with pytest.raises(UsageError, match="is about another with recipe demo, expected mini-sd2"):
        run(out / "results.json", "--psnr", "20", "--quality-from", painted)


def test_no_limits_is_a_usage_error_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no limits") as error:
        run(tmp_path / "nowhere.json")
    assert error.value.exit_code == 2


@pytest.mark.parametrize("option", ["--latency", "--memory", "--size", "--psnr"])
@pytest.mark.parametrize("value", ["nan", "-1", "0", "inf", "much"])
def test_limits_that_are_no_numbers(out: Path, option: str, value: str) -> None:
    with pytest.raises(click.BadParameter):
        run(out, option, value)


def test_sparse_layers_is_a_count(out: Path) -> None:
    for value in ("-1", "1.5", "nan"):
        with pytest.raises(click.BadParameter):
            run(out, "--sparse-layers", value)


def test_what_cannot_be_read_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        run(tmp_path, "--size", "1")
    (tmp_path / "results.json").write_text('{"schema_version": 7}')
    with pytest.raises(InputError, match="not a results.json of schema version 1"):
        run(tmp_path, "--size", "1")


def test_results_of_a_device_are_read_as_such(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"kind": "device"}')
    with pytest.raises(InputError, match="not the complete results of a device"):
        run(tmp_path / "results.json", "--size", "1")


def test_a_run_for_a_device_names_what_measures_it(tmp_path: Path) -> None:
    (tmp_path / "device.tar").touch()
    with pytest.raises(InputError, match=r"device\.tar there and give the results\.json"):
        run(tmp_path, "--size", "1")


def made(directory: Path, *, device: bool) -> Path:
    """The output of a run: two engines, and the bundle for a device."""
    for twin in ("dense", "sparse"):
        (directory / "engine" / twin).mkdir(parents=True)
        (directory / "engine" / twin / "manifest.json").write_text(twin)
    if device:
        (directory / "manifest.json").write_text("bundle")
        with tarfile.open(directory / "device.tar", "w") as tar:
            tar.add(directory / "manifest.json", "manifest.json")
    return directory


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("measured", ["sparse", "something else"])
def test_what_was_measured_is_what_was_made(tmp_path: Path, measured: str) -> None:
    figures = results(
        dense={"digest": sha256("dense")},
        # The right digest in the wrong place proves nothing.
        sparse={"digest": sha256(measured), "plans": {"unet": sha256("sparse")}},
    )
    file = tmp_path / "figures.json"
    file.write_text(figures.model_dump_json())
    arguments = (file, "--size", "2", "--run", made(tmp_path / "run", device=True))
    if measured == "sparse":
        run(*arguments)
    else:
        with pytest.raises(VerificationError, match="measured something else than what is in"):
            run(*arguments)


@pytest.mark.parametrize(
    ("bundle", "device", "passes"),
    [("bundle", True, True), ("another", True, False), ("bundle", False, False)],
)
def test_a_device_measured_the_bundle_that_was_made(
    tmp_path: Path, bundle: str, device: bool, passes: bool
) -> None:
    file = tmp_path / "brought.json"
    file.write_text(json.dumps(document() | {"bundle": sha256(bundle), "note": sha256("bundle")}))
    arguments = (file, "--size", "2", "--run", made(tmp_path / "run", device=device))
    if passes:
        run(*arguments)
    else:
        with pytest.raises(VerificationError, match="measured something else than what is in"):
            run(*arguments)


def test_figures_of_a_device_that_give_no_ratio(tmp_path: Path) -> None:
    found = document()
    for answer in found["answers"]["dense"]:
        answer["picture"] = [1e-308]
    for answer in found["answers"]["sparse"]:
        answer["picture"] = [1e308]
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match="not the complete results of a device"):
        run(tmp_path / "results.json", "--size", "2")
