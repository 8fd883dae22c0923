"""finetune, sr_ste and adapters, from a pruned bundle to a tuned one, on scenes of mini-sd2."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from sdcompress.bundle import Bundle
from sdcompress.models.mini_sd2.scenes import render, sample_prompts
from sdcompress.recipe import Tune
from sdcompress.tuning import tune

STEPS = 12
FROZEN = 1e-12  # a learning rate that changes nothing


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rendered scenes with their captions."""
    folder = tmp_path_factory.mktemp("scenes")
    pairs = sample_prompts(64, None, "train", seed=0)
    for i, picture in enumerate(render([scene for scene, _ in pairs])):
        Image.fromarray(picture).save(folder / f"{i:02}.png")
    rows = [{"file_name": f"{i:02}.png", "text": text} for i, (_, text) in enumerate(pairs)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def settings(scenes: Path, **changes: Any) -> Tune:
    return Tune(
        **{
            "method": "finetune",
            "images": str(scenes),
            "components": ("unet",),
            "steps": STEPS,
            "batch": 4,
            "learning_rate": 2e-3,
            **changes,
        }
    )


def losses(out: Path) -> list[float]:
    with out.with_name(f"{out.name}.csv").open() as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


@pytest.fixture(scope="module")
def untrained(
    pruned: Bundle, tiny_source: Bundle, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The loss of each step's samples as the pruned model has it."""
    out = tmp_path_factory.mktemp("untrained") / "out"
    tune(pruned, settings(scenes, learning_rate=FROZEN), out, dense=tiny_source)
    return losses(out)


WAYS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "finetune-lora": {"lora_rank": 4, "learning_rate": 1e-2},
    "sr_ste": {"method": "sr_ste"},
}


@pytest.mark.parametrize("way", list(WAYS))
def test_learns_from_pictures_and_keeps_the_pattern(
    way: str,
    pruned: Bundle,
    tiny_source: Bundle,
    scenes: Path,
    untrained: list[float],
    tmp_path: Path,
) -> None:
    tuned = tune(pruned, settings(scenes, **WAYS[way]), tmp_path / "out", dense=tiny_source)
    learnt = losses(tmp_path / "out")
    assert learnt[0] == pytest.approx(untrained[0], rel=1e-5)  # begins as what was pruned
    # The same samples, so that no luck of the draw is in it.
    assert sum(learnt[-4:]) < 0.9 * sum(untrained[-4:])
    before = load_file(pruned.path / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(tuned.path / "unet" / "diffusion_pytorch_model.safetensors")
    assert list(after) == list(before)
    assert tuned.manifest.plan is not None
    layers = [p for p in tuned.manifest.plan.of("unet") if p.pruned]
    assert len(layers) > 40
    moved = 0
    for layer in layers:
        weight = after[layer.name]
        groups = (weight != 0).movedim(1, -1).reshape(-1, 4).sum(1)
        assert int(groups.max()) <= 2
        assert layer.zeros == int((weight == 0).sum())
        moved += int(((weight != 0) & (before[layer.name] == 0)).sum())
    assert (moved > 0) == (way == "sr_ste")
    trained = {name for name in after if not after[name].equal(before[name])}
    everything = way != "finetune-lora"
    assert ("conv_norm_out.weight" in trained) == everything
    assert {layer.name for layer in layers} <= trained


@pytest.mark.parametrize("way", [{"lora_rank": 2}, {"method": "sr_ste"}], ids=["lora", "sr_ste"])
def test_goes_on_where_it_was_stopped(
    way: dict[str, Any], pruned: Bundle, tiny_source: Bundle, scenes: Path, tmp_path: Path
) -> None:
    asked = settings(scenes, **way, components=(), steps=5, ema=0.5, checkpoint_every=2)

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("tuning") and done == 3:
            raise KeyboardInterrupt

    whole = tune(pruned, asked, tmp_path / "whole", dense=tiny_source)
    with pytest.raises(KeyboardInterrupt):
        tune(pruned, asked, tmp_path / "stopped", dense=tiny_source, progress=stop)
    assert not (tmp_path / "stopped").exists()
    again = tune(pruned, asked, tmp_path / "stopped", dense=tiny_source)
    assert again.manifest.files == whole.manifest.files
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_sr_ste_learns_from_the_dense_model_without_pictures(
    pruned: Bundle, tiny_source: Bundle, scenes: Path, tmp_path: Path
) -> None:
    asked = settings(scenes, method="sr_ste", images=None, sampling_steps=3, components=())
    tuned = tune(pruned, asked, tmp_path / "out", dense=tiny_source)
    learnt = losses(tmp_path / "out")
    assert sum(learnt[-3:]) < 0.8 * sum(learnt[:3])
    details = tuned.manifest.details
    assert details["masks"] == "moved"
    assert 0 < details["revived"] < 1
    assert tuned.manifest.plan is not None
    assert pruned.manifest.plan is not None
    text = {p.name: p.zeros for p in pruned.manifest.plan.of("text_encoder") if p.pruned}
    assert {p.name: p.zeros for p in tuned.manifest.plan.of("text_encoder") if p.pruned} == text
