"""Pruning writes exactly the planned zeros and leaves every other byte alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.errors import InputError, SdcompressError
from sdcompress.patterns import Pattern, violations, zeros_for
from sdcompress.prune import decisive, prune
from sdcompress.recipe import Recipe
from tests.tiny_sd import make_tiny_sd

UNET = "unet/diffusion_pytorch_model.safetensors"


def _recipe(section: dict[str, Any], component: str = "unet", **extra: Any) -> Recipe:
    return Recipe.model_validate({"name": "r", "prune": {component: section}, **extra})


def _source(path: Path) -> Bundle:
    return Bundle.of_source(path, SourceRecord(id="m", kind="directory"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_threshold_is_exact(tmp_path: Path, dtype: torch.dtype, allocation: str) -> None:
    source = _source(make_tiny_sd(tmp_path / "m", dtype=dtype))
    recipe = _recipe({"allocation": allocation, "rules": [{"sparsity": 0.37}]})
    bundle = prune(source, recipe, tmp_path / "p")
    before, after = load_file(source.path / UNET), load_file(bundle.path / UNET)
    assert bundle.manifest.plan
    layers = [p for p in bundle.manifest.plan.of("unet") if p.pruned]
    lowest_kept, highest_gone = [], []
    for layer in layers:
        old, new = before[layer.name], after[layer.name]
        assert new.dtype == dtype
        gone = new == 0
        assert int(gone.sum()) == layer.zeros
        assert torch.equal(new[~gone], old[~gone])
        lowest_kept.append(old[~gone].abs().min().item())
        highest_gone.append(old[gone].abs().max().item() if gone.any() else 0.0)
        if allocation == "uniform":
            assert layer.zeros == zeros_for(0.37, layer.numel)
            assert highest_gone[-1] <= lowest_kept[-1]
    if allocation == "global":
        assert sum(p.zeros or 0 for p in layers) == zeros_for(0.37, sum(p.numel for p in layers))
        assert max(highest_gone) <= min(lowest_kept)


def test_two_to_four_lies_on_the_reduction_axis(pruned: Bundle) -> None:
    weights = load_file(pruned.path / UNET)
    assert pruned.manifest.plan
    layers = [p for p in pruned.manifest.plan.of("unet") if p.pruned]
    assert {p.kind for p in layers} == {"linear", "conv"}
    for layer in layers:
        assert violations(weights[layer.name], Pattern(2, 4)) == 0
        assert int((weights[layer.name] == 0).sum()) * 2 == layer.numel


def test_what_is_not_planned_keeps_its_bytes(tiny_source: Bundle, pruned: Bundle) -> None:
    before, after = load_file(tiny_source.path / UNET), load_file(pruned.path / UNET)
    assert pruned.manifest.plan
    for layer in pruned.manifest.plan.of("unet"):
        if not layer.pruned:
            assert torch.equal(before[layer.name], after[layer.name])
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert not (pruned.path / vae).samefile(tiny_source.path / vae)  # the model is not ours
    for name in (
        vae,
        "LICENSE",
        "README.md",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
    ):
        assert (pruned.path / name).read_bytes() == (tiny_source.path / name).read_bytes()


def test_pruned_weights_are_plus_zero(pruned: Bundle) -> None:
    weights = load_file(pruned.path / UNET)
    assert not any(((w == 0) & w.signbit()).any() for w in weights.values())


def test_diffusers_loads_a_pruned_bundle(pruned: Bundle) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(pruned.path / "unet", local_files_only=True)
    weight = unet.get_parameter("down_blocks.0.attentions.0.proj_in.weight")
    assert float((weight == 0).float().mean()) == 0.5


def test_twice_the_same_bytes(tiny_source: Bundle, recipe: Recipe, tmp_path: Path) -> None:
    a, b = (prune(tiny_source, recipe, tmp_path / n) for n in "ab")
    assert a.digest == b.digest


def test_a_seed_changes_random_and_nothing_else(tiny_source: Bundle, tmp_path: Path) -> None:
    section = {"rules": [{"criterion": "random", "sparsity": 0.5}]}
    digests = {
        name: prune(tiny_source, _recipe(section, seed=seed), tmp_path / name).manifest.files[UNET]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    }
    assert digests["a"] == digests["b"] != digests["c"]


def test_a_pruned_bundle_can_be_pruned_further(pruned: Bundle, tmp_path: Path) -> None:
    further = prune(pruned, _recipe({"rules": [{"sparsity": 0.8}]}), tmp_path / "p")
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (further.path / vae).samefile(pruned.path / vae)
    assert further.manifest.parent == pruned.digest
    assert further.manifest.plan
    for layer in further.manifest.plan.of("unet"):
        if layer.pruned:
            assert (layer.zeros or 0) >= zeros_for(0.8, layer.numel)


def test_shards_are_kept(tmp_path: Path, recipe: Recipe) -> None:
    whole = make_tiny_sd(tmp_path / "m")
    sharded = tmp_path / "s"
    shutil.copytree(whole, sharded)
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(whole / "unet")
    shutil.rmtree(sharded / "unet")
    unet.save_pretrained(sharded / "unet", max_shard_size="500KB")
    files = sorted(f.name for f in (sharded / "unet").glob("*.safetensors"))
    assert len(files) > 2
    one = prune(_source(whole), recipe, tmp_path / "one")
    many = prune(_source(sharded), recipe, tmp_path / "many")
    assert sorted(f.name for f in (many.path / "unet").glob("*.safetensors")) == files
    assert many.manifest.tensors == one.manifest.tensors


def test_nan_weights_are_refused_by_name(tmp_path: Path, recipe: Recipe) -> None:
    model = make_tiny_sd(tmp_path / "m")
    weights = load_file(model / UNET)
    for value in (float("nan"), float("inf")):
        weights["conv_norm_out.bias"][0] = value
        save_file(weights, model / UNET)
        with pytest.raises(InputError, match="conv_norm_out.bias holds NaN or infinite"):
            prune(_source(model), recipe, tmp_path / "p")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_masks_that_do_less_than_asked_are_caught(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sdcompress.prune._decisions as module

    lazy = module.keep_masks
    monkeypatch.setattr(module, "keep_masks", lambda s, p, zeros: lazy(s, p, zeros // 10))
    with pytest.raises(SdcompressError, match="zeros, asked"):
        prune(tiny_source, _recipe({"rules": [{"sparsity": 0.5}]}), tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_weights_below_zero_count_by_size(tmp_path: Path) -> None:
    model = make_tiny_sd(tmp_path / "m")
    weights = load_file(model / UNET)
    weights["conv_in.weight"] = -weights["conv_in.weight"].abs() - 1
    save_file(weights, model / UNET)
    section = {"allocation": "global", "rules": [{"scope": "conv", "sparsity": 0.2}]}
    bundle = prune(_source(model), _recipe(section), tmp_path / "p")
    assert int((load_file(bundle.path / UNET)["conv_in.weight"] == 0).sum()) == 0


WANDA = {"rules": [{"criterion": "wanda", "sparsity": 0.5}, {"layers": "conv_in", "sparsity": 0.5}]}
CALIBRATION = {"prompts": ["a red cat"], "steps": 1}


def test_wanda_prunes_by_what_calibration_records(tiny_source: Bundle, tmp_path: Path) -> None:
    from sdcompress.calibrate import collect

    recipe = _recipe(WANDA, calibration=CALIBRATION)
    seen: list[tuple[str, int, int]] = []
    bundle = prune(tiny_source, recipe, tmp_path / "p", progress=lambda *now: seen.append(now))
    assert bundle.manifest.plan
    layers = {p.name: p for p in bundle.manifest.plan.of("unet") if p.pruned}
    before, after = load_file(tiny_source.path / UNET), load_file(bundle.path / UNET)
    wanted = {"unet": {name: frozenset({"input_sq_norm"}) for name in layers}}
    recorded = collect(tiny_source, wanted, recipe.calibration)["unet"]
    for name, layer in layers.items():
        gone = (after[name] == 0).flatten(1)
        scores = before[name].abs()
        if name == "conv_in.weight":
            assert layer.criterion == "magnitude"
        else:
            scores = scores * recorded[name]["input_sq_norm"].sqrt()
            assert (gone.sum(1) == zeros_for(0.5, gone.shape[1])).all()
            highest_gone = torch.where(gone, scores.flatten(1), 0).amax(1)
            lowest_kept = torch.where(gone, torch.inf, scores.flatten(1)).amin(1)
            assert (highest_gone <= lowest_kept).all()
    assert bundle.manifest.recipe
    assert bundle.manifest.recipe["calibration"] == {
        "prompts": ["a red cat"],
        "count": 1,
        "seed": 0,
        "steps": 1,
        "guidance": 7.5,
        "images": None,
        "packages": 1,
        "max_hessian": 8192,
    }
    assert seen[0] == ("calibrating", 1, 1)
    assert {what for what, *_ in seen} == {"calibrating", "pruning"}
    what, done, total = seen[-1]
    assert what == "pruning"
    assert done == total
    assert prune(tiny_source, recipe, tmp_path / "again").digest == bundle.digest


def test_where_no_criterion_asks_nothing_is_painted(
    tiny_source: Bundle, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sdcompress.calibrate

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(sdcompress.calibrate, "load_pipeline", refuse)
    bundle = prune(tiny_source, recipe, tmp_path / "p")
    assert bundle.manifest.recipe
    assert "calibration" not in bundle.manifest.recipe
    with pytest.raises(AssertionError, match="a model was loaded"):
        prune(tiny_source, _recipe(WANDA), tmp_path / "q")


def test_the_calibration_decides_only_where_a_criterion_asks(recipe: Recipe) -> None:
    other = {"calibration": recipe.calibration.model_copy(update={"count": 3})}
    assert decisive(recipe) == decisive(recipe.model_copy(update=other))
    wanda = _recipe(WANDA)
    assert decisive(wanda) != decisive(wanda.model_copy(update=other))
    assert set(decisive(wanda)) == {"name", "seed", "prune", "calibration"}


def test_an_output_that_exists_is_refused_before_anything_is_painted(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sdcompress.prune as module

    monkeypatch.setattr(module, "Calibrator", None)
    with pytest.raises(InputError, match="already exists"):
        prune(tiny_source, _recipe(WANDA), tmp_path)
