"""Plan + weights → pruned bundle, streamed from safetensors to safetensors.

Nothing here holds more than a few copies of one tensor; only where a criterion asks what the layers
are given, or an allocation what they are worth, is the model loaded, to paint, before that. Weights
that go become +0.0; every other byte of every file stays what it was (but for criteria that also
change the weights that stay), and files in which nothing changes are hard-linked.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sdcompress import calibrate
from sdcompress.allocation import needs
from sdcompress.bits import Array, slices
from sdcompress.bundle import (
    Bundle,
    Manifest,
    link_files,
    refuse_existing,
    seal,
    staging,
    tool_versions,
)
from sdcompress.calibrate import (
    Calibrator,
    Losses,
    Statistics,
    complete,
    hessian_shape,
    on_main_process,
    packages,
    statistics_bytes,
)
from sdcompress.catalog import Catalog, read_catalog
from sdcompress.criteria import GRADIENTS, STATISTICS, load_criterion
from sdcompress.errors import SdcompressError, UsageError
from sdcompress.patterns import UNSTRUCTURED, parse_pattern
from sdcompress.plan import LayerPlan, SparsityPlan, make_plan, shortfalls
from sdcompress.prune._decisions import Decisions, Progress
from sdcompress.prune._write import record_tensor, write_pruned
from sdcompress.recipe import Recipe
from sdcompress.safetensors_io import as_tensor
from sdcompress.structure import RECORD, read_record

__all__ = [
    "check",
    "decisive",
    "needed",
    "notes",
    "prune",
    "record",
    "record_tensor",
]

DECIDES = {"name", "seed", "prune"}  # the parts of a recipe that a pruned bundle depends on
Wanted = dict[str, dict[str, frozenset[str]]]  # component → layer → statistics


def _silent(what: str, done: int, total: int) -> None:
    pass


def prune(
    source: Bundle,
    recipe: Recipe,
    out: Path,
    *,
    replace: bool = False,
    progress: Progress = _silent,
    before: Bundle | None = None,
    statistics: Statistics | None = None,
) -> Bundle:
    """Prune a weight bundle by a recipe, in one round, into a new bundle at `out`.

    Where a criterion needs statistics, the model paints the recipe's calibration prompts first,
    unless `statistics` (of `record`) are given. Under `accelerate launch` all processes paint, and
    one writes. `before` is what an earlier round has made of the source: its weights are pruned
    further, what is zero there stays zero, and blocks that were made narrower stay so. `progress`
    counts denoising steps while "calibrating", and bytes of weights while "pruning".

    Raises:
        UsageError: the recipe does not fit the model.
        InputError: weights or activations are corrupt or not finite, or `out` exists.
    """
    model = before or source
    catalog = read_catalog(model.path)
    plan = check(recipe, catalog).model_copy(update={"removed": _removed(model)})
    if not replace:
        refuse_existing(out)
    if "calibration" in decisive(recipe):
        recipe = recipe.model_copy(update={"calibration": complete(source, recipe.calibration)})
    decisions, calibrator = _look(source, before, catalog, plan, recipe, statistics, progress)
    ready: dict[tuple[str, str], Array] = {}
    if calibrator and recipe.calibration.packages > 1:
        ready = _in_packages(decisions, calibrator, plan, recipe, progress)
    calibrator = None  # a model less in memory

    def decide(layer: LayerPlan, weight: Array) -> Iterator[Array]:
        decided = ready.pop((layer.component, layer.name), None)
        if decided is None:
            return decisions.decide(layer, weight)
        weight[...] = decided
        return slices(weight)

    def write() -> None:
        with staging(out, replace=replace) as work:
            if not ready:
                decisions.allocate()
            resolved, tensors, written = write_pruned(
                model.path,
                catalog,
                plan,
                work,
                decide,
                partial(progress, "pruning"),
                decisions.threads,
            )
            if short := shortfalls(resolved, recipe):
                raise SdcompressError(
                    f"{short[0]}; the masks do not do what was asked, please report this"
                )
            linked = link_files(model, work)
            manifest = Manifest(
                stage="pruned",
                parent=source.digest,
                source=source.manifest.source,
                recipe=decisive(recipe),
                tools=tool_versions(),
                plan=resolved,
                tensors=tensors,
                details={**_structure(model), **_blocks(plan, recipe)},
            )
            seal(work, manifest, known={**linked, **written})

    on_main_process(write)
    return Bundle.open(out)


def check(recipe: Recipe, catalog: Catalog) -> SparsityPlan:
    """The plan, where all that can be refused without weights is.

    Raises:
        UsageError: the recipe does not fit the model.
        InputError: the model does not use a layer that has to be seen at work, or the folder of
            pictures is no such.
    """
    plan = make_plan(recipe, catalog)
    wanted = _wanted(plan, recipe)
    calibrate.check(_merged(*wanted), recipe.calibration)
    if wanted[0] and recipe.calibration.packages > 1:
        _refuse_packages(recipe)
    return plan


def record(
    source: Bundle, recipe: Recipe, *, before: Bundle | None = None, progress: Progress = _silent
) -> Statistics:
    """The statistics that pruning by this recipe needs, all at once; {} where it needs none.

    They are of `before` where it is given, as in `prune`.
    """
    model = before or source
    wanted = _merged(*_wanted(make_plan(recipe, read_catalog(model.path)), recipe))
    if not wanted:
        return {}
    calibrator = _calibrator(source, before, recipe, wanted)
    return calibrator.record(wanted, progress=partial(progress, "calibrating"))


def _calibrator(source: Bundle, before: Bundle | None, recipe: Recipe, seen: Wanted) -> Calibrator:
    """What is pruned, loaded; gradients are taken on what the source paints."""
    calibrator = Calibrator(before or source, recipe.calibration)
    if any(names & GRADIENTS for layers in seen.values() for names in layers.values()):
        calibrator.see(Calibrator(source, recipe.calibration) if before else calibrator)
    return calibrator


def decisive(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that a pruned bundle depends on, as they stand in its manifest.

    The calibration is among them where the model is looked at while it paints, the schedule where
    there is more than one round, and the size of a picture where blocks go, whose cost it is.
    """
    parts: dict[str, Any] = dict.fromkeys(DECIDES, True)
    if needed(recipe) & STATISTICS or _allocation_needs(recipe):
        parts["calibration"] = True
    if recipe.schedule.rounds > 1:
        parts["schedule"] = True
    if any(section.structure for section in recipe.prune.values()):
        parts["sampling"] = {"height", "width"}
    return recipe.model_dump(mode="json", include=parts)


