"""How a rule's sparsity is spread over layers: small cases, counted by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdcompress import registry
from sdcompress.allocation import Group, allocate, foresee, needs
from sdcompress.allocation.owl import outlier_share
from sdcompress.allocation.sensitivity import cheapest, lower_hull
from sdcompress.bundle import Bundle
from sdcompress.catalog import read_catalog
from sdcompress.errors import UsageError
from sdcompress.plan import BY_ALLOCATION, LayerPlan, account, make_plan, shortfalls
from sdcompress.prune import prune
from sdcompress.recipe import ComponentRecipe, Recipe

WAYS = registry.names("allocation")
Shape = tuple[int, ...]


@dataclass
class Known:
    """Evidence that is all there; `losses(name, zeros)` is the measured loss."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Callable[[str, int], float] = lambda name, zeros: float(zeros)
    before: Mapping[str, int] = field(default_factory=dict)
    measured: list[tuple[str, int]] = field(default_factory=list)
    told: list[tuple[int, int]] = field(default_factory=list)

    def weight(self, layer: LayerPlan) -> Tensor:
        return self.weights[layer.name]

    def scores(self, layer: LayerPlan) -> Tensor:
        return self.weights[layer.name].abs()

    def statistic(self, layer: LayerPlan, name: str) -> Tensor:
        assert name == "input_sq_norm"
        return self.norms[layer.name]

    def loss(self, layer: LayerPlan, weight: Tensor) -> float:
        zeros = int((weight == 0).sum())
        self.measured.append((layer.name, zeros))
        return self.losses(layer.name, zeros)

    def gone(self, layer: LayerPlan) -> int:
        return self.before.get(layer.name, 0)

    def progress(self, done: int, total: int) -> None:
        self.told.append((done, total))


def _section(allocation: str, *, spread: float | None = None, **rule: Any) -> ComponentRecipe:
    extra = {} if spread is None else {"spread": spread}
    return ComponentRecipe.model_validate({"allocation": allocation, "rules": [rule], **extra})


def _layers(section: ComponentRecipe, shapes: Mapping[str, Shape]) -> list[LayerPlan]:
    rule = section.rules[0]
    return [
        LayerPlan(
            component="unet",
            name=name,
            kind="linear" if len(shape) == 2 else "conv",
            shape=shape,
            dtype="F32",
            rule=0,
            criterion=rule.criterion,
            pattern=rule.pattern,
            asked=rule.sparsity,
            sparsity=BY_ALLOCATION,
        )
        for name, shape in shapes.items()
    ]


def _spread(
    section: ComponentRecipe, shapes: Mapping[str, Shape], evidence: Known | None = None
) -> list[Group]:
    layers = _layers(section, shapes)
    return allocate(section.allocation, layers, section.rules[0], section, evidence or Known())


def _counts(groups: Sequence[Group]) -> dict[str, int]:
    assert all(len(group.layers) == 1 for group in groups)
    return {group.layers[0].name: group.zeros for group in groups}


def _random(shapes: Mapping[str, Shape]) -> Known:
    generator = torch.Generator().manual_seed(0)
    return Known(
        weights={n: torch.randn(s, generator=generator) for n, s in shapes.items()},
        norms={
            n: torch.rand((1, *s[1:]), generator=generator, dtype=torch.float64)
            for n, s in shapes.items()
        },
        losses=lambda name, zeros: (zeros / 100) ** 2 * (1 + shapes[name][0]),
    )


