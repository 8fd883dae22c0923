"""`tune` on the tiny pipeline: what it writes, what it refuses, killed and on two processes."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.to_onnx import export_bundle
from export.verify import verify_bundle
from sdcompress.bundle import Bundle, SourceRecord, locked
from sdcompress.errors import InputError, UsageError
from sdcompress.models.sources import resolve
from sdcompress.prune import prune
from sdcompress.recipe import Recipe, Tune
from sdcompress.safetensors_io import read_header, read_tensor
from sdcompress.tuning import find_dense, tune
from tests.tiny_sd import make_tiny_sd

PROMPTS = ("a red cat", "a cat", "at red")
SHORT: dict[str, Any] = {"steps": 3, "batch": 4, "sampling_steps": 3, "prompts": PROMPTS}
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def _settings(**more: Any) -> Tune:
    return Tune.model_validate({**SHORT, **more})


def _weights(bundle: Bundle, file: str) -> dict[str, Tensor]:
    header = read_header(bundle.path / file)
    return {name: read_tensor(info).float() for name, info in header.tensors.items()}


def _far(a: Bundle, b: Bundle, file: str) -> float:
    """The largest difference of two bundles' weights."""
    ours, theirs = _weights(a, file), _weights(b, file)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def _planned(bundle: Bundle, component: str) -> set[str]:
    assert bundle.manifest.plan
    return {p.name for p in bundle.manifest.plan.of(component) if p.pruned}


