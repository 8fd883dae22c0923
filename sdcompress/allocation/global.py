"""Global: one threshold over all layers of a rule; layers of small weights give up more."""

from __future__ import annotations

from collections.abc import Sequence

from sdcompress.allocation import Group
from sdcompress.patterns import zeros_for
from sdcompress.plan import LayerPlan


def allocate(layers: Sequence[LayerPlan]) -> list[Group]:
    asked = layers[0].asked or 0.0  # one rule, one request
    return [Group(tuple(layers), zeros_for(asked, sum(layer.numel for layer in layers)))]
