"""Magnitude: |w|. Needs nothing, and is a hard baseline (Han et al. 2015, arXiv 1506.02626)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdcompress.bits import magnitudes
from sdcompress.criteria import Criterion, LayerStats

if TYPE_CHECKING:
    from sdcompress.bits import A


def score(weight: A, stats: LayerStats) -> Any:
    if hasattr(weight, "abs"):
        return weight.abs()
    flat: Any = magnitudes(weight)  # numpy's abs goes one by one
    return flat.view(weight.dtype).reshape(weight.shape)


CRITERION = Criterion(score=score, elementwise=True)