VARIED = {
    "narrow": (16, 8),
    "wide": (64, 64),
    "conv": (32, 16, 3, 3),
    "out": (4, 32, 3, 3),
    "deep": (48, 96),
}


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
@pytest.mark.parametrize(
    ("low", "asked", "high"),
    [
        *((0, 0, 1), (0, 0.1, 1), (0, 0.37, 1), (0, 0.8, 1), (0, 1, 1)),
        *((0.2, 0.37, 0.7), (0.2, 0.5, 0.7), (0.5, 0.5, 0.5)),
    ],
)
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("uniform", "global")])
def test_what_is_asked_is_hit_within_the_limits(
    way: str, low: float, asked: float, high: float, criterion: str
) -> None:
    section = _section(
        way, criterion=criterion, sparsity=asked, min_sparsity=low, max_sparsity=high
    )
    counts = _counts(_spread(section, VARIED, _random(VARIED)))
    assert list(counts) == list(VARIED)
    numel = {name: torch.Size(shape).numel() for name, shape in VARIED.items()}
    wanted = int(asked * sum(numel.values()) + 0.5)
    assert sum(counts.values()) == wanted
    for name, zeros in counts.items():
        assert low <= zeros / numel[name] <= high


def test_uniform_and_patterns_leave_each_layer_to_itself() -> None:
    fixed = _section("owl", pattern="2:4")
    layers = [p.model_copy(update={"zeros": 32}) for p in _layers(fixed, {"a": (8, 8)})]
    assert allocate("owl", layers, fixed.rules[0], fixed, Known()) == [Group(tuple(layers), 32)]


def test_what_has_to_be_recorded() -> None:
    expected = {"owl": {"input_sq_norm"}, "sensitivity": {"loss"}}
    assert {way: needs(way) for way in WAYS} == {way: expected.get(way, set()) for way in WAYS}


def test_erk_is_its_formula() -> None:
    # (out + in) / (out * in) is 20/64, 20/64 and 36/260; half of 388 weights stay:
    # scale * (20 + 20 + 36) = 194, so 194/76 * 20 = 51.05 of the first two and 91.9 of the last.
    groups = _spread(_section("erk", sparsity=0.5), {"a": (16, 4), "b": (4, 16), "c": (10, 26)})
    assert _counts(groups) == {"a": 13, "b": 13, "c": 168}


def test_erk_counts_the_kernel() -> None:
    # The conv's density is proportional to (4 + 4 + 3 + 3) / 144, the linear layer's to 20 / 96:
    # of 120 weights that stay 14/34 and 20/34.
    groups = _spread(_section("erk", sparsity=0.5), {"conv": (4, 4, 3, 3), "linear": (8, 12)})
    assert _counts(groups) == {"conv": 144 - 49, "linear": 96 - 71}


def test_erk_keeps_what_would_be_more_than_dense_dense() -> None:
    # Alone by the formula "small" would keep 0.8 * 416 * 8 / 48 = 55 of its 16.
    groups = _spread(_section("erk", sparsity=0.2), {"small": (4, 4), "large": (20, 20)})
    assert _counts(groups) == {"small": 0, "large": 83}


def test_a_layers_limit_makes_the_others_give_more() -> None:
    section = _section("erk", sparsity=0.5, max_sparsity=0.6)
    groups = _spread(section, {"a": (16, 4), "b": (4, 16), "c": (10, 26)})
    assert _counts(groups) == {"a": 19, "b": 19, "c": 156}


def test_the_share_of_outliers() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, 12.0], [1.0, 1.0, 1.0, 0.5]])
    even, uneven = torch.ones(1, 4), torch.tensor([[400.0, 1.0, 1.0, 1.0]])
    assert outlier_share(weight, even) == 1 / 8  # the mean is 2.31, and 12 is more than 5 times it
    assert outlier_share(weight, uneven) == 0  # 20 and 20 of 57.5 / 8 * 5 = 35.9
    conv = weight.reshape(2, 4, 1, 1).expand(2, 4, 3, 3)
    assert outlier_share(conv, even.reshape(1, 4, 1, 1).expand(1, 4, 3, 3)) == 1 / 8


def _outliers(*shares: float) -> Known:
    weights, norms = {}, {}
    for index, share in enumerate(shares):
        weight = torch.ones(10, 100)
        weight.view(-1)[: int(share * 1000)] = 100
        weights[f"layer{index}"], norms[f"layer{index}"] = weight, torch.ones(1, 100)
    return Known(weights, norms)