def needed(recipe: Recipe) -> frozenset[str]:
    """All that the criteria of a recipe need, those that choose whole blocks included."""
    names = set[str]()
    for section in recipe.prune.values():
        names |= {rule.criterion for rule in section.rules if not rule.keep}
        for rule in section.structure.rules if section.structure else ():
            names |= set() if rule.keep else {rule.criterion, *(["obs"] if rule.refit else [])}
    return frozenset[str]().union(*map(_needs_of, names))


def notes(manifest: Manifest) -> list[str]:
    """What a person should know of how a bundle was pruned, a line each."""
    said = []
    if rounds := manifest.details.get("rounds", []):
        steps = "; ".join(
            f"{component} " + ", ".join(f"{entry['sparsity'][component]:.1%}" for entry in rounds)
            for component in rounds[-1]["sparsity"]
        )
        tuned = ", tuned in between" if any("tuned" in entry for entry in rounds) else ""
        said.append(f"pruned in {len(rounds)} rounds{tuned}: {steps}")
    if blocks := manifest.details.get("hessian_per_position", []):
        said.append(
            f"{len(blocks)} layers (such as {blocks[0]}) have more columns than max_hessian: each "
            "kernel position has a Hessian of its own, which is a little less exact"
        )
    return said


def _look(
    source: Bundle,
    before: Bundle | None,
    catalog: Catalog,
    plan: SparsityPlan,
    recipe: Recipe,
    statistics: Statistics | None,
    progress: Progress,
) -> tuple[Decisions, Calibrator | None]:
    """Load the model and record, if there is need: all at once, or, where there will be packages,
    only what the allocation needs before them.
    """
    criteria, allocations = _wanted(plan, recipe)
    several = bool(criteria) and recipe.calibration.packages > 1
    if several and statistics is not None:
        raise UsageError(
            "calibration: packages are calibrated one after the other, which statistics recorded "
            "before cannot do; take 'packages: 1', or let every round calibrate anew"
        )
    first = allocations if several else _merged(criteria, allocations)
    measured = "loss" in _allocation_needs(recipe)
    calibrator = None
    if measured or (statistics is None and (criteria or allocations)):
        seen = criteria if statistics is None else {}
        calibrator = _calibrator(source, before, recipe, seen)
    if statistics is None:
        told = partial(progress, "calibrating")
        statistics = calibrator.record(first, progress=told) if calibrator and first else {}
    loss = Losses(calibrator).of if calibrator and measured else None
    decisions = Decisions(
        catalog, plan, recipe, statistics, loss=loss, before=before, progress=progress
    )
    return decisions, calibrator if several else None


