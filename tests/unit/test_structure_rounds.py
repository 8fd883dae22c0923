"""Blocks become narrower before single weights are pruned: in what order, and from where on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdcompress.bundle import Bundle
from sdcompress.catalog import read_catalog
from sdcompress.errors import UsageError
from sdcompress.evaluation.quality import QualitySettings
from sdcompress.latency import LatencyTable
from sdcompress.patterns import parse_pattern, violations
from sdcompress.plan import SparsityPlan, account
from sdcompress.prune import decisive, prune, record
from sdcompress.recipe import Recipe
from sdcompress.rounds import asked_in_rounds, check, check_recipe, prune_in_rounds
from sdcompress.shrink import shrink
from sdcompress.structure import read_record
from sdcompress.sweep.points import point_digest
from tests.narrowed import narrow_bundle, thinned

UNET = "unet/diffusion_pytorch_model.safetensors"
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
TUNE = {"steps": 1, "batch": 1, "sampling_steps": 1, "prompts": ["a red cat"]}
HALF: dict[str, Any] = {"rules": [{"ratio": 0.5}]}
TWO_TO_FOUR: list[dict[str, Any]] = [{"scope": "linear", "pattern": "2:4"}]


def make(
    structure: dict[str, Any] | None = HALF, rules: list[Any] | None = None, **more: Any
) -> Recipe:
    prune = {"unet": {"structure": structure, "rules": TWO_TO_FOUR if rules is None else rules}}
    given = {"name": "both", "prune": prune, "calibration": {"count": 2, "steps": 1}, **more}
    return Recipe.model_validate(given)


def weights(bundle: Bundle) -> dict[str, Tensor]:
    return load_file(bundle.path / UNET)


def same(a: Bundle, b: Bundle) -> bool:
    ours, theirs = weights(a), weights(b)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


class Heard:
    """What is done, in order; `stop` ends the call there, as an interruption would."""

    def __init__(self, stop: str = "") -> None:
        self.phases: list[str] = []
        self._stop = stop

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.phases:
            self.phases.append(what)
        if what == self._stop:
            raise KeyboardInterrupt


def table(seconds: float = 1.0, component: str = "unet") -> LatencyTable:
    return LatencyTable(
        component=component, machine="one", backend="onnxruntime", options={}, shapes={},
        rounds=1, total=seconds, blocks={},
    )  # fmt: skip


def test_single_weights_go_of_what_is_left(tiny_source: Bundle, tmp_path: Path) -> None:
    heard = Heard()
    bundle = prune_in_rounds(tiny_source, make(), tmp_path / "both", progress=heard)
    assert heard.phases == ["judging blocks", "cutting", "pruning"]
    assert [p.name for p in tmp_path.iterdir()] == ["both"]
    bundle.check_files()
    manifest, after = bundle.manifest, weights(bundle)
    assert (manifest.stage, manifest.parent) == ("pruned", tiny_source.digest)
    assert "rounds" not in manifest.details
    assert manifest.plan
    pruned = [p for p in manifest.plan.of("unet") if p.pruned]
    assert {p.shape for p in pruned if p.name.startswith(f"{FF}.net.2")} == {(32, 64)}
    for layer in pruned:
        assert after[layer.name].shape == layer.shape
        assert violations(after[layer.name], parse_pattern("2:4")) == 0
        assert layer.zeros == math.prod(layer.shape) / 2
    # What went with blocks is no zero of any kind.
    dense = read_catalog(tiny_source.path).parameters["unet"]
    left = sum(weight.numel() for weight in after.values())
    assert manifest.plan.removed == {"unet": dense - left}
    found = account(manifest.plan).components["unet"]
    assert (found.parameters, found.removed) == (left, dense - left)
    assert found.of_component == sum(p.zeros or 0 for p in pruned) / left
    # The same in two calls.
    narrow = shrink(tiny_source, make(rules=[]), tmp_path / "narrow")
    twice = prune(narrow, make(None), tmp_path / "twice")
    assert same(bundle, twice)
    assert manifest.details == twice.manifest.details == narrow.manifest.details
    assert twice.manifest.plan
    assert twice.manifest.plan.removed == manifest.plan.removed


def test_blocks_only_is_shrink_itself(tiny_source: Bundle, tmp_path: Path) -> None:
    recipe = make(rules=[])
    bundle = prune_in_rounds(tiny_source, recipe, tmp_path / "one")
    assert bundle.digest == shrink(tiny_source, recipe, tmp_path / "other").digest
    assert bundle.manifest.plan
    assert not any(p.pruned for p in bundle.manifest.plan.layers)
    assert (
        account(bundle.manifest.plan).together == account(bundle.manifest.plan).components["unet"]
    )


PHASES = [
    "judging blocks",
    "cutting",
    "round 1 of 2: pruning",
    "round 1 of 2: tuning",
    "round 2 of 2: pruning",
]


@pytest.mark.parametrize(("stopped", "again"), [("cutting", 0), ("round 1 of 2: pruning", 2)])
def test_rounds_go_on_from_where_they_were_stopped(
    stopped: str, again: int, tiny_source: Bundle, in_rounds: Bundle, tmp_path: Path
) -> None:
    recipe, out, heard = make(schedule={"rounds": 2, "tune": TUNE}), tmp_path / "out", Heard()
    with pytest.raises(KeyboardInterrupt):
        prune_in_rounds(tiny_source, recipe, out, progress=Heard(stopped))
    assert not out.exists()
    bundle = prune_in_rounds(tiny_source, recipe, out, progress=heard)
    assert heard.phases == PHASES[again:]
    assert bundle.digest == in_rounds.digest
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def in_rounds(tiny_source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Half of every block, then 3:4, tuned, then 2:4."""
    recipe = make(schedule={"rounds": 2, "tune": TUNE})
    return prune_in_rounds(tiny_source, recipe, tmp_path_factory.mktemp("rounds") / "whole")