def test_owl_takes_less_where_there_are_more_outliers() -> None:
    # Outliers 0, 1 and 4 %: shares stretched to 0, 1/4 and 1, so the sparsities lie 0.04 and
    # 0.12 apart around their mean.
    known = _outliers(0, 0.01, 0.04)
    shapes = dict.fromkeys(known.weights, (10, 100))
    groups = _spread(_section("owl", sparsity=0.5, spread=0.08), shapes, known)
    # 0.5 + 0.0667 for the first by the formula, 0.5 - 0.0933 for the last, which 0.42 bounds
    assert _counts(groups) == {"layer0": 560, "layer1": 520, "layer2": 420}


def test_owl_without_a_difference_is_uniform() -> None:
    known = _outliers(0.01, 0.01)
    shapes = dict.fromkeys(known.weights, (10, 100))
    groups = _spread(_section("owl", sparsity=0.3), shapes, known)
    assert _counts(groups) == {"layer0": 300, "layer1": 300}


def test_a_global_threshold_knows_no_layers() -> None:
    section = _section("global", sparsity=0.5)
    (group,) = _spread(section, {"a": (2, 5), "b": (3, 4)})
    assert ([layer.name for layer in group.layers], group.zeros) == (["a", "b"], 11)


def test_a_global_threshold_stops_at_the_limits() -> None:
    known = Known(
        {
            "tiny": torch.arange(1.0, 11).reshape(2, 5),
            "small": torch.arange(5.0, 15).reshape(2, 5),
            "large": torch.arange(11.0, 21).reshape(2, 5),
            "huge": torch.arange(101.0, 111).reshape(2, 5),
        }
    )
    shapes = dict.fromkeys(known.weights, (2, 5))
    # 20 of 40 go. One threshold would take 10 of tiny, 8 of small and 2 of large.
    section = _section("global", sparsity=0.5, min_sparsity=0.1, max_sparsity=0.8)
    groups = _spread(section, shapes, known)
    found = {tuple(layer.name for layer in group.layers): group.zeros for group in groups}
    # 8 at the most, 1 at the least, and large gives what is left.
    assert found == {("tiny",): 8, ("small",): 8, ("huge",): 1, ("large",): 3}


def test_a_layer_that_only_one_threshold_takes_too_far_is_free_again() -> None:
    # One threshold takes all ten of `a` and none of the others; 7, 1 and 1 are too few, so that it
    # has to rise, and takes some of `b`, which is not at its least any more.
    known = Known(
        {
            "a": torch.arange(1.0, 11).reshape(2, 5),
            "b": torch.arange(20.0, 30).reshape(2, 5),
            "c": torch.arange(40.0, 50).reshape(2, 5),
        }
    )
    section = _section("global", sparsity=1 / 3, min_sparsity=0.1, max_sparsity=0.7)
    groups = _spread(section, dict.fromkeys(known.weights, (2, 5)), known)
    found = {tuple(layer.name for layer in group.layers): group.zeros for group in groups}
    assert found == {("a",): 7, ("b",): 2, ("c",): 1}


def test_a_hull_is_convex() -> None:
    points = [(0, 0.0), (10, 3.0), (20, 2.0), (30, 9.0), (40, 12.0)]
    assert lower_hull(points) == [(0, 0.0), (20, 2.0), (40, 12.0)]
    assert lower_hull([(0, 0.0), (1, 1.0), (2, 2.0)]) == [(0, 0.0), (2, 2.0)]
    assert lower_hull([(5, 1.0)]) == [(5, 1.0)]


def test_the_cheapest_weights_go_first() -> None:
    curves = [
        [(0, 0.0), (10, 1.0), (20, 4.0)],  # 0.1 and 0.3 a weight
        [(0, 0.0), (10, 2.0), (20, 40.0)],  # 0.2 and 3.8
    ]
    found = [cheapest(curves, total) for total in (0, 5, 10, 15, 25, 35, 40)]
    assert found == [[0, 0], [5, 0], [10, 0], [10, 5], [15, 10], [20, 15], [20, 20]]