@pytest.fixture(scope="module")
def tuned(pruned: Bundle, tiny_source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Text encoder and UNet, both pruned, both tuned. Do not write into it."""
    return tune(pruned, _settings(), tmp_path_factory.mktemp("tuned") / "tuned", dense=tiny_source)


def test_every_zero_holds_and_all_else_has_moved(pruned: Bundle, tuned: Bundle) -> None:
    for component, file in (("unet", UNET), ("text_encoder", TEXT)):
        before, after = _weights(pruned, file), _weights(tuned, file)
        planned = _planned(pruned, component)
        assert len(planned) > 10
        for name in planned:
            zero = before[name] == 0
            assert zero.any()
            assert not after[name][zero].any()
            assert (after[name] != before[name])[~zero].float().mean() > 0.9, name
        assert any(not torch.equal(before[n], after[n]) for n in before if n.endswith("bias"))


def test_the_manifest_tells_what_happened(
    pruned: Bundle, tuned: Bundle, tiny_source: Bundle
) -> None:
    manifest = tuned.manifest
    assert (manifest.stage, manifest.parent) == ("tuned", pruned.digest)
    assert manifest.recipe
    assert manifest.recipe["prune"] == (pruned.manifest.recipe or {})["prune"]
    assert manifest.recipe["tune"]["prompts"] == list(PROMPTS)
    assert manifest.details["dense"] == tiny_source.digest
    assert manifest.details["masks"] == "fixed"
    assert manifest.details["steps"] == 3
    with (tuned.path.parent / "tuned.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["loss"]) == pytest.approx(manifest.details["first_loss"], rel=1e-4)
    assert sorted(p.name for p in tuned.path.parent.iterdir()) == ["tuned", "tuned.csv"]


def test_what_did_not_change_is_the_same_file(pruned: Bundle, tuned: Bundle) -> None:
    assert (tuned.path / VAE).stat().st_ino == (pruned.path / VAE).stat().st_ino
    assert (tuned.path / UNET).stat().st_size == (pruned.path / UNET).stat().st_size


def test_it_verifies_and_so_does_its_export(pruned: Bundle, tuned: Bundle, tmp_path: Path) -> None:
    report = verify_bundle(tuned.path, against=pruned.path)
    assert report.passed, report
    passed = {check.name for check in report.checks}
    assert {"request", "zeros", "pattern", "values", "lineage", "against"} <= passed
    onnx = export_bundle(tuned, tmp_path / "onnx", dtype="fp16", components=("text_encoder",))
    report = verify_bundle(onnx.path, against=tuned.path, parity=False)
    assert report.passed, report


def test_a_zero_come_back_fails_the_comparison_with_the_parent(
    pruned: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    dense = prune(tiny_source, _nothing_pruned(), tmp_path / "other")
    forged = dense.manifest.model_copy(update={"stage": "tuned", "parent": pruned.digest})
    (dense.path / "manifest.json").write_text(forged.model_dump_json())
    report = verify_bundle(dense.path, against=pruned.path, parity=False)
    wrong = [check for check in report.checks if not check.passed]
    assert [check.name for check in wrong] == ["against"]
    assert set(wrong[0].tensors) <= {f"unet/{n}" for n in _planned(pruned, "unet")} | {
        f"text_encoder/{n}" for n in _planned(pruned, "text_encoder")
    }


def test_a_zero_that_nobody_pruned_may_become_something(tiny_sd: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_sd, model)
    weights = load_file(model / UNET)
    weights["conv_out.bias"].zero_()
    save_file(weights, model / UNET, metadata={"format": "pt"})
    source = Bundle.of_source(model, SourceRecord(id="model", kind="directory"))
    recipe = {"name": "r", "prune": {"unet": {"rules": [{"pattern": "2:4"}]}}}
    parent = prune(source, Recipe.model_validate(recipe), tmp_path / "pruned")
    bundle = tune(parent, _settings(steps=1), tmp_path / "tuned", dense=source)
    assert _weights(bundle, UNET)["conv_out.bias"].all()
    assert verify_bundle(bundle.path, against=parent.path, parity=False).passed

    # What was not tuned is compared bit for bit.
    weights = load_file(bundle.path / VAE)
    weights["decoder.conv_in.bias"] += 1
    (bundle.path / VAE).unlink()  # it is the parent's too
    save_file(weights, bundle.path / VAE, metadata={"format": "pt"})
    report = verify_bundle(bundle.path, against=parent.path, parity=False)
    (against,) = (check for check in report.checks if check.name == "against")
    assert against.tensors == ("vae/decoder.conv_in.bias",)


def _nothing_pruned() -> Recipe:
    rules = {"rules": [{"sparsity": 0.0}]}
    return Recipe.model_validate({"name": "nothing", "prune": {"unet": rules}})


def test_diffusers_makes_a_picture_with_it(tuned: Bundle) -> None:
    from sdcompress.evaluation.images import generate_from_weights

    (picture,) = generate_from_weights(tuned.path, ["a red cat"], [0], steps=2)
    assert picture.size == (16, 16)


def test_one_component_alone_learns_through_the_other(
    pruned: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    """Without `features` the text encoder's only gradient comes out of the UNet."""
    settings = _settings(components=["text_encoder"], features=0)
    bundle = tune(pruned, settings, tmp_path / "out", dense=tiny_source)
    assert (bundle.path / UNET).stat().st_ino == (pruned.path / UNET).stat().st_ino
    assert _far(bundle, pruned, TEXT) > 1e-4
    again = tune(bundle, _settings(components=["unet"]), tmp_path / "again", dense=tiny_source)
    assert again.manifest.parent == bundle.digest
    assert verify_bundle(again.path, against=bundle.path, parity=False).passed


def test_gradient_checkpointing_and_parts_change_no_result(
    pruned: Bundle, tuned: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    frugal = _settings(gradient_checkpointing=True, accumulate=2)
    bundle = tune(pruned, frugal, tmp_path / "out", dense=tiny_source)
    assert bundle.manifest.details["final_loss"] == pytest.approx(
        tuned.manifest.details["final_loss"], rel=1e-4
    )
    assert _far(bundle, tuned, UNET) < 2e-4


def test_bf16_and_a_moving_average(pruned: Bundle, tiny_source: Bundle, tmp_path: Path) -> None:
    settings = _settings(mixed_precision="bf16", ema=0.9, steps=2)
    bundle = tune(pruned, settings, tmp_path / "out", dense=tiny_source)
    assert verify_bundle(bundle.path, against=pruned.path, parity=False).passed
    assert _far(bundle, pruned, UNET) > 1e-5


def test_half_precision_files_stay_so_and_lost_weights_are_counted(tmp_path: Path) -> None:
    model = make_tiny_sd(tmp_path / "half", dtype=torch.float16)
    source = Bundle.of_source(model, SourceRecord(id="half", kind="directory"))
    recipe = Recipe.model_validate(
        {"name": "r", "prune": {"unet": {"rules": [{"pattern": "2:4"}]}}}
    )
    parent = prune(source, recipe, tmp_path / "pruned")
    # Decay alone makes them a millionth of what they were, which fp16 has no numbers for.
    settings = _settings(steps=1, learning_rate=1e-9, weight_decay=1e9 - 1e3)
    bundle = tune(parent, settings, tmp_path / "tuned", dense=source)
    assert {info.dtype for info in read_header(bundle.path / UNET).tensors.values()} == {"F16"}
    lost = bundle.manifest.details["underflow_zeros"]["unet"]
    assert bundle.manifest.plan
    assert parent.manifest.plan
    for before, after in zip(parent.manifest.plan.layers, bundle.manifest.plan.layers, strict=True):
        if after.pruned:
            assert after.zeros == (before.zeros or 0) + lost.get(after.name, 0)
    assert sum(lost.values()) > 0
    assert verify_bundle(bundle.path, against=parent.path, parity=False).passed


def test_models_that_do_not_belong_together_are_refused(
    pruned: Bundle, tuned: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    other = make_tiny_sd(tmp_path / "other", seed=1)
    stranger = Bundle.of_source(other, SourceRecord(id="tiny-sd", kind="directory"))
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"not the model that .* was pruned from \(.* differs\)"):
        tune(pruned, _settings(), out, dense=stranger)
    with pytest.raises(InputError, match="not the model that .* was distilled from"):
        tune(tuned, _settings(), out, dense=stranger)
    with pytest.raises(UsageError, match="expected the dense model, found a pruned bundle"):
        tune(pruned, _settings(), out, dense=pruned)
    with pytest.raises(UsageError, match="expected a pruned bundle, found stage source"):
        tune(tiny_source, _settings(), out, dense=tiny_source)
    with pytest.raises(UsageError, match="component vae cannot be tuned; .* text_encoder, unet"):
        tune(pruned, _settings(components=["vae"]), out, dense=tiny_source)
    with pytest.raises(InputError, match="already exists"):
        tune(pruned, _settings(), tuned.path, dense=tiny_source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_a_copy_of_the_dense_model_will_do(pruned: Bundle, tiny_sd: Path, tmp_path: Path) -> None:
    copy = Bundle.of_source(tiny_sd, SourceRecord(id="somebody/tiny", kind="hub", revision="1"))
    assert copy.digest != pruned.manifest.parent
    settings = _settings(steps=1, components=["unet"])
    bundle = tune(pruned, settings, tmp_path / "out", dense=copy)
    assert bundle.manifest.details["dense"] == copy.digest


def test_the_dense_model_is_found_where_the_manifest_leads(
    tiny_sd: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = _resolved(tiny_sd)
    parent = prune(dense, recipe, tmp_path / "elsewhere" / "pruned")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="pruned from tiny-sd .directory., .* with --dense"):
        find_dense(parent)
    monkeypatch.chdir(tiny_sd.parent)
    assert find_dense(parent).digest == dense.digest


def _resolved(model: Path) -> Bundle:
    """The model as the command line takes it in."""
    found = resolve(str(model))
    return Bundle.of_source(found.directory, found.source)


def _command(pruned: Bundle, dense: Path, out: Path, *more: str) -> list[str]:
    prompts = out.with_name("prompts.txt")
    prompts.write_text("\n".join(PROMPTS))
    sizes = ["--batch", "4", "--sampling-steps", "3", "--prompts", str(prompts)]
    return ["tune", str(pruned.path), "--dense", str(dense), "-o", str(out), *sizes, *more]


def _environment() -> dict[str, str]:
    """As many threads as here, so that sums are made in the same order."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_a_killed_tuning_goes_on_to_the_same_bytes(
    pruned: Bundle, tiny_sd: Path, tmp_path: Path
) -> None:
    settings = {"steps": 10, "checkpoint_every": 2}
    dense = _resolved(tiny_sd)
    expected = tune(pruned, _settings(**settings), tmp_path / "straight", dense=dense)
    out = tmp_path / "out"
    arguments = _command(pruned, tiny_sd, out, "--steps", "10", "--checkpoint-every", "2")
    log = tmp_path / "out.csv"
    process = subprocess.Popen([sys.executable, "-m", "sdcompress", *arguments], env=_environment())
    wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) > 5, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    checkpoint = tmp_path / ".out.tuning" / "checkpoint.pt"
    assert checkpoint.is_file()
    first: list[int] = []
    again = tune(
        pruned,
        _settings(**settings),
        out,
        dense=dense,
        progress=lambda what, done, total: first.append(done),
    )
    assert first[0] > 4  # and not from the beginning
    assert again.digest == expected.digest
    assert not checkpoint.parent.exists()


def test_to_begin_anew_is_not_to_disturb_another(
    pruned: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    checkpoint = tmp_path / ".out.tuning" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"of another")
    settings, out = _settings(steps=1, components=["unet"]), tmp_path / "out"
    with (
        locked(checkpoint.parent),
        pytest.raises(InputError, match="another tuning is at work there"),
    ):
        tune(pruned, settings, out, dense=tiny_source, fresh=True)
    assert checkpoint.read_bytes() == b"of another"
    tune(pruned, settings, out, dense=tiny_source, fresh=True)
    assert not checkpoint.parent.exists()


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "it ended before its time"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)


def test_two_processes_tune_as_one_does(
    pruned: Bundle, tuned: Bundle, tiny_sd: Path, tmp_path: Path
) -> None:
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "sdcompress"]
    out = tmp_path / "out"
    arguments = _command(pruned, tiny_sd, out, "--steps", "3", "--json")
    done = subprocess.run(
        [sys.executable, "-m", *launch, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bundle = Bundle.open(out)
    assert done.stdout.count(bundle.digest) == 1  # one process prints
    assert '"processes": 2' in (out / "log.json").read_text()
    for loss in ("first_loss", "final_loss"):
        assert bundle.manifest.details[loss] == pytest.approx(
            tuned.manifest.details[loss], rel=1e-4
        )
    # AdamW's step is the learning rate whatever the gradient's size, so where a gradient is next
    # to nothing the order of a sum can turn a step around; that is rare, and no more than rare.
    for file in (UNET, TEXT):
        ours, theirs = _weights(bundle, file), _weights(tuned, file)
        apart = torch.cat([(ours[n] - theirs[n]).abs().flatten() for n in ours])
        assert float((apart < 1e-6).float().mean()) > 0.99
        assert float(apart.max()) < 2 * 3 * Tune().learning_rate
