"""`sdcompress search` from the command line, on real pictures of the tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sdcompress.bundle import Bundle
from sdcompress.commands import cli
from sdcompress.errors import InputError, UsageError, VerificationError
from sdcompress.prune import prune
from sdcompress.recipe import load_recipe

PICTURES = ["--samples", "2", "--steps", "1", "--resolution", "0.5"]


def search(model: Path, output: Path, *args: str) -> str:
    command = ["search", str(model), "-o", str(output), *PICTURES, *args]
    done = CliRunner().invoke(cli, command, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout


def test_the_outcome_prunes_as_far_as_was_measured(
    tiny_sd: Path, tiny_source: Bundle, tmp_path: Path
) -> None:
    recipe, work = tmp_path / "out" / "recipe.yaml", tmp_path / "work"
    keep = ["--keep", "psnr=1", "--keep", "ssim=0.0001", "--median", "--work", str(work)]
    document = json.loads(search(tiny_sd, recipe, *keep, "--json"))
    found = document["found"]
    trail = [trial["sparsity"] for trial in found["outcome"]["trail"]]
    assert trail == [
        {"text_encoder": 0.5},
        {"unet": 0.5},
        {"text_encoder": 0.5, "unet": 0.5},
    ]
    assert document["recipe"] == str(recipe)
    loaded = load_recipe(str(recipe))
    pruned = prune(tiny_source, loaded, tmp_path / "pruned")
    assert pruned.manifest.plan is not None
    zeros = sum(layer.zeros or 0 for layer in pruned.manifest.plan.layers)
    assert zeros == found["answer"]["cost"]["zeros"] > 0

    again = tmp_path / "again.yaml"  # the table, from the same measurements
    made = sorted(work.rglob("*"))
    table = search(tiny_sd, again, *keep)
    assert sorted(work.rglob("*")) == made
    assert "all at their most" in table
    assert f"recipe: {again}" in table
    assert load_recipe(str(again)).prune == loaded.prune

    with pytest.raises(InputError, match="already exists"):
        search(tiny_sd, again, *keep)

    nothing = tmp_path / "nothing.yaml"
    with pytest.raises(VerificationError) as error:
        search(tiny_sd, nothing, "--keep", "psnr=90", "--work", str(work))
    assert "even a sparsity of 0.5 leaves the budget: closest was" in str(error.value)
    assert not nothing.exists()


def test_what_makes_no_sense_is_refused_before_anything(tmp_path: Path) -> None:
    """The model does not even exist."""
    model, output = tmp_path / "none", tmp_path / "recipe.yaml"
    with pytest.raises(UsageError, match="no budget to keep"):
        search(model, output)
    with pytest.raises(UsageError, match="2:4 has one sparsity"):
        search(model, output, "--keep", "psnr=20", "--pattern", "2:4")
    with pytest.raises(UsageError, match="dense model itself has 1"):
        search(model, output, "--keep", "clip_score=1.2")
    assert list(tmp_path.iterdir()) == []
