"""What will happen to every weight, decided before any weight is read: Recipe + Catalog → plan."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from sdcompress.criteria import DATA_FREE, STATISTICS, load_criterion
from sdcompress.errors import UsageError
from sdcompress.patterns import (
    REDUCTION_AXIS,
    Compare,
    fits,
    parse_pattern,
    planned_zeros,
    zeros_for,
)

if TYPE_CHECKING:
    from sdcompress.catalog import Catalog, Layer
    from sdcompress.recipe import ComponentRecipe, Recipe, Rule

BY_ALLOCATION = "by allocation"


class LayerPlan(BaseModel):
    """One weight tensor: how it is pruned, or why it is not.

    `name` is the key in the component's state dict. `sparsity` is a fraction, or "by allocation"
    where only the weights can tell; `prune` resolves it and fills in `zeros`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str
    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    rule: int | None = None
    criterion: str | None = None
    pattern: str | None = None
    axis: int | None = None
    asked: float | None = None
    sparsity: float | str | None = None
    zeros: int | None = None
    skipped_because: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def pruned(self) -> bool:
        return self.skipped_because is None


class SparsityPlan(BaseModel):
    """Every tensor of every component, in file order, with the total of parameters of each.

    `parameters` counts all of a component's numbers, also those no rule can reach (biases, norms).
    `removed` counts those that are not among them any more, for every component whose blocks are
    made narrower (see `structure`): None where a budget has still to decide.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[LayerPlan, ...]
    parameters: dict[str, int]
    removed: dict[str, int | None] = {}

    def of(self, component: str) -> tuple[LayerPlan, ...]:
        return tuple(p for p in self.layers if p.component == component)


class ComponentSparsity(BaseModel):
    """The sparsities of one component, or of several together; all fractions of 0..1.

    They are fractions of the `parameters` that are left, which those that went with a block
    (`removed`, None where a budget has still to decide) are not among.

    asked: what the recipe says, over all parameters (the published studies' "nominal" figure).
    of_layers_pruned: zeros among the weights of the pruned layers.
    of_component: the same zeros among all parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int
    removed: int | None = 0
    parameters_pruned: int
    zeros: int
    asked: float
    of_layers_pruned: float
    of_component: float


class Accounting(BaseModel):
    """The four sparsities that are easily mistaken for one another.

    `components` has one entry for each component; `together` covers those the recipe prunes, single
    weights or whole blocks (what studies report); `pipeline` covers every parameter that is
    shipped, the VAE included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    components: dict[str, ComponentSparsity]
    together: ComponentSparsity
    pipeline: ComponentSparsity


def make_plan(recipe: Recipe, catalog: Catalog) -> SparsityPlan:
    """Apply the recipe's rules to the catalog; for each layer the last rule that matches wins.

    Raises:
        UsageError: a rule names a component the model lacks or matches no layer.
    """
    plans: list[LayerPlan] = []
    for component in catalog.components:
        layers = catalog.of(component)
        section = recipe.prune.get(component)
        if section is None:
            plans += [_skip(layer, "the recipe leaves this component dense") for layer in layers]
            continue
        compare = {r.criterion: load_criterion(r.criterion).compare for r in section.rules}
        _check_rules(section, layers, compare, component)
        for layer in layers:
            plans.append(_plan_layer(layer, section, compare))
    if missing := set(recipe.prune) - set(catalog.components):
        raise UsageError(
            f"the recipe prunes {_names(missing)}, the model has {_names(catalog.components)}; "
            "correct the component's name in the recipe"
        )
    return SparsityPlan(layers=tuple(plans), parameters=catalog.parameters)


def _plan_layer(
    layer: Layer, section: ComponentRecipe, compare: Mapping[str, Compare]
) -> LayerPlan:
    if layer.why_not:
        return _skip(layer, layer.why_not)
    matching = [i for i, rule in enumerate(section.rules) if rule_matches(rule, layer)]
    if not matching:
        return _skip(layer, "no rule matches")
    index = matching[-1]
    rule = section.rules[index]
    if rule.keep:
        return _skip(layer, f"kept dense by rule {index + 1}: {rule.reason}", index)
    pattern = parse_pattern(rule.pattern)
    if (problem := fits(pattern, layer.shape)) is not None:
        return _skip(layer, problem, index)
    asked = pattern.sparsity if pattern.sparsity is not None else rule.sparsity
    assert asked is not None  # the recipe's validation sees to it
    fixed = pattern.sparsity is not None or section.allocation == "uniform"
    return _entry(
        layer,
        rule=index,
        criterion=rule.criterion,
        pattern=str(pattern),
        axis=REDUCTION_AXIS,
        asked=asked,
        sparsity=asked if fixed else BY_ALLOCATION,
        zeros=planned_zeros(pattern, layer.shape, asked) if fixed else None,
    )


def rule_matches(rule: Rule, layer: Layer) -> bool:
    """The glob is matched against the whole key and against the key without `.weight`."""
    if rule.scope != "all" and rule.scope != layer.kind:
        return False
    names = (layer.name, layer.name.removesuffix(".weight"))
    return any(fnmatchcase(n, rule.layers) for n in names)


def _check_rules(
    section: ComponentRecipe,
    layers: Sequence[Layer],
    compare: Mapping[str, Compare],
    component: str,
) -> None:
    candidates = [layer for layer in layers if layer.why_not is None]
    for i, rule in enumerate(section.rules, 1):
        if load_criterion(rule.criterion).group:
            raise UsageError(
                f"{component}, rule {i}: {rule.criterion} judges whole neurons, heads and channels "
                "and no single weights; use obs_refit, or name it in a rule of 'structure'"
            )
        if problem := _no_way(section.allocation, rule, component):
            raise UsageError(f"{component}, rule {i}: {problem}")
        known = DATA_FREE | STATISTICS
        if missing := load_criterion(rule.criterion).needs - known:
            raise UsageError(
                f"{component}, rule {i}: {rule.criterion} needs {_names(missing)}, which nothing "
                f"collects yet; use a criterion that needs no more than {_names(known)}"
            )
        matched = [layer for layer in candidates if rule_matches(rule, layer)]
        if not matched:
            example = candidates[0].name.removesuffix(".weight") if candidates else "none"
            raise UsageError(
                f"{component}, rule {i}: {rule.layers!r} matches none of the {len(candidates)} "
                f"prunable {'layers' if rule.scope == 'all' else rule.scope + ' layers'} "
                f"(one is called {example!r}); `sdcompress plan` lists them"
            )
        problems = [fits(parse_pattern(rule.pattern), layer.shape) for layer in matched]
        if not rule.keep and all(problems):
            raise UsageError(
                f"{component}, rule {i}: {rule.pattern} fits none of the {len(matched)} layers it "
                f"matches ({matched[0].name}: {problems[0]}); choose another pattern"
            )


def _no_way(allocation: str, rule: Rule, component: str) -> str | None:
    """Why a rule's sparsity cannot be spread like this, or None if it can."""
    if rule.keep or parse_pattern(rule.pattern).sparsity is not None:
        return None
    instead = "use 'allocation: uniform' or another"
    criterion = load_criterion(rule.criterion)
    if allocation == "global" and criterion.compare == "row":
        return (
            f"{rule.criterion} compares weights within each output row, a global threshold "
            f"compares all; {instead}"
        )
    if allocation == "global" and criterion.solve:
        return (
            f"{rule.criterion} changes the weights it chooses among, a global threshold has to "
            f"know all of them before; {instead}"
        )
    if allocation == "sensitivity" and component == "vae":
        return f"sensitivity looks at the noise prediction, where the VAE has no part; {instead}"
    return None


def shortfalls(plan: SparsityPlan, recipe: Recipe) -> list[str]:
    """Where a resolved plan has fewer zeros than the recipe asks for; empty if nowhere.

    Counted anew from the request: the resolved figures are what is being checked. Layers under a
    shared allocation answer for their rule's total, or for what its limits leave of it: no more
    than uniform layers would be rounded to.
    """
    short: list[str] = []
    by_rule: dict[tuple[str, int], list[LayerPlan]] = defaultdict(list)
    for layer in plan.layers:
        if layer.pruned and layer.rule is not None:
            by_rule[layer.component, layer.rule].append(layer)
    for (component, index), layers in by_rule.items():
        rule = recipe.prune[component].rules[index]
        pattern = parse_pattern(rule.pattern)
        asked = rule.sparsity if pattern.sparsity is None else pattern.sparsity
        assert asked is not None
        if pattern.sparsity is None and recipe.prune[component].allocation != "uniform":
            wanted = zeros_for(asked, sum(p.numel for p in layers))
            if rule.max_sparsity < 1:
                even = (planned_zeros(pattern, p.shape, asked) for p in layers)
                wanted = min(wanted, sum(even))
            found = sum(p.zeros or 0 for p in layers)
            if found < wanted:
                short.append(f"{component}, rule {index + 1} ({found:,} zeros, asked {wanted:,})")
            continue
        for layer in layers:
            wanted = planned_zeros(pattern, layer.shape, asked)
            if (layer.zeros or 0) < wanted:
                found = layer.zeros or 0
                short.append(f"{component}/{layer.name} ({found:,} zeros, asked {wanted:,})")
    return short


def _skip(layer: Layer, reason: str, rule: int | None = None) -> LayerPlan:
    return _entry(layer, rule=rule, skipped_because=reason)


def _entry(layer: Layer, **decision: Any) -> LayerPlan:
    return LayerPlan(
        component=layer.component,
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        dtype=layer.dtype,
        **decision,
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def account(plan: SparsityPlan) -> Accounting:
    """Add up the plan. A layer without a resolved count is taken at what was asked for it."""
    totals = {c: _Totals.of_component(plan, c) for c in plan.parameters}
    touched = [t for c, t in totals.items() if t.pruned or c in plan.removed]
    return Accounting(
        components={c: t.result() for c, t in totals.items()},
        together=sum(touched or totals.values(), _Totals()).result(),
        pipeline=sum(totals.values(), _Totals()).result(),
    )


class _Totals:
    def __init__(
        self,
        parameters: int = 0,
        removed: int | None = 0,
        pruned: int = 0,
        zeros: int = 0,
        asked: float = 0,
    ) -> None:
        self.parameters, self.removed = parameters, removed
        self.pruned, self.zeros, self.asked = pruned, zeros, asked

    @classmethod
    def of_component(cls, plan: SparsityPlan, component: str) -> _Totals:
        layers = [p for p in plan.of(component) if p.pruned]
        pruned = sum(p.numel for p in layers)
        zeros = sum(
            zeros_for(p.asked or 0, p.numel) if p.zeros is None else p.zeros for p in layers
        )
        parameters = plan.parameters[component]
        # "Nominal" speaks of the component as a whole: the mean request, times all parameters.
        mean = sum((p.asked or 0) * p.numel for p in layers) / pruned if pruned else 0.0
        return cls(parameters, plan.removed.get(component, 0), pruned, zeros, mean * parameters)

    def __add__(self, other: _Totals) -> _Totals:
        unknown = self.removed is None or other.removed is None
        return _Totals(
            self.parameters + other.parameters,
            None if unknown else (self.removed or 0) + (other.removed or 0),
            self.pruned + other.pruned,
            self.zeros + other.zeros,
            self.asked + other.asked,
        )

    def result(self) -> ComponentSparsity:
        return ComponentSparsity(
            parameters=self.parameters,
            removed=self.removed,
            parameters_pruned=self.pruned,
            zeros=self.zeros,
            asked=self.asked / self.parameters if self.parameters else 0.0,
            of_layers_pruned=self.zeros / self.pruned if self.pruned else 0.0,
            of_component=self.zeros / self.parameters if self.parameters else 0.0,
        )
