"""How much each weight matters. One file a criterion; the file name is its name in recipes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdcompress import registry
from sdcompress.patterns import Compare, Select

if TYPE_CHECKING:
    from torch import Tensor

DATA_FREE = frozenset({"seed"})
# What `calibrate` can record; each is a property of LayerStats.
INPUTS = frozenset({"input_sq_norm", "input_mean", "input_var", "hessian", "step_hessian"})
GRADIENTS = frozenset({"grad_mean", "grad_abs", "grad_sq"})
STATISTICS = INPUTS | GRADIENTS


@dataclass(frozen=True)
class LayerStats:
    """What a criterion may ask for in `needs`; it gets that and nothing else.

    `seed` is derived from the recipe's seed and the layer's name, so that the order in which
    layers are visited changes nothing. The others are in fp64 and broadcast to the weight: a
    Linear weight [out, in] has statistics [1, in], a Conv weight [K, C/groups, R, S] has them as
    [1, C, R, S], or [K, C/groups, R, S] where there are groups. `x` stands for every number that
    one weight was multiplied with, the zeros of a Conv's padding among them.
    """

    seed: int = 0
    recorded: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def input_sq_norm(self) -> Tensor:
        """The sum of x²."""
        return self._find("input_sq_norm")

    @property
    def input_mean(self) -> Tensor:
        """The mean of x."""
        return self._find("input_mean")

    @property
    def input_var(self) -> Tensor:
        """The variance of x, that is the mean of x² less the square of the mean."""
        return self._find("input_var")

    @property
    def hessian(self) -> Tensor:
        """Σ x xᵀ over the columns of the weight: [columns, columns].

        Columns are in the order of `patterns.as_columns`. A Conv of more than `max_hessian` columns
        has one block for each position in the kernel, [R·S, C, C].
        """
        return self._find("hessian")

    @property
    def step_hessian(self) -> Tensor:
        """`hessian` with every denoising step weighted: Σ α x xᵀ, α falling from step to step."""
        return self._find("step_hessian")

    @property
    def grad_mean(self) -> Tensor:
        """The mean of g, the gradient of the denoising loss, over the samples: shaped as the
        weight, as are the next two."""
        return self._find("grad_mean")

    @property
    def grad_abs(self) -> Tensor:
        """The mean of |g|."""
        return self._find("grad_abs")

    @property
    def grad_sq(self) -> Tensor:
        """The mean of g²."""
        return self._find("grad_sq")

    def _find(self, statistic: str) -> Tensor:
        if statistic not in self.recorded:
            raise TypeError(f"a criterion that uses {statistic} has to name it in `needs`")
        return self.recorded[statistic]


@dataclass(frozen=True)
class Criterion:
    """Exactly one of `score`, `solve` and `group`.

    `score(weight, stats)` gives a tensor of the weight's shape, higher = keep, and is pure.
    `solve(weight, stats, select)` is for methods that also change the weights that stay; it gives
    (mask, weight). A criterion never chooses groups: `select` turns scores into a mask.
    `group` marks what judges neurons, heads and channels as a whole, and no single weights; it is
    in `shrink`. `compare` says within what scores compete: the whole tensor, or each output row.
    `elementwise` promises that a score depends on its own weight and nothing else, and that `score`
    takes numpy's arrays (see `bits`) as well as tensors: weights are then handed in by the slice.
    """

    needs: frozenset[str] = frozenset()
    compare: Compare = "tensor"
    score: Callable[[Tensor, LayerStats], Tensor] | None = None
    solve: Callable[[Tensor, LayerStats, Select], tuple[Tensor, Tensor]] | None = None
    group: bool = False
    elementwise: bool = False

    def __post_init__(self) -> None:
        if [self.score is not None, self.solve is not None, self.group].count(True) != 1:
            raise TypeError("a criterion has exactly one of score, solve and group")


def for_weights() -> list[str]:
    """The criteria that judge single weights: all but those that judge groups alone."""
    return [name for name in registry.names("criteria") if not load_criterion(name).group]


def layer_seed(seed: int, component: str, layer: str) -> int:
    """`LayerStats.seed` of a layer, from the recipe's seed."""
    name = f"{seed}/{component}/{layer}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def load_criterion(name: str) -> Criterion:
    criterion = registry.load("criteria", name).CRITERION
    assert isinstance(criterion, Criterion)
    return criterion
