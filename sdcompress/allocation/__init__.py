"""How a component's sparsity is spread over its layers. One file a way; its name is the file's.

A way is a module with `allocate(layers, rule, section, evidence) -> list[Group]` for the layers of
one unstructured rule, and `NEEDS`: what has to be recorded of every layer before it is called
("loss" stands for `Evidence.loss`, all else for a statistic of `criteria.LayerStats`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sdcompress import registry
from sdcompress.patterns import parse_pattern
from sdcompress.plan import LayerPlan, SparsityPlan

if TYPE_CHECKING:
    from torch import Tensor

    from sdcompress.recipe import ComponentRecipe, Recipe, Rule
    from sdcompress.selection import Scored

LOSS = "loss"


class Evidence(Protocol):
    """What an allocation may look at; each thing is read or measured when it is asked for."""

    def weight(self, layer: LayerPlan) -> Tensor:
        """The weight in fp32, in its own shape."""

    def scores(self, layer: LayerPlan) -> Scored:
        """What the rule's criterion says of it, in slices of whole rows; only where it scores."""

    def statistic(self, layer: LayerPlan, name: str) -> Tensor:
        """A statistic named in `NEEDS`, as `criteria.LayerStats` describes it."""

    def loss(self, layer: LayerPlan, weight: Tensor) -> float:
        """How far off the model is with this weight in this layer, and all others as they are:
        the relative squared error of what it predicts (see `calibrate._losses`)."""

    def gone(self, layer: LayerPlan) -> int:
        """How many of its weights went in an earlier round, and stay gone; 0 in the first."""

    def progress(self, done: int, total: int) -> None:
        """Is told how many losses have been measured, of how many."""


@dataclass(frozen=True)
class Group:
    """Layers whose scores compete with one another, and how many weights go among all of them."""

    layers: tuple[LayerPlan, ...]
    zeros: int


def needs(name: str) -> frozenset[str]:
    """What a way needs to be recorded of the layers it is called for; see `NEEDS` above."""
    found: frozenset[str] = registry.load("allocation", name).NEEDS
    return found


def allocate(
    name: str,
    layers: Sequence[LayerPlan],
    rule: Rule,
    section: ComponentRecipe,
    evidence: Evidence,
) -> list[Group]:
    """Spread the sparsity of the pruned layers of one rule; each of them is in one group.

    Layers of an N:M pattern have nothing to spread, and ask nothing of the evidence.

    Raises:
        UsageError: the rule's limits leave no way to the sparsity it asks for.
    """
    fixed = parse_pattern(rule.pattern).sparsity is not None
    module = registry.load("allocation", "uniform" if fixed else name)
    groups: list[Group] = module.allocate(layers, rule, section, evidence)
    return groups


def foresee(plan: SparsityPlan, recipe: Recipe) -> SparsityPlan:
    """The plan with `zeros` and `sparsity` of those layers whose allocation needs no weights."""
    rules: dict[tuple[str, int], list[LayerPlan]] = defaultdict(list)
    for layer in plan.layers:
        if layer.pruned and layer.rule is not None and layer.zeros is None:
            rules[layer.component, layer.rule].append(layer)
    found: dict[tuple[str, str], int] = {}
    for (component, index), members in rules.items():
        section = recipe.prune[component]
        with suppress(_UnreadError):
            for group in allocate(
                section.allocation, members, section.rules[index], section, _Nothing()
            ):
                if len(group.layers) == 1:
                    found[component, group.layers[0].name] = group.zeros
    layers = (
        layer.model_copy(update={"zeros": zeros, "sparsity": zeros / layer.numel})
        if (zeros := found.get((layer.component, layer.name))) is not None
        else layer
        for layer in plan.layers
    )
    return plan.model_copy(update={"layers": tuple(layers)})


class _UnreadError(Exception):
    """What would have to be read, is not."""


class _Nothing:
    """The evidence there is before anything is read."""

    def weight(self, layer: LayerPlan) -> Tensor:
        raise _UnreadError

    def scores(self, layer: LayerPlan) -> Scored:
        raise _UnreadError

    def statistic(self, layer: LayerPlan, name: str) -> Tensor:
        raise _UnreadError

    def loss(self, layer: LayerPlan, weight: Tensor) -> float:
        raise _UnreadError

    def gone(self, layer: LayerPlan) -> int:
        return 0

    def progress(self, done: int, total: int) -> None:
        pass
