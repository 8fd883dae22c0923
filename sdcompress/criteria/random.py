"""Random: seeded uniform noise. The control that every other criterion has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.criteria import Criterion, LayerStats

if TYPE_CHECKING:
    from torch import Tensor


def score(weight: Tensor, stats: LayerStats) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(stats.seed)
    return torch.rand(weight.shape, generator=generator)


CRITERION = Criterion(needs=frozenset({"seed"}), score=score)
