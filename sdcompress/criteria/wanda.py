"""Wanda: |w| times the norm of the input it multiplies (Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.criteria import Criterion, LayerStats

if TYPE_CHECKING:
    from torch import Tensor


def score(weight: Tensor, stats: LayerStats) -> Tensor:
    return weight.abs() * stats.input_sq_norm.sqrt()


CRITERION = Criterion(needs=frozenset({"input_sq_norm"}), compare="row", score=score)