def test_the_greedy_choice_is_the_best_there_is() -> None:
    curves = [
        [(0, 0.0), (1, 0.5), (2, 0.6), (3, 4.0)],
        [(0, 0.0), (1, 0.1), (2, 0.7), (3, 0.9)],
        [(0, 0.2), (1, 0.0), (2, 3.0), (3, 3.1)],
    ]
    hulls = [dict(_every(lower_hull(curve))) for curve in curves]
    for total in range(10):
        best = min(
            hulls[0][a] + hulls[1][b] + hulls[2][total - a - b]
            for a in range(4)
            for b in range(4)
            if 0 <= total - a - b <= 3
        )
        chosen = cheapest(curves, total)
        assert sum(chosen) == total
        assert sum(h[n] for h, n in zip(hulls, chosen, strict=True)) == pytest.approx(best)


def _every(hull: list[tuple[int, float]]) -> list[tuple[int, float]]:
    points = [hull[0]]
    for (x0, y0), (x1, y1) in pairwise(hull):
        points += [(x, y0 + (y1 - y0) * (x - x0) / (x1 - x0)) for x in range(x0 + 1, x1 + 1)]
    return points


def test_sensitivity_spares_what_hurts() -> None:
    shapes = {"robust": (10, 10), "touchy": (10, 10)}
    weights = {n: torch.arange(1.0, 101).reshape(10, 10) for n in shapes}
    price = {"robust": 1.0, "touchy": 10.0}
    known = Known(weights, losses=lambda name, zeros: price[name] * zeros**2)
    groups = _spread(_section("sensitivity", sparsity=0.5), shapes, known)
    # The pieces of the robust layer cost 25, 75, 125 and 163 a weight, the first of the touchy one
    # 250: all that were measured there, and the rest here.
    assert known.measured == [(n, z) for n in shapes for z in (25, 50, 75, 88)]
    assert _counts(groups) == {"robust": 88, "touchy": 12}
    assert known.told[0] == (1, 10)
    assert known.told[-1] == (10, 10)


def test_sensitivity_measures_within_the_limits() -> None:
    shapes = {"a": (10, 10), "b": (10, 10)}
    weights = {n: torch.arange(1.0, 101).reshape(10, 10) for n in shapes}
    known = Known(weights, losses=lambda name, zeros: float(zeros) * (1 + (name == "b")))
    section = _section("sensitivity", sparsity=0.4, min_sparsity=0.25, max_sparsity=0.5)
    assert _counts(_spread(section, shapes, known)) == {"a": 50, "b": 30}
    assert known.measured == [(n, z) for n in shapes for z in (25, 40, 50)]


def test_rows_compete_where_the_criterion_says_so() -> None:
    weight = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    seen: list[list[list[bool]]] = []

    class Watching(Known):
        def loss(self, layer: LayerPlan, weight: Tensor) -> float:
            seen.append((weight == 0).tolist())
            return 0.0

    known = Watching({"a": weight})
    section = _section("sensitivity", criterion="wanda", sparsity=0.5)
    _spread(section, {"a": (2, 4)}, known)
    assert [[True, True, False, False]] * 2 in seen


def test_nothing_comes_back_in_a_later_round() -> None:
    shapes = {"a": (16, 4), "b": (4, 16), "c": (10, 26)}
    groups = _spread(_section("erk", sparsity=0.5), shapes, Known(before={"a": 30}))
    counts = _counts(groups)
    assert counts["a"] == 30
    assert sum(counts.values()) == 194


def test_what_is_gone_is_not_measured_again() -> None:
    weights = {"a": torch.arange(100.0).reshape(10, 10)}
    weights["a"].view(-1)[:30] = 0
    known = Known(weights, before={"a": 30})
    assert _counts(_spread(_section("sensitivity", sparsity=0.5), {"a": (10, 10)}, known)) == {
        "a": 50
    }
    assert [zeros for _, zeros in known.measured] == [50, 75, 88]


