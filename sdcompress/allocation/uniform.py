"""Uniform: every layer gets the sparsity its rule asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdcompress.allocation import Evidence, Group
from sdcompress.plan import LayerPlan

if TYPE_CHECKING:
    from sdcompress.recipe import ComponentRecipe, Rule

NEEDS: frozenset[str] = frozenset()


def allocate(
    layers: Sequence[LayerPlan], rule: Rule, section: ComponentRecipe, evidence: Evidence
) -> list[Group]:
    return [Group((layer,), layer.zeros or 0) for layer in layers]