def _in_packages(
    decisions: Decisions,
    calibrator: Calibrator,
    plan: SparsityPlan,
    recipe: Recipe,
    progress: Progress,
) -> dict[tuple[str, str], Array]:
    """Decide package after package, each calibrated on what became of those before it.

    Every process does so: all go on painting with the same weights.
    """
    criteria, _ = _wanted(plan, recipe)
    decisions.allocate()
    layers = {(p.component, p.name): p for p in plan.layers if p.pruned}
    sizes = [(*key, _bytes(layer, criteria, recipe)) for key, layer in layers.items()]
    decided: dict[tuple[str, str], Array] = {}
    parts = packages(sizes, recipe.calibration.packages)
    for number, part in enumerate(parts, 1):
        keys = [(component, name) for component, name, _ in part]
        wanted: Wanted = defaultdict(dict)
        for component, name in keys:
            if statistics := criteria.get(component, {}).get(name):
                wanted[component][name] = statistics
        told = partial(progress, f"calibrating, package {number} of {len(parts)}")
        decisions.statistics = {}  # those of the last package, before there are others
        decisions.statistics = calibrator.record(dict(wanted), progress=told) if wanted else {}
        for key in keys:
            decided[key] = decisions.read(layers[key])
            deque(decisions.decide(layers[key], decided[key]), maxlen=0)
            calibrator.replace(*key, as_tensor(decided[key]))
    return decided


def _refuse_packages(recipe: Recipe) -> None:
    """Raises UsageError where packages cannot do what is asked."""
    for component, section in recipe.prune.items():
        names = {
            rule.criterion
            for rule in section.rules
            if not rule.keep and parse_pattern(rule.pattern) == UNSTRUCTURED
        }
        if section.allocation == "global" and any(
            load_criterion(name).needs & STATISTICS for name in names
        ):
            raise UsageError(
                f"{component}: a global threshold needs the scores of all layers at once, packages "
                "give them one after the other; take 'packages: 1', or another allocation"
            )


def _wanted(plan: SparsityPlan, recipe: Recipe) -> tuple[Wanted, Wanted]:
    """What has to be recorded of each layer: for its criterion, and for the allocation."""
    criteria: Wanted = defaultdict(dict)
    allocations: Wanted = defaultdict(dict)
    for layer in plan.layers:
        if not layer.pruned:
            continue
        section = recipe.prune[layer.component]
        fixed = layer.pattern != str(UNSTRUCTURED)
        if asked := _needs_of(layer.criterion) & STATISTICS:
            criteria[layer.component][layer.name] = asked
        if not fixed and (asked := needs(section.allocation) & STATISTICS):
            allocations[layer.component][layer.name] = asked
    return dict(criteria), dict(allocations)


def _merged(first: Wanted, second: Wanted) -> Wanted:
    merged: Wanted = {component: dict(layers) for component, layers in first.items()}
    for component, layers in second.items():
        for layer, statistics in layers.items():
            known = merged.setdefault(component, {}).get(layer, frozenset())
            merged[component][layer] = known | statistics
    return merged


def _allocation_needs(recipe: Recipe) -> frozenset[str]:
    """What allocations want to know; N:M rules leave them nothing to spread."""
    return frozenset[str]().union(
        *(
            needs(section.allocation)
            for section in recipe.prune.values()
            for rule in section.rules
            if not rule.keep and parse_pattern(rule.pattern) == UNSTRUCTURED
        )
    )


def _structure(model: Bundle) -> dict[str, Any]:
    """For the manifest: what was made narrower before."""
    details = model.manifest.details
    return {RECORD: details[RECORD]} if RECORD in details else {}


def _removed(model: Bundle) -> dict[str, int]:
    records = read_record(model.outline.details)
    return {c: record.parameters_dense - record.parameters for c, record in records.items()}


def _needs_of(criterion: str | None) -> frozenset[str]:
    return load_criterion(criterion).needs if criterion else frozenset()


def _bytes(layer: LayerPlan, criteria: Wanted, recipe: Recipe) -> int:
    names = criteria.get(layer.component, {}).get(layer.name, frozenset())
    return statistics_bytes(layer.shape, names, recipe.calibration.max_hessian)


def _blocks(plan: SparsityPlan, recipe: Recipe) -> dict[str, list[str]]:
    """For the manifest: the layers whose Hessian is cut into one for each kernel position."""
    cut = [
        f"{layer.component}/{layer.name}"
        for layer in plan.layers
        if layer.pruned
        and _needs_of(layer.criterion) & {"hessian", "step_hessian"}
        and len(hessian_shape(layer.shape, recipe.calibration.max_hessian)) > 2
    ]
    return {"hessian_per_position": cut} if cut else {}
