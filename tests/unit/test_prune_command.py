"""`prune` takes calibration and schedule from the command line, where they mean something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from sdcompress.bundle import Bundle
from sdcompress.commands.prune import command
from sdcompress.errors import UsageError

PROMPTS = ["a red cat", "at", "a cat"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rules = [{"criterion": "wanda", "sparsity": 0.5}]
    file = tmp_path / "wanda.yaml"
    recipe: dict[str, Any] = {"name": "wanda", "prune": {"text_encoder": {"rules": rules}}}
    recipe["calibration"] = {"prompts": PROMPTS[:2], "seed": 3}
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


def _prune(tiny_sd: Path, recipe: object, *options: object) -> None:
    arguments = [tiny_sd, "--recipe", recipe, *options]
    command.main([str(a) for a in arguments], standalone_mode=False)


@pytest.mark.parametrize(
    ("count", "used"), [([], PROMPTS), (["--calibration-count", 2], PROMPTS[:2])]
)
def test_prompts_from_a_file(
    tiny_sd: Path, recipe: Path, prompts: Path, tmp_path: Path, count: list[object], used: list[str]
) -> None:
    out = tmp_path / "pruned"
    _prune(tiny_sd, recipe, "--prompts", prompts, *count, "-o", out)
    written = Bundle.open(out).manifest.recipe
    assert written
    assert written["calibration"]["prompts"] == used
    assert written["calibration"]["count"] == len(used)
    assert written["calibration"]["seed"] == 3  # the recipe's, as all that nobody overrides


@pytest.mark.parametrize(
    ("chosen", "options", "message"),
    [
        ("sd2-2to4", ["--calibration-count", 4], "none of its criteria looks at activations"),
        ("sd2-2to4", ["--packages", 2], "activations or gradients; leave out --packages, or"),
        (None, ["--images", "."], "none of its criteria looks at gradients; leave out --images"),
        (None, ["--max-hessian", 64], "looks at a Hessian; leave out --max-hessian"),
        (None, ["--rounds", 0], "0 is not in the range"),
        (None, ["--tune-steps", 5], "'tune' is about several rounds, found 'rounds: 1'"),
        (None, ["--rounds", 1, "--tune-steps", 5], "'tune' is about several rounds"),
        (None, ["--calibration-count", 4], "no more than the 2 prompts given"),
        (None, ["--calibration-count", 0], "0 is not in the range"),
        (None, ["--prompts", "/nowhere"], "/nowhere: expected a text file"),
    ],
)
def test_what_means_nothing_is_refused(
    tiny_sd: Path,
    recipe: Path,
    tmp_path: Path,
    chosen: str | None,
    options: list[object],
    message: str,
) -> None:
    out = tmp_path / "pruned"
    with pytest.raises((UsageError, click.UsageError), match=message):
        _prune(tiny_sd, chosen or recipe, *options, "-o", out)
    assert not out.exists()


def written(out: Path) -> dict[str, Any]:
    recipe = Bundle.open(out).manifest.recipe
    assert recipe
    return recipe


def test_rounds_from_the_command_line(tiny_sd: Path, recipe: Path, tmp_path: Path) -> None:
    given = yaml.safe_load(recipe.read_text())
    given["schedule"] = {"rounds": 3, "initial": 0.25}
    given["tune"] = {"batch": 1, "sampling_steps": 1, "prompts": ["a red cat"]}
    recipe.write_text(yaml.safe_dump(given))
    _prune(tiny_sd, recipe, "--rounds", 2, "--tune-steps", 1, "-o", tmp_path / "two")
    schedule = written(tmp_path / "two")["schedule"]
    assert (schedule["rounds"], schedule["initial"]) == (2, 0.25)
    tune = schedule["tune"]
    assert (tune["steps"], tune["batch"], tune["prompts"]) == (1, 1, ["a red cat"])
    _prune(tiny_sd, recipe, "--rounds", 1, "-o", tmp_path / "one")
    assert "schedule" not in written(tmp_path / "one")
    assert "rounds" not in Bundle.open(tmp_path / "one").manifest.details


def test_fresh_begins_anew(
    tiny_sd: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def look(*args: object, fresh: bool, **how: object) -> Bundle:
        asked.append(fresh)
        raise UsageError("enough")

    monkeypatch.setattr("sdcompress.rounds.prune_in_rounds", look)
    for option in ([], ["--fresh"]):
        with pytest.raises(UsageError, match="enough"):
            _prune(tiny_sd, recipe, *option, "-o", tmp_path / "out")
    assert asked == [False, True]


SMALL: dict[str, Any] = {"name": "small", "calibration": {"count": 2, "steps": 1}}


def test_a_hessian_from_the_command_line(
    tiny_sd: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = {"criterion": "sparsegpt", "layers": "conv_in", "sparsity": 0.5}
    recipe.write_text(yaml.safe_dump({**SMALL, "prune": {"unet": {"rules": [rule]}}}))
    out = tmp_path / "out"
    _prune(tiny_sd, recipe, "--max-hessian", 8, "--packages", 2, "--json", "-o", out)
    calibration = written(out)["calibration"]
    assert (calibration["max_hessian"], calibration["packages"]) == (8, 2)
    told = json.loads(capsys.readouterr().out)
    assert len(told["notes"]) == 1
    assert told["notes"][0].startswith("1 layers (such as unet/conv_in.weight) have more columns")


def test_pictures_from_the_command_line(tiny_sd: Path, recipe: Path, tmp_path: Path) -> None:
    from PIL import Image

    rule = {"criterion": "taylor", "layers": "conv_in", "sparsity": 0.5}
    recipe.write_text(yaml.safe_dump({**SMALL, "prune": {"unet": {"rules": [rule]}}}))
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (16, 16), (90, 30, 200)).save(images / "a.png")
    (images / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red cat"}\n')
    _prune(tiny_sd, recipe, "--images", images, "-o", tmp_path / "out")
    assert written(tmp_path / "out")["calibration"]["images"] == str(images)