def test_rounds_tell_of_single_weights_only(in_rounds: Bundle) -> None:
    manifest = in_rounds.manifest
    told = [(r["round"], r["sparsity"]["unet"]) for r in manifest.details["rounds"]]
    assert told == [(1, 0.25), (2, 0.5)]
    assert read_record(manifest.details)["unet"].blocks[FF].kept == 64
    assert manifest.recipe
    assert manifest.recipe["prune"]["unet"]["structure"]["rules"][0]["ratio"] == 0.5
    assert manifest.recipe["schedule"]["rounds"] == 2


def test_statistics_that_are_recorded_once_are_of_the_narrower_model(
    tiny_source: Bundle, tmp_path: Path
) -> None:
    rules = [{"criterion": "wanda", "scope": "linear", "sparsity": 0.75}]
    once = prune_in_rounds(tiny_source, make(rules=rules), tmp_path / "once")
    recipe, out = make(rules=rules, schedule={"rounds": 3, "recalibrate": False}), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune_in_rounds(tiny_source, recipe, out, progress=Heard("round 2 of 3: pruning"))
    heard = Heard()
    rounds = prune_in_rounds(tiny_source, recipe, out, progress=heard)
    # Recorded anew, of the same model, though the first round is done.
    assert [what for what in heard.phases if "calibrating" in what] == ["round 2 of 3: calibrating"]
    assert "cutting" not in heard.phases
    # With the same statistics every round takes the next of the same order.
    assert same(rounds, once)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["once", "out"]


def test_gradients_are_taken_of_the_narrower_model(
    tiny_sd: Path, tiny_source: Bundle, tmp_path: Path
) -> None:
    narrow = narrow_bundle(tiny_source, tmp_path / "narrow", thinned(tiny_sd, "unet"))
    rule = {"criterion": "taylor", "layers": f"{FF}.net.2", "sparsity": 0.5}
    recipe = make(None, [rule], calibration={"count": 1, "steps": 1})
    found = record(tiny_source, recipe, before=narrow)["unet"][f"{FF}.net.2.weight"]
    assert {statistic.shape for statistic in found.values()} == {(32, 64)}
    # On pictures of the dense model: its own give other gradients.
    own = record(narrow, recipe)["unet"][f"{FF}.net.2.weight"]
    assert all(not torch.equal(found[name], own[name]) for name in found)


def test_the_plan_is_of_what_is_left(tiny_source: Bundle) -> None:
    catalog = read_catalog(tiny_source.path)
    plan = check_recipe(make(schedule={"rounds": 2}), catalog)
    by_name = {p.name: p for p in plan.of("unet")}
    assert by_name[f"{FF}.net.0.proj.weight"].shape == (128, 32)  # of 256, two halves
    assert by_name[f"{FF}.net.2.weight"].zeros == 32 * 64 // 2
    removed = plan.removed["unet"]
    assert removed == catalog.parameters["unet"] - plan.parameters["unet"]
    assert account(plan).together.removed == removed
    first, last = asked_in_rounds(make(schedule={"rounds": 2}), catalog)
    assert (first, last) == (0.25, 0.5)


def test_an_n_of_m_pattern_has_to_fit_what_is_left(tiny_source: Bundle) -> None:
    structure = {"rules": [{"kind": "neurons", "ratio": 0.5, "multiple": 1}]}
    structure["rules"][0] |= {"blocks": FF, "ratio": 0.49}  # 65 of 128 stay
    rules = [{"layers": f"{FF}.net.2", "pattern": "2:4"}]
    with pytest.raises(UsageError, match="2:4 fits none .* 65 input channels"):
        check(tiny_source, make(structure, rules))


