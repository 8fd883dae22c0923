"""Recipes are refused early, in one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sdcompress.errors import UsageError
from sdcompress.recipe import Budget, load_recipe, model_of, recipe_names, recipe_summary

RULE = "prune: {unet: {rules: [%s]}}"
GOOD = "{sparsity: 0.5}"


def _load(tmp_path: Path, text: str) -> object:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(str(path))


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_describes_itself(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert 20 < len(recipe_summary(name)) < 120
    first = (Path("sdcompress/recipes") / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# sdcompress run {name} ")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_reads_back_as_it_was_written_out(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    again = _load(tmp_path, yaml.safe_dump(recipe.model_dump(mode="json")))
    assert again == recipe


def test_the_issues_ask_for_these_recipes() -> None:
    asked = {"demo", "edge", "sd2-magnitude-38", "sd2-2to4", "sd-turbo-jetson"}
    assert asked <= set(recipe_names())


def test_the_demo_makes_the_model_faster_before_all_else() -> None:
    makefile = Path("Makefile").read_text(encoding="utf-8")
    assert "sdcompress run edge -o $(OUT)" in makefile
    unet = load_recipe("edge").prune["unet"]
    assert unet.structure
    assert unet.structure.budget == Budget(latency=0.75)
    assert unet.rules[0].pattern == "2:4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nprune: {}", "prune: expected 1 or more entries, found an empty mapping$"),
        ("name: a\nprun: 1", "prun: unknown key; correct its spelling or remove it$"),
        (f"name: a\n{RULE % '{sparsty: 0.5}'}", r"prune\.unet\.rules\.0\.sparsty: unknown key"),
        (f"name: a\n{RULE % '{sparsity: 1.5}'}", "sparsity: expected 1 or less, found 1.5$"),
        (f"name: a\n{RULE % '{sparsity: -0.1}'}", "sparsity: expected 0 or more, found -0.1$"),
        (f"name: a\n{RULE % '{sparsity: .nan}'}", "sparsity: expected a finite number, found nan$"),
        (f"name: a\n{RULE % '{}'}", "needs a 'sparsity'"),
        (f"name: a\n{RULE % '{pattern: 4:2}'}", "expected 'unstructured' or N:M"),
        (f"name: a\n{RULE % '{pattern: 2:4, sparsity: 0.3}'}", "means sparsity 0.5, found 0.3"),
        (
            f"name: a\n{RULE % '{criterion: magic, sparsity: 0.5}'}",
            "expected one of fisher, magnitude",
        ),
        (f"name: a\n{RULE % '{keep: dense}'}", "needs a 'reason'"),
        (f"name: a\n{RULE % '{keep: dense, reason: x, sparsity: 0.5}'}", "takes no sparsity"),
        (
            f"name: a\n{RULE % '{sparsity: 0.5, max_sparsity: 0.4}'}",
            "from min_sparsity to max_sparsity \\(0 to 0.4\\), found 0.5; layers",
        ),
        (
            f"name: a\n{RULE % '{sparsity: 0.5, min_sparsity: 0.6}'}",
            "from min_sparsity to max_sparsity \\(0.6 to 1\\), found 0.5; layers",
        ),
        (
            f"name: a\n{RULE % '{sparsity: 0.5, min_sparsity: 0.6, max_sparsity: 0.4}'}",
            "expected a min_sparsity of no more than max_sparsity, found 0.6 and 0.4",
        ),
        (f"name: a\n{RULE % '{sparsity: 0.5, max_sparsity: 2}'}", "expected 1 or less, found 2$"),
        (
            f"name: a\n{RULE % '{pattern: 2:4, max_sparsity: 0.6}'}",
            "2:4 gives every layer the same sparsity; leave 'min_sparsity' and",
        ),
        (
            f"name: a\n{RULE % '{keep: dense, reason: x, max_sparsity: 0.5}'}",
            "takes no max_sparsity",
        ),
        (
            f"name: a\nprune: {{unet: {{allocation: erk, spread: 0.1, rules: [{GOOD}]}}}}",
            "'spread' belongs to 'allocation: owl', found erk; leave it out$",
        ),
        (
            f"name: a\nprune: {{unet: {{allocation: owl, spread: -1, rules: [{GOOD}]}}}}",
            "spread: expected 0 or more, found -1$",
        ),
        (
            f"name: a\nprune: {{unet: {{allocation: best, rules: [{GOOD}]}}}}",
            "expected one of erk, global, owl, sensitivity, uniform, found 'best'$",
        ),
        ("name: a\nprune: {unett: {rules: [{sparsity: 0.5}]}}", "found 'unett'"),
        ("name: ../a\n" + RULE % GOOD, "name: expected a name of letters, .* found '../a'$"),
        ("name: 7\n" + RULE % GOOD, "name: expected text, found 7; put it in quotes$"),
        ("name: a", "prune: is missing; add it$"),
        ("name: a\nseed: many\n" + RULE % GOOD, "seed: expected a whole number, found 'many'$"),
        ("name: a\nbench: {rounds: 1}\n" + RULE % GOOD, "rounds: expected 2 or more, found 1$"),
        (
            "name: a\nbench: {budget: 0}\n" + RULE % GOOD,
            "budget: expected more than 0, found 0$",
        ),
        ("name: a\nbench: {rounds: }\n" + RULE % GOOD, "expected a whole number, found nothing$"),
        ("name: a\nexport: fp16\n" + RULE % GOOD, "export: expected a mapping, found 'fp16'$"),
        (
            "name: a\nexport: {dtype: fp8}\n" + RULE % GOOD,
            "dtype: expected 'fp16' or 'fp32', found 'fp8'$",
        ),
        (
            "name: a\nengine: {options: {sparse: {a: b}}}\n" + RULE % GOOD,
            "engine.options.sparse: expected text, a number, true, .*, found a mapping$",
        ),
        ("name: a\nprune: {unet: {rules: 1}}", "rules: expected a list, found 1$"),
        ("name: a\nname: b\n" + RULE % GOOD, "'name' appears twice"),
        ("name: [", "line 2|line 1"),
        ("- a", "expected a mapping"),
        ("", "expected a mapping"),
        (
            "name: a\nsampling: {height: 63}\n" + RULE % GOOD,
            "height: expected a multiple of 8, found 63$",
        ),
        ("a: &a [*a]", "recipe.yaml: a: unknown key"),
    ],
)
def test_a_bad_recipe_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        _load(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_merge_keys(tmp_path: Path) -> None:
    rules = """\
      - &linear {scope: linear, sparsity: 0.5}
      - &conv {<<: *linear, scope: conv}
      - {<<: *conv, sparsity: 0.25}
