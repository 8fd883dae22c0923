"""Plan + weights → pruned bundle, streamed from safetensors to safetensors.

Nothing here holds more than a few copies of one tensor; only where a criterion asks what the layers
are given is the model loaded, to paint, before that. Weights that go become +0.0; every other byte
of every file stays what it was, and files in which nothing changes are hard-linked.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompress.allocation import Group, allocate
from sdcompress.bundle import (
    Bundle,
    Manifest,
    TensorRecord,
    link_files,
    refuse_existing,
    seal,
    staging,
    tool_versions,
)
from sdcompress.calibrate import Statistics, collect, complete, on_main_process
from sdcompress.catalog import Catalog, read_catalog
from sdcompress.criteria import STATISTICS, Criterion, LayerStats, load_criterion
from sdcompress.errors import InputError, SdcompressError
from sdcompress.patterns import UNSTRUCTURED, Threshold, keep_mask, parse_pattern
from sdcompress.plan import LayerPlan, SparsityPlan, make_plan, shortfalls
from sdcompress.recipe import Recipe
from sdcompress.safetensors_io import Header, StreamWriter, TensorInfo, raw_bytes, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

DECIDES = {"name", "seed", "prune"}  # the parts of a recipe that a pruned bundle depends on
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


def _silent(what: str, done: int, total: int) -> None:
    pass


def prune(
    source: Bundle,
    recipe: Recipe,
    out: Path,
    *,
    replace: bool = False,
    progress: Progress = _silent,
) -> Bundle:
    """Prune a weight bundle by a recipe into a new bundle at `out`.

    Where a criterion needs statistics, the source paints the recipe's calibration prompts first.
    Under `accelerate launch` all processes paint, and one writes. `progress` counts denoising steps
    while "calibrating", and bytes of weights while "pruning".

    Raises:
        UsageError: the recipe does not fit the model.
        InputError: weights or activations are corrupt or not finite, or `out` exists.
    """
    catalog = read_catalog(source.path)
    plan = make_plan(recipe, catalog)
    wanted = _wanted(plan)
    if not replace:
        refuse_existing(out)
    statistics: Statistics = {}
    if wanted:
        recipe = recipe.model_copy(update={"calibration": complete(source, recipe.calibration)})
        statistics = collect(
            source, wanted, recipe.calibration, progress=partial(progress, "calibrating")
        )
    on_main_process(
        lambda: _write(source, catalog, plan, recipe, statistics, out, replace, progress)
    )
    return Bundle.open(out)


def decisive(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that a pruned bundle depends on, as they stand in its manifest.

    The calibration is among them where a criterion looks at activations.
    """
    criteria = {r.criterion for s in recipe.prune.values() for r in s.rules if not r.keep}
    recorded = any(load_criterion(name).needs & STATISTICS for name in criteria)
    parts = DECIDES | {"calibration"} if recorded else DECIDES
    return recipe.model_dump(mode="json", include=parts)


def _wanted(plan: SparsityPlan) -> dict[str, dict[str, frozenset[str]]]:
    """The statistics each layer's criterion needs, by component; only what has to be recorded."""
    wanted: dict[str, dict[str, frozenset[str]]] = defaultdict(dict)
    for layer in plan.layers:
        if layer.pruned and (needs := _criterion(layer).needs & STATISTICS):
            wanted[layer.component][layer.name] = needs
    return dict(wanted)


def _write(
    source: Bundle,
    catalog: Catalog,
    plan: SparsityPlan,
    recipe: Recipe,
    statistics: Statistics,
    out: Path,
    replace: bool,
    progress: Progress,
) -> None:
    with staging(out, replace=replace) as work:
        resolved, tensors = _write_pruned(
            source.path, catalog, plan, recipe, statistics, work, progress
        )
        linked = link_files(source, work)
        manifest = Manifest(
            stage="pruned",
            parent=source.digest,
            source=source.manifest.source,
            recipe=decisive(recipe),
            tools=tool_versions(),
            plan=resolved,
            tensors=tensors,
        )
        seal(work, manifest, linked=linked)


