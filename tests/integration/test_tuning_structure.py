"""Tuning models that have lost whole blocks: what is learnt, what is kept, and what is refused."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcompress import tuning
from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.catalog import read_config, weight_files
from sdcompress.errors import InputError, UsageError
from sdcompress.plan import SparsityPlan
from sdcompress.prune import prune
from sdcompress.recipe import Recipe, Tune
from sdcompress.rounds import prune_in_rounds
from sdcompress.structure import KEY, RECORD, read_record
from sdcompress.tuning import check_lineage, tune
from sdcompress.tuning._job import Job
from sdcompress.tuning.sr_ste import MovingMasks
from tests.narrowed import blocks_of, narrow_bundle, thinned

STEPS = 8
DISTILL: dict[str, Any] = {
    "steps": STEPS,
    "batch": 4,
    "learning_rate": 3e-3,
    "sampling_steps": 3,
    "prompts": ("a red cat", "a cat", "red", "at the sea"),
}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def narrow(tiny_sd: Path, tiny_source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Half of every block of the text encoder and the UNet is gone, and no single weight."""
    out = tmp_path_factory.mktemp("narrow") / "bundle"
    return narrow_bundle(tiny_source, out, thinned(tiny_sd, "text_encoder", "unet"))


@pytest.fixture(scope="module")
def both(
    narrow: Bundle, tiny_source: Bundle, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """And then what is left of the UNet became 2:4, of the text encoder a little less than half."""
    out = tmp_path_factory.mktemp("both") / "bundle"
    return prune(tiny_source, recipe, out, before=narrow)


def settings(**changes: Any) -> Tune:
    return Tune(**{**DISTILL, **changes})


def weights(bundle: Bundle, component: str) -> dict[str, Tensor]:
    files = weight_files(bundle.path / component)
    return {k: v for file in files for k, v in load_file(file).items()}


def losses(out: Path) -> list[float]:
    with out.with_name(f"{out.name}.csv").open() as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


def shares(plan: SparsityPlan) -> dict[tuple[str, str], int | None]:
    return {(p.component, p.name): p.zeros for p in plan.layers if p.pruned}


def job_of(parent: Bundle, dense: Bundle, **changes: Any) -> Job:
    asked, plan = settings(**changes), parent.manifest.plan
    assert plan is not None
    components = tuning.check(plan, asked, ("text_encoder", "unet"))
    return tuning._make_job(parent, dense, asked, plan, components, tuning._accelerator(asked))


WAYS: dict[str, dict[str, Any]] = {
    "distill": {},
    "lora": {"lora_rank": 4, "learning_rate": 3e-2},
    "sr_ste": {"method": "sr_ste"},
    "dsnot": {"method": "dsnot"},
}


@pytest.mark.parametrize("way", list(WAYS))
def test_zeros_and_structure_hold(
    way: str, both: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    tuned = tune(both, settings(**WAYS[way]), tmp_path / "out", dense=tiny_source)
    before, after = both.manifest, tuned.manifest
    assert before.plan is not None
    assert after.plan is not None
    assert after.details[RECORD] == before.details[RECORD]
    assert after.plan.removed == before.plan.removed
    assert all((after.plan.removed[c] or 0) > 1000 for c in ("text_encoder", "unet"))
    assert shares(after.plan) == shares(before.plan)
    for component in ("text_encoder", "unet"):
        name = f"{component}/config.json"
        assert after.files[name] == before.files[name]
        old, new = weights(both, component), weights(tuned, component)
        assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in old.items()}
        pruned = [p.name for p in after.plan.of(component) if p.pruned]
        changed = [name for name in pruned if not new[name].equal(old[name])]
        assert len(changed) > 0.5 * len(pruned)
        for layer in pruned if component == "unet" else ():
            groups = (new[layer] != 0).movedim(1, -1).reshape(-1, 4).sum(1)
            assert int(groups.max()) <= 2
    if way != "dsnot":
        learnt = losses(tmp_path / "out")
        assert sum(learnt[-3:]) < 0.9 * sum(learnt[:3])
    tuned.check_files()


@pytest.mark.parametrize("way", ["distill", "lora"])
def test_structure_without_zeros(
    way: str, narrow: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    tuned = tune(narrow, settings(**WAYS[way]), tmp_path / "out", dense=tiny_source)
    learnt = losses(tmp_path / "out")
    assert sum(learnt[-3:]) < 0.9 * sum(learnt[:3])
    for component, blocks in blocks_of(tuned.path).items():
        old, new = weights(narrow, component), weights(tuned, component)
        changed = {name for name in new if not new[name].equal(old[name])}
        inside = {p.tensor for b in blocks for p in b.parts if old[p.tensor].dim() > 1}
        if component == "vae":
            assert not changed
        elif way == "lora":  # adapters sit on what is narrower, and nowhere else
            assert changed == inside
        else:
            assert inside < changed
    assert tuned.manifest.details[RECORD] == narrow.manifest.details[RECORD]


def test_all_tensors_of_what_was_only_shrunk_are_recorded(
    tiny_source: Bundle, tmp_path: Path
) -> None:
    rules = [{"kind": "neurons", "ratio": 0.5}]
    recipe = {"name": "narrow", "prune": {"unet": {"structure": {"rules": rules}}}}
    made = prune_in_rounds(tiny_source, Recipe.model_validate(recipe), tmp_path / "made")
    tuned = tune(made, settings(steps=2), tmp_path / "out", dense=tiny_source)
    for component in ("text_encoder", "unet", "vae"):
        records, state = tuned.manifest.tensors[component], weights(tuned, component)
        assert {k: v.shape for k, v in records.items()} == {k: v.shape for k, v in state.items()}
    assert read_record(tuned.manifest.details).keys() == {"unet"}
    assert tuned.manifest.details[RECORD] == made.manifest.details[RECORD]


@pytest.mark.parametrize("method", ["sr_ste", "dsnot"])
def test_what_moves_zeros_needs_some(
    method: str, narrow: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"{method} moves zeros, and here whole neurons"):
        tune(narrow, settings(method=method), tmp_path / "out", dense=tiny_source)
    assert not (tmp_path / "out").exists()


def test_what_is_below_the_masks_is_the_dense_model_cut(both: Bundle, tiny_source: Bundle) -> None:
    """The parent kept the dense model's values, so that they tell whether the cut is the same."""
    job = job_of(both, tiny_source, method="sr_ste")
    parent = {c: dict(job.students[c].state_dict()) for c in job.components}
    parent = {c: {k: v.clone() for k, v in state.items()} for c, state in parent.items()}
    keeper = MovingMasks(job)
    cuts = 0
    for (component, key), layer in keeper._layers.items():
        dense = job.teachers[component].state_dict()[key]
        left, mask = job.left_of(component, key, dense), job.masks[component][key]
        assert left[mask].equal(parent[component][key][mask])
        assert layer.dense.detach().equal(left)
        assert bool((left[~mask] != 0).any())
        cuts += left.shape != dense.shape
    assert cuts > 30


def test_dsnot_brings_back_what_the_dense_model_has(
    both: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    tuned = tune(both, settings(method="dsnot"), tmp_path / "out", dense=tiny_source)
    job = job_of(both, tiny_source)
    error = tuned.manifest.details["expected_square_error"]
    assert error["after"] < 0.99 * error["before"]
    for component in job.components:
        dense, state = job.teachers[component].state_dict(), weights(tuned, component)
        for key, layer in job.layers[component].items():
            there = state[layer.name] != 0
            left = job.left_of(component, key, dense[key])
            assert state[layer.name][there].equal(left[there])


def test_which_components_are_tuned(narrow: Bundle, both: Bundle) -> None:
    plan, pruned = narrow.manifest.plan, both.manifest.plan
    assert plan is not None
    assert pruned is not None
    assert tuning.check(plan, settings(), {"unet", "vae"}) == ("unet",)
    assert tuning.check(pruned, settings()) == ("text_encoder", "unet")
    assert tuning.check(plan, settings(components=("unet",)), ("unet", "text_encoder")) == ("unet",)
    with pytest.raises(UsageError, match="component text_encoder is not pruned; choose among unet"):
        tuning.check(plan, settings(components=("text_encoder",)), ("unet",))
    with pytest.raises(UsageError, match="expected a pruned text_encoder or unet, found vae only"):
        tuning.check(plan, settings(), ("vae",))


@pytest.fixture
def copied(tiny_sd: Path, tmp_path: Path) -> Callable[[str, str], Bundle]:
    """The dense model come another way, with one tensor of the UNet not what it was."""

    def copied(name: str, tensor: str) -> Bundle:
        place = shutil.copytree(tiny_sd, tmp_path / name)
        (place / "README.md").write_text("another card")
        if tensor:
            state = load_file(place / UNET)
            state[tensor] = state[tensor] + 1
            save_file(state, place / UNET)
        return Bundle.of_source(place, SourceRecord(id="copy", kind="directory"))

    return copied


BLOCK = "mid_block.attentions.0.transformer_blocks.0.ff"


def test_lineage_looks_at_what_is_left(
    narrow: Bundle, both: Bundle, copied: Callable[[str, str], Bundle]
) -> None:
    for parent in (narrow, both):
        check_lineage(parent, copied(f"whole-{parent is both}", ""))
    # What a block gives on may have been fitted to what stays of it.
    check_lineage(narrow, copied("consumer", f"{BLOCK}.net.2.weight"))
    for tensor in (f"{BLOCK}.net.0.proj.bias", "mid_block.resnets.0.norm2.weight", "conv_in.bias"):
        with pytest.raises(InputError, match=f"was pruned from \\(unet/{tensor} differs\\)"):
            check_lineage(narrow, copied(tensor, tensor))


def test_a_model_that_was_narrower_from_the_first(
    narrow: Bundle, recipe: Recipe, tmp_path: Path
) -> None:
    """A narrower model as the dense one: nothing of it is cut again."""
    source = narrow.manifest.source
    dense = Bundle.of_source(narrow.path, source)
    pruned = prune(dense, recipe, tmp_path / "pruned")
    tuned = tune(pruned, settings(method="sr_ste"), tmp_path / "out", dense=dense)
    config = read_config(tuned.path / "unet")
    assert config[KEY] == read_config(narrow.path / "unet")[KEY]
    assert tuned.manifest.details["revived"] > 0


def test_pictures_of_a_narrower_model_teach_it(
    narrow: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    """The diffusion loss on pictures, in a resumed training that ends where one in a go does."""
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 20, 250 - 60 * i)).save(folder / f"{i}.png")
    lines = (f'{{"file_name": "{i}.png", "text": "picture {i}"}}' for i in range(4))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    asked = settings(method="finetune", images=str(folder), steps=4, checkpoint_every=2)

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("tuning") and done == 3:
            raise KeyboardInterrupt

    whole = tune(narrow, asked, tmp_path / "whole", dense=tiny_source)
    with pytest.raises(KeyboardInterrupt):
        tune(narrow, asked, tmp_path / "stopped", dense=tiny_source, progress=stop)
    again = tune(narrow, asked, tmp_path / "stopped", dense=tiny_source)
    assert again.manifest.files == whole.manifest.files


def test_gradient_checkpointing_changes_no_result(
    narrow: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    asked = settings(steps=2)
    for name, more in (("plain", {}), ("saving", {"gradient_checkpointing": True})):
        tune(narrow, asked.model_copy(update=more), tmp_path / name, dense=tiny_source)
    for component in ("text_encoder", "unet"):
        plain, saving = (weights(Bundle.open(tmp_path / n), component) for n in ("plain", "saving"))
        for name, value in plain.items():
            torch.testing.assert_close(saving[name], value, rtol=1e-3, atol=1e-5)