"""
    recipe = _load(tmp_path, f"name: a\nprune:\n  unet:\n    rules:\n{rules}")
    found = [(rule.scope, rule.sparsity) for rule in recipe.prune["unet"].rules]
    assert found == [("linear", 0.5), ("conv", 0.5), ("conv", 0.25)]


def test_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read as text"):
        load_recipe(str(path))


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(UsageError, match="demo, demo-2to4, edge, sd-turbo-jetson"):
        load_recipe("demoo")


def test_a_model_must_come_from_somewhere(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: a\n" + RULE % GOOD)
    recipe = load_recipe(str(path))
    assert model_of(recipe, "mini-sd2") == "mini-sd2"
    with pytest.raises(UsageError, match="--model"):
        model_of(recipe, None)


def test_on_and_off_are_words(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nexport: {upcast_attention: off}\nengine: {options: {sparse: on, refit: true}}\n"
        "prune: {unet: {rules: [{pattern: '2:4'}]}}\n"
    )
    loaded = load_recipe(str(path))
    assert loaded.export.upcast_attention == "off"
    assert loaded.engine.options == {"sparse": "on", "refit": True}


def test_fp32_takes_no_calibration(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nexport: {dtype: fp32, calibrate: 1}\nprune: {unet: {rules: [{pattern: '2:4'}]}}\n"
    )
    with pytest.raises(UsageError, match="export: fp32 has range enough"):
        load_recipe(str(path))
