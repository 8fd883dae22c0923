"""Where `sdcompress tune` takes its settings from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdcompress.commands.tune import _refuse_unused, _settings, command
from sdcompress.errors import UsageError
from sdcompress.recipe import Tune

RECIPE = """\
name: tuned
prune:
  unet: {rules: [{pattern: "2:4"}]}
tune: {method: distill, steps: 7, ema: 0.9}
"""


def test_every_setting_has_an_option() -> None:
    options = {parameter.name for parameter in command.params}
    assert set(Tune.model_fields) <= options


def test_options_go_before_the_recipe_and_that_before_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    assert _settings(str(file), {"steps": 9}) == Tune(steps=9, ema=0.9)
    assert _settings(None, {}) == Tune()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "magic"}, "tune: method: expected one of distill, .* found 'magic'"),
        ({"components": ("decoder",)}, "tune: components: expected components among text_encoder"),
        ({"method": "finetune"}, "tune: settings: finetune .* name their folder as 'images'"),
        ({"images": "photos"}, "distill learns from prompts; leave out 'images'"),
        ({"method": "dsnot", "images": "photos"}, "dsnot learns from prompts"),
        ({"method": "sr_ste", "lora_rank": 4}, "sr_ste changes weights .* leave out 'lora_rank'"),
        ({"method": "dsnot", "lora_rank": 4}, "dsnot changes weights one by one"),
        ({"batch": 6, "accumulate": 4}, "a batch of 6 cannot be cut into 4 equal parts"),
    ],
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _settings(None, asked)


def test_a_recipe_without_tuning_is_refused() -> None:
    with pytest.raises(UsageError, match="recipe demo: expected a 'tune' section, found none"):
        _settings("demo", {})


def test_an_option_the_method_does_not_look_at_is_refused() -> None:
    _refuse_unused({"decay": 0.1, "broken_images": "skip", "steps": 3}, "sr_ste")
    _refuse_unused({"cycles": 3}, "dsnot")
    with pytest.raises(UsageError, match="--cycles is for dsnot, found distill"):
        _refuse_unused({"cycles": 3}, "distill")
    with pytest.raises(UsageError, match="--broken-images is for finetune and sr_ste"):
        _refuse_unused({"broken_images": "skip"}, "distill")
