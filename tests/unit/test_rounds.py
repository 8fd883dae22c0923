"""Pruning in rounds: how far each goes, what it keeps, where a call that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from export.run import Workspace, _sparse_weights
from sdcompress.bundle import Bundle, locked
from sdcompress.commands.plan import command as plan
from sdcompress.errors import InputError, UsageError
from sdcompress.evaluation.quality import QualitySettings
from sdcompress.patterns import parse_pattern, violations
from sdcompress.prune import notes, prune
from sdcompress.recipe import Recipe
from sdcompress.rounds import check, cubic, prune_in_rounds, round_recipe
from sdcompress.search.cost import weigh
from sdcompress.sweep.points import _made
from sdcompress.tuning import check_lineage

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
TUNE = {"steps": 1, "batch": 1, "sampling_steps": 1, "prompts": ["a red cat"]}


def make(rule: dict[str, Any], component: str = "text_encoder", **more: Any) -> Recipe:
    prune = {component: {"rules": [rule]}}
    calibration = {"count": 2, "steps": 1}
    given = {"name": "rounds", "prune": prune, "calibration": calibration, **more}
    return Recipe.model_validate(given)


def rules(recipe: Recipe, number: int) -> list[Any]:
    return [r for s in round_recipe(recipe, number).prune.values() for r in s.rules]


def weights(bundle: Bundle, file: str = TEXT) -> dict[str, Tensor]:
    return load_file(bundle.path / file)


def equal(a: Bundle, b: Bundle, file: str = TEXT) -> bool:
    ours, theirs = weights(a, file), weights(b, file)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


class Heard:
    """What is done, in order; `stop` ends the call there, as an interruption would."""

    def __init__(self, stop: str = "", look: Callable[[], object] = lambda: None) -> None:
        self.phases: list[str] = []
        self._stop, self._look = stop, look

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.phases:
            self.phases.append(what)
        self._look()
        if what == self._stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("initial", "final", "reached"),
    [
        (0.0, 0.8, [0.4625, 0.7, 0.7875, 0.8]),  # 0.8 * (1 - 27/64), (1 - 8/64), (1 - 1/64)
        (0.5, 0.75, [0.64453125, 0.71875, 0.74609375, 0.75]),
        (0.6, 0.6, [0.6, 0.6, 0.6, 0.6]),
    ],
)
def test_the_cubic_by_hand(initial: float, final: float, reached: list[float]) -> None:
    found = [cubic(initial, final, number / 4) for number in (1, 2, 3, 4)]
    assert found == pytest.approx(reached, abs=1e-15)
    assert found[-1] == final  # to the last bit


@pytest.mark.parametrize(
    ("pattern", "rounds", "initial", "expected"),
    [
        ("2:4", 2, 0.0, ["3:4", "2:4"]),  # 2 * 7/8 = 1.75 zeros
        ("2:4", 4, 0.0, ["3:4", "3:4", "3:4", "2:4"]),  # 1.16, 1.75, 1.97
        ("2:4", 2, 0.5, ["2:4", "2:4"]),
        ("1:8", 3, 0.0, ["4:8", "2:8", "1:8"]),  # 7 * 19/27 = 4.93, 7 * 26/27 = 6.74
        ("8:16", 2, 0.0, ["9:16", "8:16"]),  # 8 * 7/8 = 7, exactly
        ("3:4", 3, 0.0, ["3:4", "3:4", "3:4"]),  # 0.70 would be none, one goes at least
        ("4:4", 2, 0.0, ["4:4", "4:4"]),
    ],
)
def test_an_n_of_m_pattern_comes_down_to_its_n(
    pattern: str, rounds: int, initial: float, expected: list[str]
) -> None:
    recipe = make({"pattern": pattern}, schedule={"rounds": rounds, "initial": initial})
    found = [rules(recipe, number)[0].pattern for number in range(1, rounds + 1)]
    assert found == expected


def test_the_recipe_of_a_round() -> None:
    schedule = {"rounds": 2, "initial": 0.4, "tune": TUNE}
    recipe = Recipe.model_validate(
        {
            "name": "mixed",
            "schedule": schedule,
            "tune": TUNE,
            "prune": {
                "unet": {
                    "allocation": "global",
                    "rules": [
                        {"sparsity": 0.8, "min_sparsity": 0.4, "max_sparsity": 0.9},
                        {"layers": "conv_in", "keep": "dense", "reason": "next to the latents"},
                    ],
                }
            },
        }
    )
    first, last = round_recipe(recipe, 1), round_recipe(recipe, 2)
    pruned, kept = first.prune["unet"].rules
    assert pruned.sparsity == pytest.approx(0.75)  # 0.8 - 0.4 / 8
    assert pruned.min_sparsity == pytest.approx(0.375)  # as far below as before
    assert pruned.max_sparsity == 0.9
    assert kept == recipe.prune["unet"].rules[1]
    assert first.prune["unet"].allocation == "global"
    assert last.prune == recipe.prune
    for made in (first, last):
        assert (made.schedule.rounds, made.tune, made.schedule.tune) == (1, None, None)
        Recipe.model_validate(made.model_dump(mode="json"))  # which the manifest of a round holds


def test_one_round_is_prune_itself(tiny_source: Bundle, tmp_path: Path) -> None:
    recipe = make({"sparsity": 0.5})
    one = prune_in_rounds(tiny_source, recipe, tmp_path / "one")
    assert one.digest == prune(tiny_source, recipe, tmp_path / "once").digest
    assert "rounds" not in one.manifest.details
    assert "schedule" not in (one.manifest.recipe or {})


def test_rounds_come_to_what_one_shot_does_where_scores_stay(
    tiny_source: Bundle, tmp_path: Path
) -> None:
    recipe = make({"scope": "linear", "sparsity": 0.75}, schedule={"rounds": 2, "initial": 0.25})
    bundle = prune_in_rounds(tiny_source, recipe, tmp_path / "rounds")
    manifest = bundle.manifest
    assert (manifest.stage, manifest.parent) == ("pruned", tiny_source.digest)
    assert manifest.recipe == {
        **recipe.model_dump(mode="json", include={"name", "seed", "prune", "schedule"})
    }
    assert manifest.plan
    layers = [p for p in manifest.plan.layers if p.pruned]
    numel = sum(p.numel for p in layers)
    # All layers here have a multiple of 16 weights, so that no count is rounded.
    assert manifest.details["rounds"] == [
        {
            "round": number,
            "zeros": {"text_encoder": numel * sixteenths // 16},
            "sparsity": {"text_encoder": sixteenths / 16},
        }
        for number, sixteenths in ((1, 11), (2, 12))
    ]
    assert notes(manifest) == ["pruned in 2 rounds: text_encoder 68.8%, 75.0%"]
    assert {p.sparsity for p in layers} == {0.75}
    once = prune(tiny_source, make({"scope": "linear", "sparsity": 0.75}), tmp_path / "once")
    assert equal(bundle, once)
    assert manifest.tensors == once.manifest.tensors
    bundle.check_files()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["once", "rounds"]


def test_progressive_2_to_4_with_tuning_between(tiny_source: Bundle, tmp_path: Path) -> None:
    rule = {"scope": "linear", "pattern": "2:4"}
    recipe = make(rule, "unet", schedule={"rounds": 2, "tune": TUNE})
    tuned: dict[str, Tensor] = {}

    def look() -> None:  # at what lies there while the second round is made
        for file in (tmp_path / ".out.rounds").glob(f"1-tuned-*/{UNET}"):
            if not tuned:
                tuned.update(load_file(file))

    heard = Heard(look=look)
    bundle = prune_in_rounds(tiny_source, recipe, tmp_path / "out", progress=heard)
    assert heard.phases == [
        "round 1 of 2: pruning",
        "round 1 of 2: tuning",
        "round 2 of 2: pruning",
    ]
    before, after = weights(tiny_source, UNET), weights(bundle, UNET)
    assert bundle.manifest.plan
    layers = [p for p in bundle.manifest.plan.of("unet") if p.pruned]
    assert len(layers) > 10
    for layer in layers:
        name = layer.name
        assert violations(tuned[name], parse_pattern("3:4")) == 0
        assert violations(after[name], parse_pattern("2:4")) == 0
        assert (after[name] == 0).float().mean() == 0.5
        assert not after[name][tuned[name] == 0].any()
        stays = after[name] != 0
        assert torch.equal(after[name][stays], tuned[name][stays])
        assert not torch.equal(after[name][stays], before[name][stays])
    first, last = bundle.manifest.details["rounds"]
    assert first["sparsity"] == {"unet": 0.25}
    assert (first["tuned"]["method"], first["tuned"]["steps"]) == ("distill", 1)
    assert last["sparsity"] == {"unet": 0.5}
    assert "tuned" not in last
    check_lineage(bundle, tiny_source)  # `sdcompress tune` takes it from here


@pytest.mark.parametrize("recalibrate", [True, False])
def test_statistics_anew_or_not(recalibrate: bool, tiny_source: Bundle, tmp_path: Path) -> None:
    rule = {"criterion": "wanda", "scope": "linear", "sparsity": 0.75}
    schedule = {"rounds": 3, "recalibrate": recalibrate}
    heard = Heard()
    rounds = prune_in_rounds(
        tiny_source, make(rule, schedule=schedule), tmp_path / "rounds", progress=heard
    )
    once = prune(tiny_source, make(rule), tmp_path / "once")
    calibrated = [what for what in heard.phases if "calibrating" in what]
    assert len(calibrated) == (3 if recalibrate else 1)
    # With the statistics of the dense model every round takes the next of the same order.
    assert equal(rounds, once) is not recalibrate
    assert rounds.manifest.recipe
    assert len(rounds.manifest.recipe["calibration"]["prompts"]) == 2


def test_a_round_that_asks_for_nothing_new_is_left_out(tiny_source: Bundle, tmp_path: Path) -> None:
    heard = Heard()
    recipe = make({"pattern": "2:4"}, schedule={"rounds": 4})
    bundle = prune_in_rounds(tiny_source, recipe, tmp_path / "out", progress=heard)
    assert heard.phases == ["round 1 of 4: pruning", "round 4 of 4: pruning"]
    assert [told["round"] for told in bundle.manifest.details["rounds"]] == [1, 4]


def test_a_call_that_was_stopped_goes_on(tiny_source: Bundle, tmp_path: Path) -> None:
    recipe = make({"scope": "linear", "sparsity": 0.5}, schedule={"rounds": 2, "tune": TUNE})
    out, folder = tmp_path / "out", tmp_path / ".out.rounds"
    most = 0

    def look() -> None:
        nonlocal most
        bundles = [p for p in folder.iterdir() if p.is_dir() and not p.name.endswith(".tuning")]
        most = max(most, len(bundles))
        assert not out.exists()

    whole = prune_in_rounds(tiny_source, recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prune_in_rounds(tiny_source, recipe, out, progress=Heard("round 2 of 2: pruning", look))
    heard = Heard(look=look)
    bundle = prune_in_rounds(tiny_source, recipe, out, progress=heard)
    assert heard.phases == ["round 2 of 2: pruning"]
    assert bundle.digest == whole.digest
    assert most == 2
    assert not folder.exists()


def stopped(source: Bundle, out: Path, sparsity: float = 0.5) -> Recipe:
    """The recipe of a call that was stopped when its first round was finished."""
    recipe = make({"sparsity": sparsity}, schedule={"rounds": 2})
    with pytest.raises(KeyboardInterrupt):
        prune_in_rounds(source, recipe, out, progress=Heard("round 2 of 2: pruning"))
    return recipe


@pytest.mark.parametrize("why", ["fresh", "damaged", "other recipe", "other model"])
def test_what_is_not_the_same_is_made_anew(
    why: str, tiny_source: Bundle, pruned: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe, source, heard = stopped(tiny_source, out), tiny_source, Heard()
    (first,) = (tmp_path / ".out.rounds").glob("1-pruned-*")
    if why == "damaged":
        file = first / TEXT
        file.unlink()
        file.write_bytes(b"")
    elif why == "other recipe":
        recipe = make({"sparsity": 0.6}, schedule={"rounds": 2})
    elif why == "other model":
        source = pruned
    bundle = prune_in_rounds(source, recipe, out, fresh=why == "fresh", progress=heard)
    assert heard.phases == ["round 1 of 2: pruning", "round 2 of 2: pruning"]
    assert bundle.manifest.parent == source.digest
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_last_good_state_survives(tiny_source: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = prune(tiny_source, make({"sparsity": 0.2}), out)
    recipe = make({"sparsity": 0.5}, schedule={"rounds": 2})
    with pytest.raises(InputError, match="already exists"):
        prune_in_rounds(tiny_source, recipe, out)
    with pytest.raises(KeyboardInterrupt):
        stop = Heard("round 2 of 2: pruning")
        prune_in_rounds(tiny_source, recipe, out, replace=True, progress=stop)
    assert Bundle.open(out).digest == old.digest
    new = prune_in_rounds(tiny_source, recipe, out, replace=True)
    assert Bundle.open(out).digest == new.digest != old.digest
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_calls_do_not_share_a_folder(tiny_source: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = stopped(tiny_source, out)
    with locked(tmp_path / ".out.rounds"), pytest.raises(InputError, match="another pruning"):
        prune_in_rounds(tiny_source, recipe, out, fresh=True)
    heard = Heard()
    prune_in_rounds(tiny_source, recipe, out, progress=heard)
    assert heard.phases == ["round 2 of 2: pruning"]  # the first one is still there


@pytest.mark.parametrize(
    ("schedule", "calibration", "message"),
    [
        ({"tune": TUNE}, {}, "'tune' is about several rounds, found 'rounds: 1'"),
        ({"initial": 0.2}, {}, "'initial' is about several rounds"),
        ({"recalibrate": False}, {}, "'recalibrate' is about several rounds"),
        ({"rounds": 2, "initial": 0.6}, {}, r"found 0.6 and 0.5 \(text_encoder, rule 1\)"),
        ({"rounds": 2, "recalibrate": False}, {"packages": 3}, "'packages: 3' with"),
        ({"rounds": 2, "tune": {**TUNE, "components": ["unet"]}}, {}, "unet is not pruned"),
    ],
)
def test_a_schedule_that_cannot_be(
    schedule: dict[str, Any],
    calibration: dict[str, Any],
    message: str,
    tiny_source: Bundle,
    tmp_path: Path,
) -> None:
    recipe = make({"sparsity": 0.5}, schedule=schedule, calibration=calibration)
    with pytest.raises(UsageError, match=message):
        prune_in_rounds(tiny_source, recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tuning_learns_from_a_dense_model(tiny_source: Bundle, pruned: Bundle) -> None:
    recipe = make({"sparsity": 0.5}, schedule={"rounds": 2, "tune": TUNE})
    with pytest.raises(UsageError, match="expected a dense model.*found a pruned bundle"):
        check(pruned, recipe)
    plan = check(tiny_source, recipe)
    assert {p.component for p in plan.layers if p.pruned} == {"text_encoder"}


def test_whoever_prunes_does_so_in_rounds(
    tiny_source: Bundle, pruned: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def count(source: Bundle, recipe: Recipe, out: Path, **how: Any) -> Bundle:
        asked.append(recipe.schedule.rounds)
        return pruned

    monkeypatch.setattr("sdcompress.rounds.prune_in_rounds", count)
    recipe = make({"sparsity": 0.5}, schedule={"rounds": 3})
    pictures = QualitySettings(prompts=("a", "b"), metrics=("psnr",), steps=1, guidance=1)
    weigh(tiny_source, recipe, pictures, tmp_path / "search")
    assert _made(tiny_source, recipe, tmp_path / "point") is pruned
    with Workspace.open(tmp_path / "run") as place:
        _sparse_weights(place, tiny_source, recipe, lambda stage, done: None, lambda what: None)
    assert asked == [3, 3, 3]


def test_a_point_that_was_killed_later_is_not_pruned_again(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make({"sparsity": 0.5})
    made = _made(tiny_source, recipe, tmp_path)
    monkeypatch.setattr("sdcompress.rounds.prune_in_rounds", None)
    assert _made(tiny_source, recipe, tmp_path).digest == made.digest


def test_the_plan_tells_what_each_round_asks(
    tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_sd.parent / "rounds.yaml"
    rule = {"layers": "*", "scope": "linear", "sparsity": 0.8}
    given = make(rule, schedule={"rounds": 2}).model_dump(mode="json", include={"name", "prune"})
    recipe.write_text(json.dumps({**given, "schedule": {"rounds": 2}}))
    plan(["--model", str(tiny_sd), "--json", str(recipe)], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["rounds"] == pytest.approx([0.7, 0.8])
    plan(["--model", str(tiny_sd), str(recipe)], standalone_mode=False)
    assert "in 2 rounds, which ask for 70.0%, 80.0% together" in capsys.readouterr().out


def test_the_plan_refuses_what_prune_would(tiny_sd: Path) -> None:
    recipe = tiny_sd.parent / "refused.yaml"
    for more, message in (
        ({"schedule": {"recalibrate": False}}, "is about several rounds"),
        ({"schedule": {"rounds": 2, "initial": 0.9}}, "'initial' to be no more"),
        ({"prune": {"vae": {"rules": [{"criterion": "snip", "sparsity": 0.1}]}}}, "without grad"),
    ):
        given = make({"sparsity": 0.8}).model_dump(mode="json", include={"name", "prune"})
        recipe.write_text(json.dumps({**given, **more}))
        with pytest.raises(UsageError, match=message):
            plan(["--model", str(tiny_sd), str(recipe)], standalone_mode=False)
