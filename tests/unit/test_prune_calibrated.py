"""Pruning by what a model is seen to do: in packages, by earlier statistics, in rounds."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sdcompress.calibrate as calibrate_module
from sdcompress.bundle import Bundle
from sdcompress.calibrate import Calibrator
from sdcompress.calibrate._inputs import Inputs
from sdcompress.calibrate._packages import packages, statistics_bytes
from sdcompress.criteria import Criterion, LayerStats, load_criterion
from sdcompress.errors import InputError, UsageError
from sdcompress.patterns import Select, parse_pattern
from sdcompress.prune import notes, prune, record
from sdcompress.recipe import Recipe

UNET = "unet/diffusion_pytorch_model.safetensors"
CALIBRATION = {"prompts": ["a red cat", "a blue dog"], "steps": 2}
RULE = {"criterion": "obs_diff", "pattern": "2:4", "layers": "down_blocks.0.*"}


def _recipe(
    rule: dict[str, Any] = RULE, section: dict[str, Any] | None = None, **calibration: Any
) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "prune": {"unet": {"rules": [rule], **(section or {})}},
            "calibration": {**CALIBRATION, **calibration},
        }
    )


def test_a_package_sees_the_packages_before_it_pruned(tiny_source: Bundle, tmp_path: Path) -> None:
    recipe = _recipe(packages=3)
    bundle = prune(tiny_source, recipe, tmp_path / "p")
    before, after = load_file(tiny_source.path / UNET), load_file(bundle.path / UNET)
    assert bundle.manifest.plan
    layers = {p.name: p for p in bundle.manifest.plan.of("unet") if p.pruned}
    needs = frozenset({"step_hessian"})
    sizes = [("unet", n, statistics_bytes(p.shape, needs, 8192)) for n, p in layers.items()]
    calibrator, solve = (
        Calibrator(tiny_source, recipe.calibration),
        load_criterion("obs_diff").solve,
    )
    assert solve
    parts = packages(sizes, 3)
    assert [bool(part) for part in parts] == [True] * 3
    for part in parts:
        names = [name for _, name, _ in part]
        found = calibrator.record({"unet": dict.fromkeys(names, needs)})["unet"]
        for name in names:
            layer = layers[name]
            select = Select(parse_pattern("2:4"), layer.shape, layer.numel // 2)
            stats = LayerStats(recorded=found[name])
            mask, weight = solve(before[name].float(), stats, select)
            assert torch.equal(after[name], (weight * mask).to(before[name].dtype)), name
            calibrator.replace("unet", name, after[name])
    at_once = load_file(prune(tiny_source, _recipe(), tmp_path / "q").path / UNET)
    first, last = parts[0][0][1], parts[-1][-1][1]
    assert torch.equal(after[first], at_once[first])
    assert not torch.equal(after[last], at_once[last])


def test_statistics_recorded_before_give_the_same_bytes(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taylor = {"criterion": "taylor", "sparsity": 0.5, "layers": "down_blocks.0.resnets.0.*"}
    recipe = _recipe(taylor, {"allocation": "owl"})
    expected = prune(tiny_source, recipe, tmp_path / "p").digest
    statistics = record(tiny_source, recipe)
    kept = {name for layer in statistics["unet"].values() for name in layer}
    assert kept == {"grad_abs", "input_sq_norm"}  # the criterion's, and the allocation's
    monkeypatch.setattr("sdcompress.prune.Calibrator", None)
    again = prune(tiny_source, recipe, tmp_path / "q", statistics=statistics)
    assert again.digest == expected
    assert record(tiny_source, _recipe({"sparsity": 0.5})) == {}


def test_what_an_earlier_round_pruned_stays_pruned(tiny_source: Bundle, tmp_path: Path) -> None:
    for number, rule in enumerate(
        (
            {"criterion": "random", "layers": "down_blocks.0.resnets.0.*"},
            {"criterion": "sparsegpt", "layers": "down_blocks.0.resnets.0.*"},
        )
    ):
        first = prune(tiny_source, _recipe({**rule, "sparsity": 0.3}), tmp_path / f"{number}a")
        other = _recipe({**rule, "sparsity": 0.6}).model_copy(update={"seed": 1})
        second = prune(tiny_source, other, tmp_path / f"{number}b", before=first)
        old, new = load_file(first.path / UNET), load_file(second.path / UNET)
        assert second.manifest.parent == tiny_source.digest
        assert second.manifest.plan
        for layer in (p for p in second.manifest.plan.of("unet") if p.pruned):
            assert not new[layer.name][old[layer.name] == 0].any()
            assert int((new[layer.name] == 0).sum()) == int(0.6 * layer.numel + 0.5)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            _recipe({"criterion": "taylor", "sparsity": 0.5}, {"allocation": "global"}, packages=2),
            "unet: a global threshold needs the scores of all layers at once",
        ),
        (
            Recipe.model_validate(
                {
                    "name": "r",
                    "prune": {"vae": {"rules": [{"criterion": "fisher", "sparsity": 0.5}]}},
                }
            ),
            "vae: expected a criterion without gradients",
        ),
        (
            _recipe({"criterion": "snip", "sparsity": 0.5}, images="nowhere"),
            "nowhere",
        ),
    ],
    ids=["global", "vae", "images"],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    tiny_source: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: Recipe,
    message: str,
) -> None:
    monkeypatch.setattr("sdcompress.prune.Calibrator", None)
    with pytest.raises((UsageError, InputError), match=message) as refused:
        prune(tiny_source, recipe, tmp_path / "p")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_nm_has_no_global_threshold_that_packages_could_not_have(
    tiny_source: Bundle, tmp_path: Path
) -> None:
    section = {"allocation": "global"}
    bundle = prune(tiny_source, _recipe(RULE, section, packages=2), tmp_path / "p")
    assert bundle.manifest.plan
    assert all(p.zeros == p.numel // 2 for p in bundle.manifest.plan.of("unet") if p.pruned)


def test_statistics_are_never_there_twice(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, alive = Inputs.statistics, list[int]()

    def statistics(one: Inputs, names: frozenset[str]) -> dict[str, torch.Tensor]:
        alive.append(sum(other() is not None for other in made))
        return taken(one, names)

    made = list[weakref.ref[Inputs]]()
    add = Inputs.add

    def note(one: Inputs, *args: Any) -> None:
        if not any(other() is one for other in made):
            made.append(weakref.ref(one))
        add(one, *args)

    monkeypatch.setattr(Inputs, "statistics", statistics)
    monkeypatch.setattr(Inputs, "add", note)
    record(tiny_source, _recipe())
    assert alive[0] == len(made) > 3
    assert alive[-1] <= 2, "what has been taken is let go of"


def test_packages_cannot_use_statistics_of_before(tiny_source: Bundle, tmp_path: Path) -> None:
    statistics = record(tiny_source, _recipe())
    with pytest.raises(UsageError, match="one after the other"):
        prune(tiny_source, _recipe(packages=2), tmp_path / "p", statistics=statistics)


def test_too_little_memory_names_the_packages_that_would_do(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_module, "_free_memory", lambda: 1_000_000)
    with pytest.raises(UsageError, match=r"0\.0 GB are free; .*'packages: \d+'"):
        prune(tiny_source, _recipe(), tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_a_hessian_for_each_position_is_told(tiny_source: Bundle, tmp_path: Path) -> None:
    bundle = prune(tiny_source, _recipe(max_hessian=64), tmp_path / "p")
    cut = bundle.manifest.details["hessian_per_position"]
    assert "unet/down_blocks.0.resnets.0.conv1.weight" in cut
    assert all(name.startswith("unet/down_blocks.0.") for name in cut)
    (note,) = notes(bundle.manifest)
    assert note.startswith(f"{len(cut)} layers (such as {cut[0]}) have more columns")
    whole = prune(tiny_source, _recipe(), tmp_path / "q")
    assert "hessian_per_position" not in whole.manifest.details
    assert notes(whole.manifest) == []


def test_weights_that_the_dtype_cannot_hold_are_refused(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(
        weight: torch.Tensor, stats: LayerStats, select: Select
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return weight != 0, weight * 1e39

    criterion = Criterion(solve=grow)
    monkeypatch.setattr("sdcompress.prune._decisions.load_criterion", lambda name: criterion)
    with pytest.raises(InputError, match=r"unet/down_blocks.0\S+: obs_diff makes weights that"):
        prune(tiny_source, _recipe(), tmp_path / "p")
    assert not list(tmp_path.iterdir())
