"""Uniform: every layer gets the sparsity its rule asks for."""

from __future__ import annotations

from collections.abc import Sequence

from sdcompress.allocation import Group
from sdcompress.plan import LayerPlan


def allocate(layers: Sequence[LayerPlan]) -> list[Group]:
    return [Group((layer,), layer.zeros or 0) for layer in layers]