def _write_pruned(
    model: Path,
    catalog: Catalog,
    plan: SparsityPlan,
    recipe: Recipe,
    statistics: Statistics,
    work: Path,
    progress: Progress,
) -> tuple[SparsityPlan, dict[str, dict[str, TensorRecord]]]:
    layers = {(p.component, p.name): p for p in plan.layers}
    tensors: dict[str, dict[str, TensorRecord]] = defaultdict(dict)
    infos = [i for shards in catalog.headers.values() for h in shards for i in h.tensors.values()]
    done, total = 0, sum(info.nbytes for info in infos)
    for component, shards in catalog.headers.items():
        masks = _Masks(component, shards, plan, recipe, statistics.get(component, {}))
        for header in shards:
            planned = {n for n in header.tensors if _is_pruned(layers.get((component, n)))}
            target = work / header.path.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            with StreamWriter(target, header) if planned else nullcontext() as writer:
                for info in header.tensors.values():
                    weight = read_finite(info)
                    if info.name in planned:
                        layer = layers[component, info.name]
                        weight[~masks.keep(weight, layer)] = 0.0
                        zeros = int((weight == 0).sum())  # those the model brought along too
                        layers[component, info.name] = layer.model_copy(
                            update={"zeros": zeros, "sparsity": zeros / layer.numel}
                        )
                    if writer:
                        writer.write(info, raw_bytes(weight))
                    record = record_tensor(weight, info.dtype, pruned=info.name in planned)
                    tensors[component][info.name] = record
                    done += info.nbytes
                    progress("pruning", done, total)
    resolved = plan.model_copy(update={"layers": tuple(layers.values())})
    if short := shortfalls(resolved, recipe):
        raise SdcompressError(f"{short[0]}; the masks do not do what was asked, please report this")
    return resolved, dict(tensors)


def _is_pruned(layer: LayerPlan | None) -> bool:
    return layer is not None and layer.pruned


def read_finite(info: TensorInfo) -> Tensor:
    """Read a tensor.

    Raises:
        InputError: it holds NaN or infinity.
    """
    weight = read_tensor(info)
    if not bool(weight.isfinite().all()):
        raise InputError(
            f"{info.file}: {info.name} holds NaN or infinite weights; "
            "use a checkpoint that makes pictures (fp16 conversions of fp32 can overflow)"
        )
    return weight


class _Masks:
    """Chooses what stays in one component. Call `keep` in file order: see `Threshold.keep`."""

    def __init__(
        self,
        component: str,
        shards: Sequence[Header],
        plan: SparsityPlan,
        recipe: Recipe,
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        self._component = component
        self._statistics = statistics
        self._seed = recipe.seed
        self._infos = {i.name: i for h in shards for i in h.tensors.values()}
        self._zeros: dict[str, int] = {}
        self._thresholds: dict[str, Threshold] = {}
        for group in _groups(plan.of(component), recipe):
            if len(group.layers) == 1:
                self._zeros[group.layers[0].name] = group.zeros
            else:
                threshold = Threshold.find(_Scores(self, group), group.zeros)
                self._thresholds |= {layer.name: threshold for layer in group.layers}

    def keep(self, weight: Tensor, layer: LayerPlan) -> Tensor:
        """The mask of weights to keep, shaped like `weight`."""
        scores = self.score(weight, layer)
        if threshold := self._thresholds.get(layer.name):
            return threshold.keep(scores)
        pattern = parse_pattern(layer.pattern or "")
        return keep_mask(scores, pattern, self._zeros[layer.name], _criterion(layer).compare)

    def score(self, weight: Tensor, layer: LayerPlan) -> Tensor:
        score = _criterion(layer).score
        assert score is not None
        name = f"{self._seed}/{self._component}/{layer.name}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        return score(weight, LayerStats(seed, self._statistics.get(layer.name, {})))

    def read(self, layer: LayerPlan) -> Tensor:
        return read_finite(self._infos[layer.name])


@dataclass(frozen=True)
class _Scores:
    """The scores of a group, read again on every walk: two passes cost less than keeping them."""

    masks: _Masks
    group: Group

    def __iter__(self) -> Iterator[Tensor]:
        for layer in self.group.layers:
            yield self.masks.score(self.masks.read(layer), layer)


def _groups(layers: Sequence[LayerPlan], recipe: Recipe) -> Iterator[Group]:
    """Who competes with whom: N:M layers alone, the others as their component's allocation says."""
    by_rule: dict[int, list[LayerPlan]] = defaultdict(list)
    for layer in layers:
        if layer.pruned and layer.rule is not None:
            by_rule[layer.rule].append(layer)
    for members in by_rule.values():
        section = recipe.prune[members[0].component]
        fixed = members[0].pattern != str(UNSTRUCTURED)
        yield from allocate("uniform" if fixed else section.allocation, members)


def _criterion(layer: LayerPlan) -> Criterion:
    assert layer.criterion is not None
    return load_criterion(layer.criterion)


def record_tensor(weight: Tensor, dtype: str, *, pruned: bool) -> TensorRecord:
    """The record of a tensor in memory; with `pruned`, its zeros and where they lie."""
    record = TensorRecord(
        dtype=dtype,
        shape=tuple(weight.shape),
        sha256=hashlib.sha256(raw_bytes(weight)).hexdigest(),
    )
    if not pruned:
        return record
    zero = (weight == 0).reshape(-1).numpy()
    mask = hashlib.sha256(np.packbits(zero).tobytes()).hexdigest()
    return record.model_copy(update={"zeros": int(zero.sum()), "zero_mask_sha256": mask})