def test_an_early_round_may_ask_for_less_than_the_least_of_the_last() -> None:
    section = _section("erk", sparsity=0.5, min_sparsity=0.4)
    early = section.rules[0].model_copy(update={"sparsity": 0.1})
    layers = [
        p.model_copy(update={"asked": 0.1}) for p in _layers(section, {"a": (10, 10), "b": (9, 9)})
    ]
    assert _counts(allocate("erk", layers, early, section, Known())) == {"a": 10, "b": 8}


def test_rounds_that_took_too_much_are_refused() -> None:
    with pytest.raises(UsageError, match=r"can come to 10\.0% together, found 30\.0% at the least"):
        _spread(_section("erk", sparsity=0.1), {"a": (100, 100)}, Known(before={"a": 3000}))


@pytest.mark.parametrize("way", WAYS)
def test_the_plan_tells_what_can_be_told_without_weights(tiny_sd: Path, way: str) -> None:
    prune = {"unet": {"allocation": way, "rules": [{"sparsity": 0.3}]}}
    recipe = Recipe.model_validate({"name": "r", "prune": prune})
    made = make_plan(recipe, read_catalog(tiny_sd))
    told = foresee(made, recipe)
    pruned = [p for p in told.layers if p.pruned]
    if way in ("erk", "uniform"):
        assert all(p.zeros is not None for p in pruned)
        exact = {p.sparsity for p in pruned if p.sparsity == (p.zeros or 0) / p.numel}
        assert len(exact) > 3 or way == "uniform"
        assert shortfalls(told, recipe) == []
    else:
        assert {(p.zeros, p.sparsity) for p in pruned} == {(None, BY_ALLOCATION)}
    assert account(told).components["unet"].of_layers_pruned == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_way_covers_every_layer_once_and_keeps_the_total(way: str) -> None:
    section = _section(way, sparsity=0.37, **({} if way == "uniform" else {"max_sparsity": 0.6}))
    layers = _layers(section, VARIED)
    if way == "uniform":
        layers = [p.model_copy(update={"zeros": int(0.37 * p.numel + 0.5)}) for p in layers]
    groups = allocate(way, layers, section.rules[0], section, _random(VARIED))
    assert sorted(p.name for group in groups for p in group.layers) == sorted(VARIED)
    assert sum(group.zeros for group in groups) == pytest.approx(0.37 * 14592, abs=3)


@pytest.mark.parametrize(
    ("way", "criterion", "component"),
    [
        ("global", "magnitude", "unet"),
        ("erk", "sparsegpt", "unet"),
        ("erk", "wanda", "text_encoder"),
        ("owl", "magnitude", "text_encoder"),
        ("owl", "wanda", "unet"),
        ("sensitivity", "magnitude", "unet"),
        ("sensitivity", "wanda", "text_encoder"),
    ],
)
def test_a_pruned_model_has_what_was_asked_for(
    tiny_source: Bundle, tmp_path: Path, way: str, criterion: str, component: str
) -> None:
    rule = {"scope": "linear", "criterion": criterion, "sparsity": 0.4, "max_sparsity": 0.6}
    if component == "unet":
        rule["layers"] = "mid_block.*"
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "prune": {component: {"allocation": way, "rules": [rule]}},
            "calibration": {"prompts": ["a red cat"], "steps": 1},
        }
    )
    pruned = prune(tiny_source, recipe, tmp_path / "pruned")
    assert pruned.manifest.plan
    layers = [p for p in pruned.manifest.plan.layers if p.pruned]
    numel = sum(p.numel for p in layers)
    slack = 32 if criterion == "wanda" else 1  # the least number of rows
    assert abs(sum(p.zeros or 0 for p in layers) - 0.4 * numel) <= slack + 1e-3 * numel
    assert max((p.zeros or 0) / p.numel for p in layers) <= 0.6
    assert len({p.sparsity for p in layers}) > 2


@pytest.mark.parametrize("way", WAYS)
def test_a_way_says_what_it_is(way: str) -> None:
    module = import_module(f"sdcompress.allocation.{way}")
    assert isinstance(module.NEEDS, frozenset)
    assert 30 < len(registry.summary("allocation", way)) <= 100
