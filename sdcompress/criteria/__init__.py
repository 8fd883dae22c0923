"""How much each weight matters. One file a criterion; the file name is its name in recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdcompress import registry
from sdcompress.patterns import Compare, Select

if TYPE_CHECKING:
    from torch import Tensor

DATA_FREE = frozenset({"seed"})


@dataclass(frozen=True)
class LayerStats:
    """What a criterion may ask for in `needs`, each broadcastable to the weight.

    `seed` is derived from the recipe's seed and the layer's name, so that the order in which
    layers are visited changes nothing.
    """

    seed: int = 0


@dataclass(frozen=True)
class Criterion:
    """Exactly one of `score` and `solve`.

    `score(weight, stats)` gives a tensor of the weight's shape, higher = keep, and is pure.
    `solve(weight, stats, select)` is for methods that also change the weights that stay; it gives
    (mask, weight). A criterion never chooses groups: `select` turns scores into a mask.
    `compare` says within what scores compete: the whole tensor, or each output row.
    """

    needs: frozenset[str] = frozenset()
    compare: Compare = "tensor"
    score: Callable[[Tensor, LayerStats], Tensor] | None = None
    solve: Callable[[Tensor, LayerStats, Select], tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.solve is None):
            raise TypeError("a criterion has exactly one of score and solve")


def load_criterion(name: str) -> Criterion:
    criterion = registry.load("criteria", name).CRITERION
    assert isinstance(criterion, Criterion)
    return criterion
