"""The plan and its accounting, on the exact geometry of SD2-base and on small cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdcompress.catalog import Catalog, read_catalog
from sdcompress.errors import InputError, UsageError
from sdcompress.plan import BY_ALLOCATION, SparsityPlan, account, make_plan, shortfalls
from sdcompress.recipe import Recipe, load_recipe
from tests import full_size


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return read_catalog(full_size.write_hollow_sd2(tmp_path_factory.mktemp("sd2")))


def _recipe(rules: list[dict[str, Any]], allocation: str = "uniform") -> Recipe:
    prune = {"unet": {"rules": rules, "allocation": allocation}}
    return Recipe.model_validate({"name": "r", "prune": prune})


def test_the_catalog_tells_modules_apart_as_torch_does(sd2: Catalog) -> None:
    kinds = {torch.nn.Linear: "linear", torch.nn.Conv2d: "conv", torch.nn.Embedding: "embedding"}
    for component, root in full_size.modules().items():
        expected = {
            f"{name}.weight": kinds[type(module)]
            for name, module in root.named_modules()
            if type(module) in kinds
        }
        found = {p.name: p.kind for p in sd2.of(component) if p.kind != "other"}
        assert found == expected


def test_the_size_of_sd2_base(sd2: Catalog) -> None:
    assert sd2.parameters == {"text_encoder": 340_387_840, "unet": 865_910_724}
    linear = {c: sum(p.numel for p in sd2.of(c) if p.kind == "linear") for c in sd2.components}
    assert round(linear["unet"] / 1e6, 1) == 301.2
    assert round(linear["text_encoder"] / 1e6, 1) == 289.4


def test_the_reference_studys_accounting(sd2: Catalog) -> None:
    accounting = account(make_plan(load_recipe("sd2-magnitude-38"), sd2))
    unet, text = (accounting.components[c] for c in ("unet", "text_encoder"))
    assert round(100 * unet.of_component, 1) == 12.2
    assert round(100 * text.of_component, 1) == 40.4
    assert round(100 * accounting.together.of_component, 1) == 20.1
    assert round(100 * accounting.together.asked, 1) == 38.5
    assert unet.of_layers_pruned == pytest.approx(0.35, abs=1e-6)
    assert text.of_layers_pruned == pytest.approx(0.475, abs=1e-6)


@pytest.mark.parametrize("name", ["sd2-2to4", "sd-turbo-jetson", "sd2-magnitude-38"])
def test_shipped_recipes_fit_sd2(sd2: Catalog, name: str) -> None:
    plan = make_plan(load_recipe(name), sd2)
    assert sum(p.pruned for p in plan.layers) > 200
    assert all(p.pruned or p.skipped_because for p in plan.layers)


def test_two_to_four_everywhere_is_half_of_the_layers(sd2: Catalog) -> None:
    accounting = account(make_plan(load_recipe("sd2-2to4"), sd2))
    assert accounting.together.of_layers_pruned == 0.5


def test_the_last_rule_that_matches_wins(tiny_sd: Path) -> None:
    rules = [
        {"sparsity": 0.5},
        {"layers": "*.to_q", "sparsity": 0.25},
        {"layers": "mid_block.*", "keep": "dense", "reason": "it is the middle"},
    ]
    plan = make_plan(_recipe(rules), read_catalog(tiny_sd))
    by_name = {p.name: p for p in plan.of("unet")}
    query = next(n for n in by_name if n.endswith("to_q.weight") and not n.startswith("mid"))
    assert by_name[query].sparsity == 0.25
    assert by_name["conv_in.weight"].sparsity == 0.5
    middle = next(p for n, p in by_name.items() if n.startswith("mid") and p.kind == "linear")
    assert middle.skipped_because == "kept dense by rule 3: it is the middle"
    assert by_name["conv_in.bias"].skipped_because == "bias or normalisation"
    dense = plan.of("text_encoder")[0].skipped_because
    assert dense == "the recipe leaves this component dense"


def test_a_layer_a_pattern_does_not_fit_is_skipped_with_the_reason(tiny_sd: Path) -> None:
    plan = make_plan(_recipe([{"pattern": "2:16"}]), read_catalog(tiny_sd))
    first = next(p for p in plan.of("unet") if p.name == "conv_in.weight")
    assert first.skipped_because == "4 input channels are not divisible by 16"


def test_a_global_allocation_is_open_until_the_weights_are_read(tiny_sd: Path) -> None:
    plan = make_plan(_recipe([{"sparsity": 0.3}], "global"), read_catalog(tiny_sd))
    assert {p.sparsity for p in plan.layers if p.pruned} == {BY_ALLOCATION}
    assert account(plan).together.of_layers_pruned == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": "nowhere.*", "sparsity": 0.5}, "rule 1: 'nowhere.*' matches none"),
        ({"layers": "conv_in", "scope": "linear", "sparsity": 0.5}, "matches none"),
        ({"layers": "conv_in", "pattern": "2:16"}, "4 input channels are not divisible by 16"),
    ],
)
def test_a_rule_that_prunes_nothing_is_refused(
    tiny_sd: Path, rule: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(_recipe([rule]), read_catalog(tiny_sd))


def test_a_component_the_model_lacks_is_refused(sd2: Catalog) -> None:
    recipe = Recipe.model_validate({"name": "r", "prune": {"vae": {"rules": [{"sparsity": 0.5}]}}})
    with pytest.raises(UsageError, match="prunes vae, the model has text_encoder, unet"):
        make_plan(recipe, sd2)


def test_a_missing_component_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected safetensors weights, found nothing"):
        read_catalog(tmp_path)


def test_a_criterion_that_looks_at_activations_gets_what_is_asked(
    tiny_sd: Path,
) -> None:
    rules = [{"criterion": "wanda", "sparsity": 0.37}]
    plan = make_plan(_recipe(rules), read_catalog(tiny_sd))
    for layer in (p for p in plan.of("unet") if p.pruned):
        assert layer.zeros == int(0.37 * layer.numel + 0.5)


def test_one_threshold_over_all_does_not_go_with_rows(tiny_sd: Path) -> None:
    rules = [{"criterion": "wanda", "sparsity": 0.5}]
    with pytest.raises(UsageError, match="wanda compares weights within each output row"):
        make_plan(_recipe(rules, "global"), read_catalog(tiny_sd))
    fixed = [{"criterion": "wanda", "pattern": "2:4", "scope": "linear"}]  # is in no threshold
    plan = make_plan(_recipe(fixed, "global"), read_catalog(tiny_sd))
    assert {p.sparsity for p in plan.layers if p.pruned} == {0.5}


def test_one_threshold_over_all_does_not_go_with_weights_that_change(tiny_sd: Path) -> None:
    rules = [{"criterion": "sparsegpt", "sparsity": 0.5}]
    with pytest.raises(UsageError, match="sparsegpt changes the weights it chooses among"):
        make_plan(_recipe(rules, "global"), read_catalog(tiny_sd))
    plan = make_plan(_recipe(rules, "erk"), read_catalog(tiny_sd))
    assert {p.sparsity for p in plan.layers if p.pruned} == {BY_ALLOCATION}


def test_the_vae_has_no_noise_prediction_to_be_measured(tiny_sd: Path) -> None:
    section = {"allocation": "sensitivity", "rules": [{"sparsity": 0.5}]}
    recipe = Recipe.model_validate({"name": "r", "prune": {"vae": section}})
    with pytest.raises(UsageError, match="vae, rule 1: sensitivity looks at the noise prediction"):
        make_plan(recipe, read_catalog(tiny_sd))


@pytest.mark.parametrize("allocation", ["global", "erk", "owl", "sensitivity"])
def test_layers_under_an_allocation_answer_for_their_total(tiny_sd: Path, allocation: str) -> None:
    recipe = _recipe([{"layers": "mid_block.*", "scope": "linear", "sparsity": 0.3}], allocation)
    plan = make_plan(recipe, read_catalog(tiny_sd))
    members = [p for p in plan.layers if p.pruned]
    total = int(0.3 * sum(p.numel for p in members) + 0.5)

    def resolved(taken: int) -> SparsityPlan:
        zeros = [taken - 100, 100, *[0] * (len(members) - 2)]
        counts = {p.name: n for p, n in zip(members, zeros, strict=True)}
        layers = (
            p.model_copy(update={"zeros": counts[p.name]}) if p.pruned else p for p in plan.layers
        )
        return plan.model_copy(update={"layers": tuple(layers)})

    assert shortfalls(resolved(total), recipe) == []
    found = shortfalls(resolved(total - 1), recipe)
    assert found == [f"unet, rule 1 ({total - 1:,} zeros, asked {total:,})"]
    assert account(resolved(total)).components["unet"].zeros == total


def test_limits_leave_what_uniform_layers_would_be_rounded_to(tiny_sd: Path) -> None:
    limited = {"criterion": "wanda", "sparsity": 0.37, "max_sparsity": 0.37}
    recipe = _recipe([{"layers": "mid_block.*", "scope": "linear", **limited}], "erk")
    plan = make_plan(recipe, read_catalog(tiny_sd))

    def at(share: float) -> SparsityPlan:
        layers = (
            p.model_copy(update={"zeros": p.shape[0] * int(share * p.numel / p.shape[0] + 0.5)})
            if p.pruned
            else p
            for p in plan.layers
        )
        return plan.model_copy(update={"layers": tuple(layers)})

    assert shortfalls(at(0.37), recipe) == []
    assert len(shortfalls(at(0.36), recipe)) == 1


def test_a_criterion_that_needs_what_nobody_collects_is_refused(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdcompress import plan
    from sdcompress.criteria import Criterion

    unheard = Criterion(needs=frozenset({"taste"}), score=lambda weight, stats: weight)
    monkeypatch.setattr(plan, "load_criterion", lambda name: unheard)
    with pytest.raises(UsageError, match="needs taste, which nothing collects yet"):
        make_plan(_recipe([{"sparsity": 0.5}]), read_catalog(tiny_sd))
