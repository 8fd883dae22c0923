"""`prune` takes the prompts to calibrate with from the command line, where they mean something."""

from __future__ import annotations

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
