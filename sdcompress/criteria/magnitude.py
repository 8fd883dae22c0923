"""Magnitude: |w|. Needs nothing, and is a hard baseline (Han et al. 2015, arXiv 1506.02626)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.criteria import Criterion, LayerStats

if TYPE_CHECKING:
    from torch import Tensor


def score(weight: Tensor, stats: LayerStats) -> Tensor:
    return weight.abs()


CRITERION = Criterion(score=score, elementwise=True)