def test_a_budget_leaves_the_plan_open(tiny_source: Bundle) -> None:
    plan = check_recipe(make({"budget": {"macs": 0.7}}), read_catalog(tiny_source.path))
    assert plan.removed == {"unet": None}
    found = account(plan)
    assert found.components["text_encoder"].removed == 0
    assert found.together.removed is None
    assert found.pipeline.removed is None


def test_rounds_without_single_weights_are_refused(tiny_source: Bundle, tmp_path: Path) -> None:
    recipe = make(rules=[], schedule={"rounds": 3})
    with pytest.raises(UsageError, match="rounds prune single weights, found 'rounds: 3'"):
        prune_in_rounds(tiny_source, recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_budget_of_latency_without_a_table_is_refused(
    tiny_source: Bundle, tmp_path: Path
) -> None:
    recipe = make({"budget": {"latency": 0.7}})
    check(tiny_source, recipe)  # it will be measured
    with pytest.raises(UsageError, match="needs a table of what widths cost"):
        prune_in_rounds(tiny_source, recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_latencies_are_another_step(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is repeated with another table does not go on from the first one's blocks."""
    narrow = shrink(tiny_source, make(rules=[]), tmp_path / "narrow")
    asked: list[Any] = []

    def stand_in(source: Bundle, recipe: Recipe, out: Path, **how: Any) -> Bundle:
        asked.append((out.name, how["tables"], recipe.prune["unet"].rules))
        return shrink(source, make(rules=[]), out, replace=True)

    monkeypatch.setattr("sdcompress.rounds.shrink.shrink", stand_in)
    monkeypatch.setattr("sdcompress.rounds.shrink.check", lambda *args: {})
    recipe = make({"budget": {"latency": 0.7}})
    for number, seconds in enumerate((1.0, 1.0, 2.0)):
        with pytest.raises(KeyboardInterrupt):
            stop = Heard("pruning")
            prune_in_rounds(
                tiny_source,
                recipe,
                tmp_path / "out",
                tables={"unet": table(seconds)},
                progress=stop,
            )
        assert len(asked) == (1, 1, 2)[number]
    (first, given, rules), (second, *_) = asked
    assert first != second
    assert first.startswith("0-narrowed-")
    assert given["unet"].total == 1.0
    assert rules == ()
    assert narrow.manifest.plan


@pytest.mark.parametrize(
    ("structure", "calibrated"),
    [
        (HALF, False),
        ({"rules": [{"ratio": 0.5, "criterion": "wanda"}]}, True),
        ({"rules": [{"ratio": 0.5, "criterion": "obs"}]}, True),
        ({"rules": [{"ratio": 0.5, "refit": True}]}, True),
        (None, False),
    ],
)
def test_what_a_bundle_depends_on(structure: dict[str, Any] | None, calibrated: bool) -> None:
    recipe = make(structure, sampling={"height": 16, "steps": 4})
    parts = decisive(recipe)
    assert ("calibration" in parts) == calibrated
    expected = {"height": 16, "width": None} if structure else None
    assert parts.get("sampling") == expected
    Recipe.model_validate(parts)  # which the manifest holds


def test_a_point_of_a_sweep_knows_what_blocks_cost(tiny_source: Bundle, tmp_path: Path) -> None:
    settings = QualitySettings(prompts=("at", "a cat"), steps=1, guidance=1.0, metrics=("psnr",))

    def digest(**more: Any) -> str:
        return point_digest(tiny_source, make(**more), settings)

    assert digest() == digest()
    assert digest() != digest(sampling={"height": 32})
    assert digest(structure=None) == digest(structure=None, sampling={"height": 32})
    file = tmp_path / "table.json"
    latency = {"budget": {"latency": 0.9}, "table": str(file)}
    digests = []
    for seconds in (1.0, 2.0):
        file.write_text(table(seconds).model_dump_json())
        digests.append(digest(structure=latency))
    assert digests[0] != digests[1]


def test_what_is_removed_adds_up() -> None:
    plan = SparsityPlan(layers=(), parameters={"text_encoder": 5, "unet": 60}, removed={"unet": 40})
    found = account(plan)
    assert {c: s.removed for c, s in found.components.items()} == {"text_encoder": 0, "unet": 40}
    assert (found.together.parameters, found.together.removed) == (60, 40)
    assert (found.pipeline.parameters, found.pipeline.removed) == (65, 40)
