"""How a component's sparsity is spread over its layers. One file a way; its name is the file's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdcompress import registry
from sdcompress.plan import LayerPlan


@dataclass(frozen=True)
class Group:
    """Layers whose scores compete with one another, and how many weights go among all of them."""

    layers: tuple[LayerPlan, ...]
    zeros: int


def allocate(name: str, layers: Sequence[LayerPlan]) -> list[Group]:
    """Spread the sparsity of the pruned layers of one rule."""
    groups: list[Group] = registry.load("allocation", name).allocate(layers)
    return groups
