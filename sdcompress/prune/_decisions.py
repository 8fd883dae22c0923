"""What becomes of each weight: who competes with whom, how many go, and which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sdcompress.allocation import Group, allocate
from sdcompress.bits import Array, Buffers, is_zero, samples_of, slices, slices_of, zero_out
from sdcompress.bundle import Bundle
from sdcompress.calibrate import exact_device
from sdcompress.catalog import Catalog
from sdcompress.criteria import Criterion, LayerStats, layer_seed, load_criterion
from sdcompress.errors import InputError
from sdcompress.patterns import UNSTRUCTURED, Select, keep_mask, keep_masks, parse_pattern
from sdcompress.plan import LayerPlan, SparsityPlan
from sdcompress.recipe import Recipe
from sdcompress.safetensors_io import as_tensor, raw_bytes, read_finite, read_rows

if TYPE_CHECKING:
    from torch import Tensor

    from sdcompress.calibrate import Statistics
    from sdcompress.selection import Cut, Scored

Loss = Callable[[str, str, "Tensor"], float]  # component, layer, weight → what it does to the model
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


class Decisions:
    """Decides on every pruned layer of a plan.

    `statistics` may be filled in later, as long as those of a layer are there when it is decided
    on. `loss` is what an allocation that measures asks. Layers that an earlier round has pruned
    (`before`) keep the zeros it gave them.
    """

    def __init__(
        self,
        catalog: Catalog,
        plan: SparsityPlan,
        recipe: Recipe,
        statistics: Statistics,
        *,
        loss: Loss | None = None,
        before: Bundle | None = None,
        progress: Progress,
    ) -> None:
        self._plan, self._recipe, self._loss = plan, recipe, loss
        self.statistics, self.progress = statistics, progress
        self._infos = {
            (component, info.name): info
            for component, shards in catalog.headers.items()
            for header in shards
            for info in header.tensors.values()
        }
        pruned = before.manifest.plan.layers if before and before.manifest.plan else ()
        self._before = {(p.component, p.name) for p in pruned if p.pruned}
        self._zeros: dict[tuple[str, str], int] = {}
        self._cuts: dict[tuple[str, str], Cut] = {}
        self._buffers = Buffers()
        if not all(self._takes_arrays(layer) for layer in plan.layers if layer.pruned):
            import torch  # noqa: F401  # before there are threads, which are to have one core each

    def allocate(self) -> None:
        """Settle how many weights go in each layer. Comes before the first decision."""
        for component in self._plan.parameters:
            for group in self._groups(component):
                if len(group.layers) == 1:
                    (layer,) = group.layers
                    self._zeros[component, layer.name] = group.zeros
                else:
                    names = [(component, layer.name) for layer in group.layers]
                    self._cuts |= dict(zip(names, self._find_cuts(group), strict=True))
        self._loss = None  # and with it a model
        self._buffers = Buffers()  # and with the old ones their memory

    def _find_cuts(self, group: Group) -> list[Cut]:
        from sdcompress.selection import find_cuts

        scores = [partial(self.read_scores, layer) for layer in group.layers]
        if not all(map(self._takes_arrays, group.layers)):
            return find_cuts(scores, group.zeros)
        spots = [list(samples_of(layer.shape)) for layer in group.layers]
        samples = [
            (layer.numel, partial(self._read_scores_of, layer, rows))
            for layer, rows in zip(group.layers, spots, strict=True)
        ]
        return find_cuts(scores, group.zeros, samples)

    @property
    def threads(self) -> int | None:
        """How many layers may be decided on at once; None: as many as there are processors."""
        methods = {layer.criterion for layer in self._plan.layers if layer.pruned}
        return 1 if any(load_criterion(name).solve for name in methods if name) else None

    def decide(self, layer: LayerPlan, weight: Array) -> Iterator[Array]:
        """Put zeros where the layer is pruned, in place; gives the weight slice by slice.

        Raises:
            InputError: the criterion makes of it what its dtype cannot hold.
        """
        criterion, pattern = _criterion(layer), parse_pattern(layer.pattern or "")
        key = (layer.component, layer.name)
        if criterion.solve:
            tensor = as_tensor(weight)
            gone = tensor == 0 if key in self._before else None
            select = Select(pattern, layer.shape, self._zeros[key], gone)
            solved = self._solve(criterion, layer, tensor, select)
            raw_bytes(weight)[:] = raw_bytes(solved)
            yield from slices(weight)
            return
        for part, keep in zip(slices(weight), self._keep(layer, weight), strict=True):
            zero_out(part, keep)
            yield part

    def _keep(self, layer: LayerPlan, weight: Array) -> Iterator[Any]:
        """The masks of what stays of each slice of the weight, flat."""
        criterion, pattern = _criterion(layer), parse_pattern(layer.pattern or "")
        key = (layer.component, layer.name)
        if cut := self._cuts.get(key):
            return cut.keep(self.scores(layer, weight))
        if pattern.m is None and criterion.compare == "row":
            (scores,) = self._scores(layer, [as_tensor(weight)])
            keep = keep_mask(scores, pattern, self._zeros[key], criterion.compare)
            return (part.reshape(-1).numpy() for part in slices(keep))
        return keep_masks(partial(self.scores, layer, weight), pattern, self._zeros[key])

    def _solve(
        self, criterion: Criterion, layer: LayerPlan, weight: Tensor, select: Select
    ) -> Tensor:
        assert criterion.solve
        place = exact_device()
        try:
            mask, solved = criterion.solve(
                weight.float().to(place), self._stats(layer, place), select
            )
        except InputError as e:
            raise InputError(f"{layer.component}/{layer.name}: {e}") from e
        solved = solved.masked_fill(~mask, 0.0).to("cpu", weight.dtype)
        if not bool(solved.isfinite().all()):
            raise InputError(
                f"{layer.component}/{layer.name}: {layer.criterion} makes weights that "
                f"{layer.dtype} cannot hold; use an fp32 checkpoint, or prune this layer less"
            )
        return solved

    def scores(self, layer: LayerPlan, weight: Array) -> Scored:
        """Higher = keep; the lowest of all where an earlier round has pruned. In slices."""
        if self._takes_arrays(layer):
            score: Any = _criterion(layer).score
            stats = self._stats(layer, "cpu")
            return (score(part, stats) for part in slices(weight))
        if _criterion(layer).elementwise:
            return self._scores(layer, map(as_tensor, slices(weight)))
        (whole,) = self._scores(layer, [as_tensor(weight)])
        return slices(whole)

    def _takes_arrays(self, layer: LayerPlan) -> bool:
        """Whether scores can be had without torch."""
        return _criterion(layer).elementwise and (layer.component, layer.name) not in self._before

    def _scores(self, layer: LayerPlan, weights: Iterable[Tensor]) -> Iterator[Tensor]:
        score, stats = _criterion(layer).score, self._stats(layer, "cpu")
        assert score
        for weight in weights:
            scores = score(weight, stats)
            if (layer.component, layer.name) in self._before:
                scores = scores.masked_fill(weight == 0, -float("inf"))
            yield scores

    def read_scores(self, layer: LayerPlan) -> Scored:
        """`scores` of the weight as it is in its file."""
        if self._takes_arrays(layer):
            yield from self._read_scores_of(layer, list(slices_of(layer.shape)))
            return
        with self._buffers.lent(self._infos[layer.component, layer.name].nbytes) as buffer:
            yield from self.scores(layer, self.read(layer, buffer))

    def _read_scores_of(self, layer: LayerPlan, picks: Sequence[range]) -> Scored:
        """Of some rows, where no more than these has to be read."""
        score: Any = _criterion(layer).score
        stats, info = self._stats(layer, "cpu"), self._infos[layer.component, layer.name]
        for part in read_rows(info, picks, self._buffers):
            yield score(part, stats)

    def read(self, layer: LayerPlan, buffer: Array | None = None) -> Array:
        return read_finite(self._infos[layer.component, layer.name], buffer)

    def gone(self, layer: LayerPlan) -> int:
        """How many weights an earlier round has pruned."""
        known = (layer.component, layer.name) in self._before
        return sum(int(is_zero(part).sum()) for part in slices(self.read(layer))) if known else 0

    def measure(self, layer: LayerPlan, weight: Tensor) -> float:
        """What the model loses with this weight in this layer."""
        assert self._loss
        return self._loss(layer.component, layer.name, weight)

    def _stats(self, layer: LayerPlan, place: Any) -> LayerStats:
        seed = layer_seed(self._recipe.seed, layer.component, layer.name)
        recorded = self.statistics.get(layer.component, {}).get(layer.name, {})
        needs = _criterion(layer).needs
        return LayerStats(seed, {k: v.to(place) for k, v in recorded.items() if k in needs})

    def _groups(self, component: str) -> Iterator[Group]:
        """N:M layers alone, the others as their component's allocation says."""
        by_rule: dict[int, list[LayerPlan]] = defaultdict(list)
        for layer in self._plan.of(component):
            if layer.pruned and layer.rule is not None:
                by_rule[layer.rule].append(layer)
        section = self._recipe.prune.get(component)
        for index, members in by_rule.items():
            assert section
            rule = section.rules[index]
            fixed = members[0].pattern != str(UNSTRUCTURED)
            way = "uniform" if fixed else section.allocation
            yield from allocate(way, members, rule, section, _Evidence(self))


@dataclass(frozen=True)
class _Evidence:
    """What an allocation may look at: see `allocation.Evidence`."""

    decisions: Decisions

    def weight(self, layer: LayerPlan) -> Tensor:
        return as_tensor(self.decisions.read(layer)).float()

    def scores(self, layer: LayerPlan) -> Scored:
        return self.decisions.read_scores(layer)

    def statistic(self, layer: LayerPlan, name: str) -> Tensor:
        return self.decisions.statistics[layer.component][layer.name][name]

    def loss(self, layer: LayerPlan, weight: Tensor) -> float:
        return self.decisions.measure(layer, weight)

    def gone(self, layer: LayerPlan) -> int:
        return self.decisions.gone(layer)

    def progress(self, done: int, total: int) -> None:
        self.decisions.progress("measuring layers", done, total)


def _criterion(layer: LayerPlan) -> Criterion:
    assert layer.criterion is not None
    return load_criterion(layer.criterion)
