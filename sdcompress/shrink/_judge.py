"""In what order the units of a block go, what that loses, and what makes up for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sdcompress.calibrate import Statistics, exact_device
from sdcompress.catalog import Catalog
from sdcompress.criteria import GRADIENTS, LayerStats, layer_seed, load_criterion
from sdcompress.errors import InputError
from sdcompress.safetensors_io import TensorInfo, as_tensor, read_finite
from sdcompress.shrink import _obs
from sdcompress.shrink._importance import Removal, order_by_score, scored_parts, unit_scores
from sdcompress.shrink._plan import Fate
from sdcompress.structure import Block, channels_of

if TYPE_CHECKING:
    from torch import Tensor


class Judge:
    """Looks at the weights of one block at a time. `seed` is the recipe's."""

    def __init__(self, catalog: Catalog, seed: int, statistics: Statistics) -> None:
        self._seed, self._statistics = seed, statistics
        self._infos: dict[tuple[str, str], TensorInfo] = {
            (component, info.name): info
            for component, shards in catalog.headers.items()
            for header in shards
            for info in header.tensors.values()
        }

    def order(self, fate: Fate) -> Removal:
        """Unit after unit, the least important first.

        Losses of different blocks can be added up and compared: see `_comparable`.

        Raises:
            InputError: weights are not finite, or a Hessian is of no use.
        """
        block, rule = fate.block, fate.rule
        assert rule
        if load_criterion(rule.criterion).group:
            weight, hessian = self._consumer(block)
            least = min(fate.choices()) if fate.kept is None else fate.kept
            columns = [_columns(block, weight, [unit]) for unit in range(block.units)]
            return _obs.order(weight, hessian, columns, block.units - least)
        names = [part.tensor for part in scored_parts(block)]
        weights = {name: self._read(block, name).float() for name in names}
        stats = {name: self._stats(block, name, rule.criterion) for name in names}
        scores = unit_scores(block, rule.criterion, weights, stats)
        return _comparable(rule.criterion, order_by_score(scores))

    def refits(self, fate: Fate) -> bool:
        """Whether the weight behind a block is made to make up for what goes."""
        return bool(fate.rule and (fate.rule.refit or load_criterion(fate.rule.criterion).group))

    def refit(self, fate: Fate, units: Iterable[int]) -> Tensor:
        """The weight behind a block whose other units have gone, made up for as well as can be.

        Raises:
            InputError: its number format cannot hold what that takes.
        """
        assert fate.rule
        weight, hessian = self._consumer(fate.block)
        refitted = _obs.refit(weight, hessian, _columns(fate.block, weight, units)).to("cpu")
        dtype = self._read(fate.block, fate.block.consumer).dtype
        if not bool(refitted.to(dtype).isfinite().all()):
            raise InputError(
                f"{fate.block.component}/{fate.block.consumer}: {fate.rule.criterion} makes "
                f"weights that {dtype} cannot hold; use an fp32 checkpoint, or ask for less"
            )
        return refitted

    def _consumer(self, block: Block) -> tuple[Tensor, Tensor]:
        place = exact_device()
        hessian = self._statistics[block.component][block.consumer]["hessian"]
        return self._read(block, block.consumer).float().to(place), hessian.to(place)

    def _read(self, block: Block, tensor: str) -> Tensor:
        return as_tensor(read_finite(self._infos[block.component, tensor]))

    def _stats(self, block: Block, tensor: str, criterion: str) -> LayerStats:
        seed = layer_seed(self._seed, block.component, tensor)
        recorded = self._statistics.get(block.component, {}).get(tensor, {})
        needs = load_criterion(criterion).needs
        return LayerStats(seed, {k: v for k, v in recorded.items() if k in needs})


def _columns(block: Block, weight: Tensor, units: Iterable[int]) -> Tensor:
    """The columns, in the order of `patterns.as_columns`, that these units give to a weight."""
    import torch

    channels = torch.tensor(channels_of(block, units), device=weight.device)
    positions = torch.arange(weight[0, 0].numel(), device=weight.device)
    return (positions[:, None] * block.width + channels).flatten()


def _comparable(criterion: str, removal: Removal) -> Removal:
    """Losses that can be added up over blocks and held against one another.

    Gradients give scores in units of the loss, the same in every block. All others are taken as
    shares of what their block has, squared: what goes adds up in the layer behind it, so that the
    error there is as large as the sum of what is gone, and the loss as its square.
    """
    if load_criterion(criterion).needs & GRADIENTS:
        return removal
    total = removal.losses[-1] or 1.0
    return Removal(removal.order, tuple((loss / total) ** 2 for loss in removal.losses))
